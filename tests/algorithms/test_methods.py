"""One table of all server methods: what each must do, whatever it is; then each one's own facts."""

import copy

import numpy as np
import pytest
import reference
from servers import METHODS, WORKS, N, make

import offbeat
from offbeat.algorithms.gossip import Gossip
from offbeat.algorithms.server import (
    ALGORITHMS,
    delay_adaptive,
    fedasync,
    fedbuff,
    pure,
    random,
    rennala,
    rescaled,
    ringleader,
    ringmaster,
)
from offbeat.algorithms.server.method import Clip
from offbeat.runtime.base import trees
from offbeat.runtime.run.records import column
from offbeat.workers.tasks import Quadratic, quadratic

ONE_IN_ONE_OUT = {*METHODS} - {
    *("shuffle-once", "minibatch", "random-reshuffling", "shuffle-once-sgd", "sgd"),
    *("local-sgd", "diloco", "delayed-nesterov", "look-ahead", "decoupled-diloco"),
    *("streaming-diloco", "eager-diloco", "heloco", "muloco"),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def run(task, name, fleet, **options):
    return offbeat.run(task, make(name), fleet, work=WORKS.get(name, "gradient"), **options)


def applied(trace):
    """Rows of a trace whose arrival made a step."""
    step = column(trace, "step")
    return trace[:-1][np.diff(step) > 0]


def test_the_table_is_complete():
    servers = {name for name in ALGORITHMS if not isinstance(ALGORITHMS[name](), Gossip)}
    assert set(METHODS) == servers


@EVERY
def test_converges_where_workers_are_alike(name):
    task = Quadratic(np.tile(np.arange(5.0), (N, 1)))
    result = run(task, name, f"{N} lognormal(0.5)", stop={"steps": 3000})
    assert result.reason == "steps"
    assert result.final["loss"] < 1e-12


@EVERY
def test_is_repeatable_and_leaves_the_method_alone(name):
    task, method = quadratic(5, workers=N, noise=0.3), make(name)
    before = copy.deepcopy(trees.dump(method))
    runs = [
        offbeat.run(
            task,
            method,
            f"{N} exponential",
            work=WORKS.get(name, "gradient"),
            stop={"steps": 200},
            seed=s,
        )
        for s in (5, 5, 6)
    ]
    assert trees.dump(method) == before
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    np.testing.assert_array_equal(runs[0].trace, runs[1].trace)
    assert not np.array_equal(runs[0].trace, runs[2].trace)


@EVERY
def test_evaluating_does_not_disturb(name):
    task = quadratic(5, workers=N, noise=0.3)
    often, rarely = (
        run(task, name, f"{N} exponential", stop={"steps": 200}, evaluate=evaluate)
        for evaluate in ({"steps": 1, "seconds": 0.37}, {"steps": 200})
    )
    np.testing.assert_array_equal(often.x, rarely.x)
    assert len(often.metrics) > 200


@EVERY
def test_resumes_and_replays_to_the_same_bits(name, tmp_path):
    """Cut at arbitrary points, resumed, replayed: one trajectory."""
    task = quadratic(5, workers=N, noise=0.3, seed=2)
    options = {"fleet": f"{N} lognormal(1.0)", "evaluate": {"steps": 13}, "seed": 4}
    whole = run(task, name, stop={"steps": 150}, folder=tmp_path / "a", **options)
    run(task, name, stop={"steps": 41}, folder=tmp_path / "b", **options)
    for steps in (42, 97, 150):
        again = offbeat.resume(tmp_path / "b", overrides=[f"stop.steps={steps}"])
    np.testing.assert_array_equal(whole.x, again.x)
    for file in ("metrics.jsonl", "trace.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert whole.final == again.final
    np.testing.assert_array_equal(whole.histogram, again.histogram)
    np.testing.assert_array_equal(whole.x, offbeat.replay(tmp_path / "b").x)


@EVERY
@pytest.mark.parametrize("on_outage", ["pause", "lose", "reassign"])
def test_survives_outages(name, on_outage, tmp_path):
    task = quadratic(5, workers=N)
    fleet = offbeat.Fleet(
        workers=N,
        speeds="1..3",
        on_outage=on_outage,
        outages=[
            offbeat.Outage(worker=0, from_s=20.5, to_s=90.0),
            offbeat.Outage(worker=3, from_s=30.5, to_s=33.0),
            offbeat.Outage(worker=5, from_s=40.0, to_s=200.0),
        ],
    )
    result = run(task, name, fleet, stop={"seconds": 600}, folder=tmp_path / "r")
    assert result.reason == "seconds"
    late = result.trace[column(result.trace, "time_s") > 400]
    assert set(column(late, "worker")) == set(range(N))  # everybody works again
    away = result.trace[column(result.trace, "worker") == 5]
    if on_outage != "pause":
        start = column(away, "start_s")
        assert not ((start >= 40.0) & (start < 200.0)).any()
        assert [row["event"] for row in result.events].count("left") == 3
    if name in ONE_IN_ONE_OUT:
        assert result.final["outstanding"] == N
    lost = sum(result.facts[key] for key in ("lost", "reassigned"))
    if name not in ("sgd", "shuffle-once-sgd", "random-reshuffling"):  # few jobs at a time
        assert (lost > 0) == (on_outage != "pause")
    np.testing.assert_array_equal(result.x, offbeat.replay(tmp_path / "r").x)


def test_delay_adaptive_is_pure_where_delays_are_small_and_scales_where_not():
    task = quadratic(5, workers=N)
    runs = [
        offbeat.run(task, method, f"{N} exponential", stop={"steps": 300})
        for method in (pure(lr=0.05), delay_adaptive(lr=0.05, concurrency=10**6))
    ]
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    x, models = task.initial(0), [task.initial(0)]
    adaptive = offbeat.run(task, delay_adaptive(lr=0.05), f"{N} 1..20", stop={"steps": 100})
    for row in adaptive.trace:
        _, worker, number, read, step = row[:5].tolist()
        g = reference.one_by_one(task)(models[int(read)], int(worker), int(number))
        x = x - 0.05 * min(1.0, N / max(step - read, 1)) * g
        models.append(x)
    assert adaptive.final["staleness_max"] > N  # the rule was used
    np.testing.assert_allclose(adaptive.x, x, rtol=1e-12)


def test_rennala_steps_with_the_mean_of_fresh_gradients():
    task, batch = quadratic(5, workers=N, noise=0.5), 5
    result = offbeat.run(task, rennala(lr=0.1, batch=batch), f"{N} exponential", stop={"steps": 40})
    fresh = result.trace[column(result.trace, "read_step") == column(result.trace, "step")]
    assert len(fresh) < len(result.trace)  # some came late, and were ignored
    assert len(fresh) == 40 * batch
    x = task.initial(0)
    for rows in fresh.reshape(40, batch, -1):
        gradients = [reference.one_by_one(task)(x, int(r[1]), int(r[2])) for r in rows]
        x = x - 0.1 * np.mean(gradients, axis=0)
    np.testing.assert_allclose(result.x, x, rtol=1e-12)


def test_ringmaster_applies_nothing_staler_than_its_threshold():
    task = quadratic(5, workers=N)
    late = offbeat.run(task, ringmaster(threshold=3), f"{N} 1..8", stop={"steps": 300})
    rows = applied(late.trace)
    taus = column(rows, "step") - column(rows, "read_step")
    assert taus.max() == 2
    assert late.final["staleness_max"] >= 3  # such gradients came, and were discarded
    never = offbeat.run(task, ringmaster(threshold=10**6), f"{N} 1..8", stop={"steps": 300})
    everything = offbeat.run(task, pure(), f"{N} 1..8", stop={"steps": 300})
    np.testing.assert_array_equal(never.x, everything.x)


def test_ringmaster_can_stop_stale_work():
    task = quadratic(5, workers=N)
    method = ringmaster(threshold=3, stop_stale=True)
    result = offbeat.run(task, method, f"{N} 1..8", stop={"steps": 300})
    assert result.facts["cancelled"] > 0
    assert result.final["staleness_max"] == 2  # nothing stale arrives any more
    assert len(result.outstanding) == N


def test_ringmaster_raises_the_floor_where_workers_differ():
    """R = 5 on the benchmark quadratic: 0.58 where pure asynchronous SGD leaves 0.153."""
    task = quadratic(5, workers=10, seed=123)
    result = offbeat.run(
        task, ringmaster(lr=2**-7, threshold=5), "10 1..10", stop={"steps": 20000},
        evaluate={"steps": 7},
    )  # fmt: skip
    error = result.column("distance2")
    assert error[len(error) // 2 :].mean() == pytest.approx(0.58, rel=0.05)


def test_rescaled_has_the_right_objective_at_the_pace_of_pure():
    """0.153 -> 0.00036 on the benchmark quadratic at gamma 2^-7, at 2.93 gradients a second."""
    task = quadratic(5, workers=10, seed=123)
    result = offbeat.run(
        task, rescaled(lr=2**-7), "10 1..10", stop={"steps": 20000}, evaluate={"steps": 7}
    )
    error = result.column("distance2")
    assert error[len(error) // 2 :].mean() == pytest.approx(0.00036, rel=0.1)
    assert 20000 / result.final["time_s"] == pytest.approx(2.93, rel=0.01)


def test_ringleader_gives_every_worker_one_step_a_round():
    task = quadratic(5, workers=N)
    result = offbeat.run(task, ringleader(lr=0.05), f"{N} 1..8", stop={"steps": 20 * N + 1})
    rounds = column(applied(result.trace), "worker")[: 20 * N].reshape(20, N)
    assert all(sorted(one) == list(range(N)) for one in rounds.tolist())
    assert result.final["gradients"] > 20 * N + 1  # surplus gradients came, and were kept
    taus = column(result.trace, "step") - column(result.trace, "read_step")
    assert taus.max() <= 2 * N - 2


def test_ringleader_has_no_floor_without_noise():
    task = quadratic(5, workers=N)
    result = offbeat.run(task, ringleader(lr=0.03), f"{N} 1..8", stop={"steps": 3000})
    assert result.final["distance2"] < 1e-20


def test_fedbuff_is_random_with_a_buffer_of_one_and_averages_otherwise():
    task = quadratic(5, workers=N)
    one, other = (
        offbeat.run(task, method, f"{N} 1..8", stop={"steps": 200})
        for method in (fedbuff(lr=0.05, buffer=1, power=0.0), random(lr=0.05))
    )
    np.testing.assert_array_equal(one.x, other.x)
    result = offbeat.run(task, fedbuff(lr=0.05, buffer=4), f"{N} 1..8", stop={"steps": 30})
    models, held = [task.initial(0)], []
    for row in result.trace:
        _, worker, number, read, step = row[:5].tolist()
        g = reference.one_by_one(task)(models[int(read)], int(worker), int(number))
        held.append(g / np.sqrt(1 + step - read))
        if len(held) == 4:
            models.append(models[-1] - 0.05 * np.mean(held, axis=0))
            held = []
    np.testing.assert_allclose(result.x, models[-1], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"weight": "constant"}, lambda tau: 1.0),
        ({"weight": "polynomial", "a": 0.7}, lambda tau: (1 + tau) ** -0.7),
        ({"weight": "hinge", "a": 2.0, "b": 3}, lambda tau: 1 / (2 * max(tau - 3, 0) + 1)),
    ],
)
def test_fedasync_weights(options, weight):
    task = quadratic(5, workers=N)
    result = offbeat.run(task, fedasync(lr=0.05, **options), f"{N} 1..8", stop={"steps": 60})
    models = [task.initial(0)]
    for row in result.trace:
        _, worker, number, read, step = row[:5].tolist()
        g = reference.one_by_one(task)(models[int(read)], int(worker), int(number))
        models.append(models[-1] - 0.05 * weight(step - read) * g)
    np.testing.assert_allclose(result.x, models[-1], rtol=1e-12)


def test_clip_bounds_the_norm_and_keeps_the_direction():
    g = np.array([3.0, 4.0])
    np.testing.assert_allclose(Clip(1.0)(None, None, g), g / 5)  # type: ignore[arg-type]
    np.testing.assert_array_equal(Clip(5.0)(None, None, g), g)  # type: ignore[arg-type]


def test_a_method_cannot_change_the_model_in_place():
    class Careless(offbeat.algorithms.server.Algorithm):
        def arrive(self, server, update):
            server.x -= 0.1 * update.payload

    with pytest.raises(offbeat.ConfigError, match=r"sets server.x, .* server.apply\(delta\) takes"):
        offbeat.run(quadratic(5, workers=2), Careless(), "2 1.0", stop={"steps": 3})


@pytest.mark.parametrize("on_outage", ["lose", "reassign"])
def test_outages_neither_leak_jobs_nor_lose_concurrency(on_outage):
    """Absent workers are not restarted again and again; a returning one restores all it lost."""
    task = quadratic(5, workers=6)
    for to_s in (60.0, None):
        fleet = offbeat.Fleet(
            workers=6, speeds="1..3", on_outage=on_outage,
            outages=[offbeat.Outage(worker=1, from_s=20.0, to_s=to_s)],
        )  # fmt: skip
        for method in (ringmaster(threshold=4, stop_stale=True), pure(), random(), ringleader()):
            result = offbeat.run(task, method, fleet, stop={"seconds": 400})
            gone = 0 if to_s else result.facts["lost"]
            assert result.final["outstanding"] == 6 - gone
            assert (result.facts["lost"] > 0) <= (on_outage == "lose")


def test_every_lost_job_of_a_queue_is_made_up_for():
    fleet = offbeat.Fleet(
        workers=3, speeds=[1.0, 1.0, 200.0], on_outage="lose",
        outages=[offbeat.Outage(worker=2, from_s=30.0, to_s=40.0)],
    )  # fmt: skip
    result = offbeat.run(quadratic(5, workers=3), random(), fleet, stop={"seconds": 300})
    assert result.facts["lost"] > 1
    assert result.final["outstanding"] == 3


def test_waiting_for_more_than_there_are_is_refused():
    for text in ("pure(wait=9)", "minibatch(batch=9)", "random-reshuffling(batch=9)"):
        with pytest.raises(offbeat.ConfigError, match="waits for 9 results, but there are 8"):
            offbeat.run("quadratic(5)", text, "8 1.0")


class Momentum(offbeat.algorithms.server.Algorithm):
    """A user's method: state made at the start, numpy integers as workers."""

    def start(self, server):
        self.m, self.count, self.pair = np.zeros_like(server.x), np.float32(0), {(1, 2): "x"}
        super().start(server)

    def arrive(self, server, update):
        self.m = 0.5 * self.m + update.payload
        self.count = self.count + np.float32(0.1)
        server.apply(0.01 * self.m * self.count)
        server.assign(server.rng("mine", server.step).integers(server.n))


def test_a_users_method_resumes_to_the_same_bits(tmp_path):
    task = quadratic(5, workers=4)
    whole = offbeat.run(task, Momentum(), "4 exponential", stop={"steps": 90})
    offbeat.run(task, Momentum(), "4 exponential", stop={"steps": 50}, folder=tmp_path / "r")
    cut = offbeat.resume(
        tmp_path / "r", task=task, algorithm=Momentum(), overrides=["stop.steps=90"]
    )
    np.testing.assert_array_equal(whole.x, cut.x)


def test_state_that_cannot_be_read_back_is_refused_at_the_first_checkpoint(tmp_path):
    class Growing(Momentum):
        def start(self, server):
            super().start(server)
            self.parts = [Clip(1.0)]

    with pytest.raises(
        offbeat.ConfigError, match=r"algorithm\.parts holds an object that was made"
    ):
        offbeat.run(
            quadratic(5, workers=4), Growing(), "4 1.0", stop={"steps": 9}, folder=tmp_path / "r"
        )


def test_a_worker_that_is_none_is_refused():
    class Lost(offbeat.algorithms.server.Algorithm):
        def arrive(self, server, update):
            server.assign(-1)

    with pytest.raises(offbeat.ConfigError, match=r"worker -1; they are 0\.\.3"):
        offbeat.run(quadratic(5, workers=4), Lost(), "4 1.0", stop={"steps": 9})
