"""Ray actors: the same runs as without them, whatever dies meanwhile."""

import threading
import time
from contextlib import suppress

import faulty
import numpy as np
import psutil
import pytest
import torch
from faulty import Faulty
from ray.cloudpickle import register_pickle_by_value
from servers import METHODS, WORKS, N, make

import offbeat
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.on_ray.server import RayBackend, ServerActor, why
from offbeat.runtime.on_ray.start import start
from offbeat.runtime.server.remote import RemoteWorkers
from offbeat.workers.tasks import TASKS, Quadratic, TorchTask, quadratic

pytestmark = pytest.mark.xdist_group("ray")  # one Ray for all
EVERY = pytest.mark.parametrize("name", METHODS)
register_pickle_by_value(faulty)  # actors cannot import from here
ACTORS = []  # that are there, for tests that do not kill them


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One Ray, which runs find and leave as it is."""
    session = start()
    yield
    ACTORS.clear()
    session.stop()


class Borrowing(RayBackend):
    """Takes actors that are there already, and leaves them."""

    def _fill(self, seat):
        if not ACTORS:
            super()._fill(seat)
            return
        seat.actor = ACTORS.pop()
        seat.ready = seat.actor.__ray_call__.remote(ServerActor.__init__, *self._parts)

    def close(self):
        for seat in self._seats:
            if seat.actor is not None and seat.ready is None:
                ACTORS.append(seat.actor)
                seat.actor = None
        super().close()


class Borrowed:
    """``ray``, with the actors of earlier runs."""

    def __init__(self, workers_per_actor=N // 2):
        self.made = ENGINES["ray"](workers_per_actor)
        self.spec, self.clocks, self.gossip = self.made.spec, self.made.clocks, self.made.gossip

    def backend(self, experiment, folder=None):
        return Borrowing(experiment, self.made)


def run(name, engine, fleet=f"{N} lognormal(1.0)", task=None, steps=120, **more):
    task = task or quadratic(5, workers=N, noise=0.3, seed=2)
    options = {"work": WORKS.get(name, "gradient"), "stop": {"steps": steps}, "seed": 4, **more}
    return offbeat.run(task, make(name), fleet, engine=engine, **options)


def same(one, other):
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.trace, other.trace)


# -- Conformance -----------------------------------------------------------------------------------


@EVERY
def test_every_method_under_the_virtual_clock_is_the_same_to_the_bit(name):
    same(run(name, Borrowed(), clock="virtual"), run(name, "virtual"))


@EVERY
def test_every_method_under_a_real_clock_converges_and_is_replayed(name, tmp_path):
    alike = Quadratic(np.ones((N, 5)), noise=0.03, seed=2)  # so any order of arrivals will do
    result = run(name, Borrowed(), task=alike, clock="real", pace=1e-3, folder=tmp_path / "run")
    assert result.reason == "steps"
    assert result.final["loss"] < 0.2 * result.column("loss")[0]
    same(offbeat.replay(tmp_path / "run", task=alike), result)


COMPRESSED = (
    "compressed(topk(2), local-steps(momentum(lr=0.2), steps=3))",
    "compressed(qsgd(4), feedback=false)",
)


@pytest.mark.parametrize("work", COMPRESSED)
def test_compressed_updates_travel(work, tmp_path):
    fleet = f"{N} lognormal(1.0) bandwidth=50.0"
    ours, plain = (
        run("random", engine, fleet, work=work, **clock)
        for engine, clock in ((Borrowed(), {"clock": "virtual"}), ("virtual", {}))
    )
    same(ours, plain)
    assert ours.final == plain.final
    options = {"clock": "real", "pace": 1e-3, "folder": tmp_path / "run", "work": work}
    result = run("random", Borrowed(), fleet, **options)
    again = offbeat.replay(tmp_path / "run")
    same(again, result)
    assert again.final["bytes"] == result.final["bytes"] > 0


@pytest.mark.parametrize("name", sorted({*TASKS} - {"external", "torch"}))  # loops, files
def test_every_task_travels(name):
    runs = [
        offbeat.run(
            TASKS[name](workers=4), "pure(lr=0.01)", "4 1..4", stop={"steps": 12},
            evaluate={"steps": 12}, engine=engine, clock="virtual",
        )
        for engine in (Borrowed(2), "virtual")
    ]  # fmt: skip
    same(*runs)


@pytest.mark.parametrize("width", [6, 50_000])  # in the call, and in the store
def test_a_module_that_changes_its_parameters_in_place_is_the_same(width):
    """It is the actor's own copy that it changes."""

    class Positive(torch.nn.Linear):
        def forward(self, a):
            self.weight.data.clamp_(min=0)
            return super().forward(a)

    runs = []
    for engine in (Borrowed(2), "virtual"):
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.rand(24, width), torch.rand(24, 1))
        loss = torch.nn.functional.mse_loss
        task = TorchTask(Positive(width, 1), loss, data, workers=4, batch=2)
        runs.append(
            offbeat.run(
                task, "pure(lr=1e-5)", "4 1..4", stop={"steps": 30}, evaluate={"steps": 10},
                engine=engine, clock="virtual",
            )
        )  # fmt: skip
    same(*runs)
    assert (runs[0].x < 0).any()  # what a server's step left, nobody clamped


@pytest.mark.parametrize("dim", [12_000, 13_000, 140_000])
def test_models_inline_in_the_store_and_alone(dim):
    task = quadratic(dim, workers=N, noise=0.3)
    for name in ("minibatch", "random", "local-sgd"):
        same(
            *(
                run(name, engine, task=task, steps=10, clock="virtual")
                for engine in (Borrowed(), "virtual")
            )
        )


def test_a_thousand_workers_on_two_actors():
    task = quadratic(5, workers=1000, noise=0.3)
    options = {"fleet": "1000 lognormal(1.0)", "task": task, "steps": 5000, "clock": "virtual"}
    began_s = time.monotonic()
    ours = run("shuffled", Borrowed(500), **options)
    took_s = time.monotonic() - began_s
    same(ours, run("shuffled", "virtual", **options))
    assert took_s < 15


@pytest.mark.parametrize("name", ["pure", "delayed-nesterov", "shuffled", "minibatch"])
def test_a_straggler_holds_up_whom_it_does_under_the_virtual_clock(name):
    """One worker is five times slower: that is nothing to those who need not wait for it.

    A shuffled method gives every worker as many jobs: those in flight gather in the straggler's
    queue, until it has the straggler's pace, as a synchronous one has from the beginning.
    """
    options = {"fleet": f"{N} 1.0 stragglers=1x5", "stop": {"seconds": 10.5}}
    if name == "delayed-nesterov":
        options["work"] = "local-steps(sgd(lr=0.1), steps=1)"
    real = run(name, Borrowed(), clock="real", pace=0.2, **options)
    ideal = run(name, "virtual", **options)
    ours, theirs = (
        np.bincount(result.trace[:, 1].astype(int), minlength=N)[:-1].sum() / 10 / (N - 1)
        for result in (real, ideal)
    )  # jobs a second of the other workers, which could have done one
    assert theirs * 0.9 < ours <= theirs * 1.01
    assert (ours > 0.9) == (name in ("pure", "delayed-nesterov"))
    assert (ours < 0.3) == (name == "minibatch")


# -- What dies -------------------------------------------------------------------------------------

DEATHS = {(2, 3): ("die", 1), (5, 4): ("die", 2)}


def test_processes_that_die_change_nothing_under_the_virtual_clock(tmp_path):
    """What workers keep between jobs is restored from what the run last accepted."""
    task, work = Faulty(tmp_path, DEATHS), COMPRESSED[0]
    result = run("local-sgd", "ray(4)", task=task, clock="virtual", work=work)
    assert task.happened("die") == 3
    assert result.facts["restarts"] == 3 * N // 2
    same(result, run("local-sgd", "virtual", work=work))


@pytest.mark.parametrize(
    "policy", ["pause", "lose", pytest.param("reassign", marks=pytest.mark.soak)]
)
def test_processes_that_die_under_a_real_clock(policy, tmp_path):
    task = Faulty(tmp_path, DEATHS)
    fleet = f"{N} uniform(0.5) on_outage={policy}"
    result = run(
        "delayed-nesterov", "ray(4)", fleet, task, 200,
        clock="real", pace=0.02, folder=tmp_path / "run",
    )  # fmt: skip
    assert result.reason == "steps"
    deaths = task.happened("die")
    assert deaths == 3 if policy == "pause" else deaths in (1, 2)  # what is lost is not repeated
    told = [event["event"] for event in result.events]
    assert told.count("gone") == deaths * N // 2
    # The run may end before the last of them are back.
    assert told.count("gone") - result.facts["restarts"] in (0, N // 2)
    assert told.count("left") == (0 if policy == "pause" else deaths * N // 2)
    if policy != "pause":
        assert result.facts["lost" if policy == "lose" else "reassigned"] > 0
    again = offbeat.replay(tmp_path / "run", task=Faulty(tmp_path, {}))
    same(again, result)


def test_others_take_over_when_an_actor_was_replaced_too_often(tmp_path):
    task = Faulty(tmp_path, {(2, 3): ("die", 1)})
    result = run("local-sgd", "ray(4, restarts=0)", task=task, clock="virtual")
    assert task.happened("die") == 1
    assert result.facts["restarts"] == N // 2
    same(result, run("local-sgd", "virtual"))


def test_others_take_over_when_an_actor_does_not_live_to_begin():
    class Stillborn(RayBackend):
        def _fill(self, seat):
            super()._fill(seat)
            if seat is self._seats[0]:
                self._kill(seat)

    engine = Borrowed()
    made = ENGINES["ray"](N // 2, restarts=0)
    engine.backend = lambda experiment, folder: Stillborn(experiment, made)
    result = run("pure", engine, clock="virtual")
    assert result.facts["restarts"] == 0
    same(result, run("pure", "virtual"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("1 worker(s) were killed due to the node running low on memory.", "ran out of memory"),
        ("The actor died because its node has died. Node Id: 4f2a", "its machine is gone"),
        ("The actor is dead because it was killed by `ray.kill`.", "its Ray actor was killed"),
    ],
)
def test_what_became_of_an_actor(error, said):
    assert said in why(RuntimeError(error))


def test_what_a_worker_keeps_does_not_keep_what_others_do(monkeypatch):
    sizes, hear = [], RemoteWorkers._hear

    def heard(self, event):
        sizes.extend(row.base is None or row.base.size == row.size for row in event.kept.values())
        hear(self, event)

    monkeypatch.setattr(RemoteWorkers, "_hear", heard)
    run("local-sgd", Borrowed(), clock="virtual")
    assert len(sizes) > 100
    assert all(sizes)


def test_nobody_is_left(tmp_path):
    task = Faulty(tmp_path, {(2, 3): ("die", 99)})
    with pytest.raises(
        ComputeError, match=r"no Ray actor is left: each was replaced 1 times; .* died"
    ):
        run("pure", "ray(8, restarts=1)", task=task, clock="virtual")
    assert task.happened("die") == 2


def test_ray_kill_counts_too(tmp_path):
    kills, answered = [], [0]

    class Killed(RayBackend):
        def collect(self, timeout_s):
            events = super().collect(timeout_s)
            answered[0] += len(events)
            if not kills and answered[0] > 40:
                self._ray.kill(self._seats[1].actor)
                kills.append(answered[0])
            return events

    engine = Borrowed(4)
    engine.backend = lambda experiment, folder: Killed(experiment, engine.made)
    result = run("pure", engine, steps=400, clock="virtual")
    assert len(kills) == 1
    assert result.facts["restarts"] == N // 2
    same(result, run("pure", "virtual", steps=400))


def test_code_that_raises_is_told_with_its_traceback(tmp_path, caplog):
    task = Faulty(tmp_path, {(3, 2): ("raise", 2)})
    result = run("pure", Borrowed(), task=task, clock="virtual")
    assert task.happened("raise") == 2
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "job 2 of worker 3 (shard 3, draw 2) failed and is tried again:" in told
    assert "ZeroDivisionError: division at (3, 2)" in told
    assert result.facts["failures"] in (1, 2)  # of a batch, each order is computed again alone
    same(result, run("pure", "virtual"))
    task = Faulty(tmp_path, {(3, 3): ("raise", 9)})
    said = r"job 3 of worker 3 .* failed 3 times; (.|\n)*ZeroDivisionError: division at \(3, 3\)"
    with pytest.raises(ComputeError, match=said):
        run("pure", Borrowed(), task=task, clock="real", pace=1e-3, steps=10**6)


# -- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("ray(workers_per_actor=0)", "greater than or equal to 1"),
        ("ray(4, placement=sprad)", "'spread' or 'pack', not 'sprad'"),
        ("ray(4, num_cpus=1000)", "2 actors with 1000 CPU each do not fit, there is room for 0"),
        ('ray(4, resources={"magic": 1})', "2 actors with 1 magic each do not fit"),
        ("ray(4, device=cuda)", 'quadratic is computed by numpy.*; on device "cuda" can .* lm'),
        ("rey", 'no engine is called "rey"; did you mean "ray"'),
    ],
)
def test_mistakes_are_one_sentence(engine, said):
    with pytest.raises(offbeat.ConfigError, match=said):
        run("pure", engine)


def test_a_task_that_cannot_travel():
    task = quadratic(5, workers=N)
    task.lock = threading.Lock()
    with pytest.raises(
        offbeat.ConfigError, match=r"cannot be sent to an actor \(cannot pickle .*lock"
    ):
        run("pure", "ray(4)", task=task)


def hosts():
    """Process ids of actors."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            found |= {process.pid} if process.cmdline()[:1] == ["ray::ServerActor"] else set()
    return found


def test_actors_are_gone_after_a_run_that_failed(monkeypatch):
    before, seen, collect = hosts(), set(), RayBackend.collect

    def collected(self, timeout_s):
        seen.update(hosts() - before)
        return collect(self, timeout_s)

    monkeypatch.setattr(RayBackend, "collect", collected)
    with pytest.raises(offbeat.Diverged):
        offbeat.run("quadratic", "pure(lr=1e200)", "8 1.0", engine="ray(4)", clock="virtual")
    assert 1 <= len(seen) <= 2
    until_s = time.monotonic() + 10
    while hosts() & seen and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not hosts() & seen
