"""Jobs computed by a backend: the same run in virtual time, a replayable one in real time."""

import time

import numpy as np
import pytest
from servers import METHODS, WORKS, N, make

import offbeat
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.compute.backend import (
    Back,
    ComputeBackend,
    Failed,
    Gone,
    JobRequest,
    JobResult,
    Runner,
)
from offbeat.runtime.experiment.engines import ENGINES, Virtual
from offbeat.runtime.server.remote import LiveWorkers, RemoteWorkers
from offbeat.workers.compressed import SENT
from offbeat.workers.tasks import quadratic
from offbeat.workers.work import WORK

EVERY = pytest.mark.parametrize("name", METHODS)


class HereCrew(ComputeBackend):
    """Computes in this process, one order a call, of an arbitrary worker; loses processes.

    Args:
        experiment: what to run.
        seed: of whose turn it is, and who is killed.
        kills: probability that a call ends a process instead; it is back at a later call.
    """

    def __init__(self, experiment, seed=0, kills=0.0):
        self.task, self.work = experiment.task, experiment.work
        self.runners = [Runner(self.task, self.work) for _ in range(experiment.task.workers)]
        self.pending = {}
        self.random, self.kills, self.killed = np.random.default_rng(seed), kills, []
        self.away, self.closed = [], False

    def submit(self, order):
        assert not order.x.flags.writeable
        if order.worker not in self.away:  # else it is forgotten
            self.pending[order.serial] = order

    def cancel(self, serial):
        self.pending.pop(serial, None)

    def collect(self, timeout_s):
        if self.away and self.random.random() < 0.5:
            return [Back(self.away.pop(0))]
        workers = sorted({order.worker for order in self.pending.values()})
        if not workers:
            time.sleep(timeout_s)
            return []
        worker = int(self.random.choice(workers))
        if self.random.random() < self.kills:
            self.runners[worker] = Runner(self.task, self.work)
            gone = [s for s, order in self.pending.items() if order.worker == worker]
            for serial in gone:
                del self.pending[serial]
            self.away.append(worker)
            self.killed.append(worker)
            return [Gone(worker, "the test killed it")]
        mine = [serial for serial, order in self.pending.items() if order.worker == worker]
        return self.runners[worker].compute([self.pending.pop(min(mine))])

    def close(self):
        self.closed = True


class Here(Virtual):
    """An engine whose backends are ``HereCrew``, or of another class."""

    clocks = ("virtual", "real")

    def __init__(self, make, **options):
        self.make, self.options = make, options

    def backend(self, experiment, folder=None):
        self.made = self.make(experiment, **self.options)
        return self.made


@ENGINES.register("here")
def here(kills: float = 0.0, seed: int = 0) -> Here:
    """For tests: this process, as if it were others."""
    return Here(HereCrew, kills=kills, seed=seed)


def run(name, engine, fleet=f"{N} lognormal(1.0)", steps=120, **more):
    task = quadratic(5, workers=N, noise=0.3, seed=2)
    options = {"work": WORKS.get(name, "gradient"), "stop": {"steps": steps}, "seed": 4, **more}
    return offbeat.run(task, make(name), fleet, engine=engine, **options)


@EVERY
def test_a_crew_under_the_virtual_clock_changes_nothing(name):
    engine = here(kills=0.05, seed=1)
    ours, plain = run(name, engine), run(name, "virtual")
    np.testing.assert_array_equal(ours.x, plain.x)
    np.testing.assert_array_equal(ours.trace, plain.trace)
    assert len(engine.made.killed) > 2
    assert ours.facts["restarts"] >= len(engine.made.killed) - N
    assert engine.made.closed


@EVERY
@pytest.mark.parametrize("speeds", ["lognormal(1.0)", "real"])
def test_a_real_run_replays_to_the_same_bits(name, speeds, tmp_path):
    fleet = f"{N} {speeds}"
    engine = here(kills=0.03, seed=1)
    pace = 1e-3 if speeds == "real" else 1e-5
    result = run(name, engine, fleet, clock="real", pace=pace, folder=tmp_path / "run")
    assert result.reason == "steps"
    assert (np.diff(result.trace[:, 0]) > 0).all()
    gone = [event for event in result.events if event["event"] == "gone"]
    assert len(gone) == len(engine.made.killed) > 0
    again = offbeat.replay(tmp_path / "run")
    np.testing.assert_array_equal(again.x, result.x)
    np.testing.assert_array_equal(again.trace, result.trace)


@pytest.mark.parametrize("policy", ["lose", "reassign"])
@pytest.mark.parametrize("name", ["pure", "random", "ringleader", "delayed-nesterov"])
def test_what_a_dead_process_had_is_lost_or_reassigned(name, policy, tmp_path):
    fleet = f"{N} uniform(0.5) on_outage={policy}"
    engine = here(kills=0.03, seed=3)
    result = run(name, engine, fleet, clock="real", pace=1e-4, folder=tmp_path / "run", steps=200)
    assert result.reason == "steps"
    counted = result.facts["lost" if policy == "lose" else "reassigned"]
    left = [event for event in result.events if event["event"] == "left"]
    assert counted == sum(len(event["jobs"]) for event in left) > 0
    again = offbeat.replay(tmp_path / "run")
    np.testing.assert_array_equal(again.x, result.x)
    np.testing.assert_array_equal(again.trace, result.trace)


class AllAtOnce(HereCrew):
    """Every process is lost at once, once."""

    def collect(self, timeout_s):
        if len(self.pending) < N or self.killed or self.random.random() < 0.9:
            return super().collect(timeout_s)
        self.pending.clear()
        self.away, self.killed = list(range(N)), list(range(N))
        return [Gone(worker, "the test killed it") for worker in range(N)]


@pytest.mark.parametrize("policy", ["pause", "lose", "reassign"])
def test_a_run_waits_for_processes_to_be_back(policy):
    engine = Here(AllAtOnce)
    result = run("pure", engine, f"{N} 1.0 on_outage={policy}", clock="real", pace=1e-4)
    assert engine.made.killed
    assert result.reason == "steps"
    assert result.facts["restarts"] == N


def test_a_real_run_takes_the_time_its_fleet_would(tmp_path):
    began_s = time.monotonic()
    result = run("pure", here(), "8 0.02 stragglers=1x5", clock="real", steps=100)
    taken_s = time.monotonic() - began_s
    counts = np.bincount(result.trace[:, 1].astype(int), minlength=N)
    assert taken_s >= 0.02 * 100 / (7 + 1 / 5)
    assert counts[7] <= taken_s / 0.1
    assert (counts[:7] <= taken_s / 0.02).all()


@pytest.mark.parametrize("speeds", ["lognormal(1.0)", "real"])
def test_a_real_run_is_resumed_and_replayed(speeds, tmp_path, caplog):
    options = {"clock": "real", "pace": 1e-4, "folder": tmp_path / "run"}
    run("delayed-nesterov", here(kills=0.02), f"{N} {speeds}", steps=60, **options)
    with (tmp_path / "run" / "trace.jsonl").open("a") as file:
        file.write("[0, 0]\n")  # as of a run that was killed after its last checkpoint
    with caplog.at_level("INFO", "offbeat"):
        for steps in (61, 130):
            result = offbeat.resume(tmp_path / "run", overrides=[f"stop.steps={steps}"])
    assert "step 60; the 1 or more results that came after it are lost" in caplog.text
    assert result.final["step"] == 130
    assert '"timer"' in (tmp_path / "run" / "trace.jsonl").read_text()
    assert "timer" not in {event["event"] for event in result.events}  # checkpoints do not grow
    assert (np.diff(result.trace[:, 0]) > 0).all()
    again = offbeat.replay(tmp_path / "run")
    np.testing.assert_array_equal(again.x, result.x)
    np.testing.assert_array_equal(again.trace, result.trace)


class Broken(HereCrew):
    """Whose task raises at one worker."""

    def collect(self, timeout_s):
        for serial, order in self.pending.items():
            if order.worker == 3:
                del self.pending[serial]
                return [Failed(serial, "ZeroDivisionError: division by zero")]
        return super().collect(timeout_s)


@pytest.mark.parametrize("clock", ["virtual", "real"])
def test_code_that_raises_again_and_again_ends_the_run(clock):
    engine = Here(Broken)
    with pytest.raises(ComputeError, match=r"job 0 of worker 3 .* failed 3 times.*\nZeroDivision"):
        run("pure", engine, clock=clock, pace=1e-5)
    assert engine.made.closed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clock": "real"}, 'clock must be virtual with engine = "virtual", not "real"'),
        ({"engine": "here", "clock": "rael"}, 'clock must be virtual or real .* not "rael"'),
        ({"engine": "here", "clock": "real", "pace": 0}, "pace must be positive"),
        ({"engine": "hare"}, 'no engine is called "hare"; did you mean "here"'),
        ({"fleet": "8 real"}, 'fleet.speeds = "real" needs a real clock'),
        ({"engine": "here", "clock": "real", "fleet": "8 real stragglers=1x5"}, "nothing is emu"),
    ],
)
def test_mistakes_about_engines_and_clocks(options, said):
    with pytest.raises(offbeat.ConfigError, match=said):
        offbeat.run("quadratic(5)", "pure", **{"fleet": "8 1.0", **options})


def test_a_run_may_go_on_with_another_engine(tmp_path):
    options = {"work": WORKS["local-sgd"], "seed": 4}
    parts = "quadratic(5, noise=0.3)", "local-sgd(lr=0.05)", f"{N} lognormal(1.0)"
    whole = offbeat.run(*parts, **options, stop={"steps": 90})
    offbeat.run(*parts, **options, stop={"steps": 30}, folder=tmp_path / "run")
    for steps, engine in ((60, "here(kills=0.05)"), (90, "virtual")):
        ends = [f"stop.steps={steps}"]
        result = offbeat.resume(tmp_path / "run", engine=engine, overrides=ends)
    np.testing.assert_array_equal(result.x, whole.x)
    np.testing.assert_array_equal(result.trace, whole.trace)


# -- Compressed updates ----------------------------------------------------------------------------

COMPRESSED = (
    "compressed(topk(2))",
    "compressed(randk(0.4), local-steps(momentum(lr=0.2), steps=3))",
    "compressed(qsgd(4), feedback=false)",
)
OVER_LINKS = f"{N} lognormal(1.0) latency_s=0.1 bandwidth=50.0"


@pytest.fixture
def both_ends(monkeypatch):
    """How often a worker was trusted to have h; whenever it is, both ends have the same."""
    seen, submit = [], RemoteWorkers._submit

    def submitted(self, job):
        sure = SENT in self._kept and job.worker not in self._unaware
        if sure and (mine := self.backend.runners[job.worker]._kept.get(job.worker)) is not None:
            np.testing.assert_array_equal(mine[SENT][0], self._kept[SENT][job.worker])
            seen.append(job.worker)
        submit(self, job)

    monkeypatch.setattr(RemoteWorkers, "_submit", submitted)
    return seen


@pytest.mark.parametrize("work", COMPRESSED)
@pytest.mark.parametrize("name", ["random", "ringmaster", "async-local-sgd"])
def test_compressed_updates_under_the_virtual_clock(name, work, both_ends):
    engine = here(kills=0.05, seed=1)
    ours, plain = (run(name, e, OVER_LINKS, work=work) for e in (engine, "virtual"))
    np.testing.assert_array_equal(ours.x, plain.x)
    np.testing.assert_array_equal(ours.trace, plain.trace)
    assert ours.final == plain.final
    assert len(engine.made.killed) > 2
    assert len(both_ends) > 50 or "false" in work


@pytest.mark.parametrize("work", COMPRESSED)
@pytest.mark.parametrize("policy", ["pause", "lose", "reassign"])
@pytest.mark.parametrize("name", ["random", "ringmaster"])
def test_a_real_run_with_compressed_updates_is_resumed_and_replayed(
    name, policy, work, tmp_path, both_ends
):
    options = {"clock": "real", "pace": 1e-4, "folder": tmp_path / "run", "work": work}
    engine = here(kills=0.03, seed=3)
    run(name, engine, f"{OVER_LINKS} on_outage={policy}", **options)
    assert engine.made.killed
    result = offbeat.resume(tmp_path / "run", overrides=["stop.steps=200"])
    assert result.final["step"] == 200
    again = offbeat.replay(tmp_path / "run")
    np.testing.assert_array_equal(again.x, result.x)
    np.testing.assert_array_equal(again.trace, result.trace)
    assert again.final["bytes"] == result.final["bytes"] > 0
    assert both_ends or "false" in work


def test_a_withheld_result_takes_the_time_of_its_bytes():
    workers, clock = live("lose", work="compressed(topk(2))")
    workers._byte_s = 0.5
    workers.take(0, workers.task.initial(0), 0)
    ((serial, job),) = workers._sent.items()
    (answer,) = Runner(workers.task, workers.work).compute(
        [JobRequest(serial, 0, 0, 0, 1, 0, job.x, None)]
    )
    assert happens(workers, answer) == []
    due_s = 1.0 + 0.5 * len(answer.payload)
    for clock[0], come in ((due_s - 0.01, []), (due_s + 0.01, ["Job"])):
        assert happens(workers) == come
    assert (job.end_s, job.time_s) == (1.0, clock[0])


# -- Outages, and processes that die in them -------------------------------------------------------


class Scripted(ComputeBackend):
    """Says what a test has it say."""

    def __init__(self):
        self.events = []

    def submit(self, order):
        pass

    def collect(self, timeout_s):
        events, self.events = self.events, []
        return events

    def close(self):
        pass


def live(policy, *outages, work="gradient", n=1):
    """Live workers, and the clock ``[seconds]`` they read."""
    task, clock = quadratic(5, workers=n), [0.0]
    spans = [offbeat.Outage(worker=0, from_s=begin, to_s=end) for begin, end in outages]
    fleet = offbeat.Fleet(workers=n, outages=spans, on_outage=policy)
    parts = task, fleet, fleet.timing(0, 0), WORK.parse(work), task.initial(0)
    workers = LiveWorkers(*parts, Scripted())
    workers.clock_s = lambda: clock[0]
    return workers, clock


def happens(workers, *events):
    """What the run is told when its backend says ``events``: kinds, without notes."""
    workers.backend.events += events
    told = []
    while (event := workers.pop(np.inf)) is not None or workers._came:
        told.append(type(event).__name__)
    return [name for name in told if name not in ("TraceNote", "NoneType")]


def test_a_worker_is_back_when_its_outage_is_over_and_its_process_is_there():
    workers, clock = live("lose", (1.0, 2.0), (5.0, 6.0), (7.0, 8.0))
    workers.take(0, workers.task.initial(0), 0)
    gone, back = Gone(0, "the test killed it"), Back(0)
    assert happens(workers, gone) == ["Left"]
    for clock[0] in (1.5, 2.5):
        assert happens(workers) == []
    assert happens(workers, back) == ["Joined"]
    clock[0] = 5.5
    assert happens(workers) == ["Left"]
    assert happens(workers, gone) == []
    assert happens(workers, back) == []
    clock[0] = 6.5
    assert happens(workers) == ["Joined"]
    assert happens(workers, gone, back, gone) == ["Left"]
    assert happens(workers, back, gone) == []
    assert happens(workers, back) == ["Joined"]
    assert workers.restarts == 5


def test_a_run_in_which_nothing_can_happen_any_more_is_idle():
    workers, clock = live("pause", (0.5, None))
    workers.take(0, workers.task.initial(0), 0)
    assert happens(workers) == []
    assert not workers.idle()  # an answer is awaited
    clock[0] = 9.0
    assert happens(workers, JobResult(0, 1.0, np.zeros(5), {}, 0.1)) == []
    assert workers.idle()


def test_jobs_that_were_taken_back_leave_nothing():
    workers, _ = live("lose", work="local-steps(momentum(lr=0.2), steps=3)")
    for _ in range(3):
        workers.take(0, workers.task.initial(0), 0)
    workers._hear(Failed(0, "no traceback"))
    assert workers.cancel(0) == 3
    workers.take(0, workers.task.initial(0), 0)
    assert workers._missing == []
    assert workers._failures == {}


class Leaving(HereCrew):
    """The process of worker 3 is gone soon, and for good."""

    def collect(self, timeout_s):
        if not self.killed and 40 in self.pending:
            self.killed, self.away = [3], [3]
            self.pending = {s: o for s, o in self.pending.items() if o.worker != 3}
            return [Gone(3, "the test killed it")]
        self.away, away = [], self.away
        events = super().collect(timeout_s)
        self.away = away
        return events


@ENGINES.register("leaving")
def leaving() -> Here:
    """For tests: a process is gone soon, and for good."""
    return Here(Leaving)


@pytest.mark.parametrize("policy", ["pause", "lose", "reassign"])
def test_a_run_that_ended_without_a_process_is_resumed_with_it(policy, tmp_path):
    options = {"clock": "real", "pace": 1e-4, "folder": tmp_path / "run"}
    fleet = f"{N} 1.0 on_outage={policy}"
    first = run("pure", ENGINES["leaving"](), fleet, steps=200, **options)
    assert 3 not in first.trace[100:, 1]
    result = offbeat.resume(tmp_path / "run", engine="here", overrides=["stop.steps=400"])
    assert 3 in result.trace[200:, 1]
    np.testing.assert_array_equal(offbeat.replay(tmp_path / "run").x, result.x)
