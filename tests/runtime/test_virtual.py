"""The virtual engine: laziness, stop rules, non-finite gradients, memory."""

import tracemalloc

import numpy as np
import pytest
from matplotlib import image

import offbeat
from offbeat import ConfigError, Diverged, Stop
from offbeat.algorithms.server import Algorithm
from offbeat.runtime.compute.jobs import Job
from offbeat.runtime.run.records import column
from offbeat.runtime.server.virtual import ALONE_BYTES
from offbeat.workers.tasks import logistic, mlp, quadratic


class OneAtATime:
    """A task whose batches are computed row by row."""

    def __init__(self, task):
        self.task, self.spec = task, None
        self.workers, self.dim = task.workers, task.dim
        self.initial, self.evaluate = task.initial, task.evaluate

    def gradient(self, x, worker, draw):
        rows = [
            self.task.gradient(x[j : j + 1], worker[j : j + 1], draw[j : j + 1])
            for j in range(len(x))
        ]
        losses, gradients = zip(*rows, strict=True)
        return np.concatenate(losses), np.concatenate(gradients)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("speeds", ["lognormal(0.3)", "exponential", "1..10"])
@pytest.mark.parametrize("kind", [logistic, mlp])
def test_lazy_batches_keep_every_bit(kind, speeds, dtype):
    task = kind("digits", workers=20, dtype=dtype, batch=8)
    sizes = []
    once = task.gradient
    task.gradient = lambda x, w, d: sizes.append(len(x)) or once(x, w, d)
    fleet = offbeat.Fleet(workers=20, speeds=speeds)
    batched = offbeat.run(task, "pure", fleet, stop={"steps": 400})
    assert max(sizes) >= 15  # they were batches
    task.gradient = once
    single = offbeat.run(OneAtATime(task), "pure", fleet, stop={"steps": 400})
    np.testing.assert_array_equal(batched.x, single.x)
    np.testing.assert_array_equal(batched.trace, single.trace)
    assert batched.final == single.final


def test_large_models_are_computed_when_due():
    task = quadratic(ALONE_BYTES // 8, workers=3)
    sizes, once = [], task.gradient
    task.gradient = lambda x, w, d: sizes.append(len(x)) or once(x, w, d)
    result = offbeat.run(task, "pure", "3 1..3", stop={"steps": 10}, evaluate={"steps": 10})
    assert sizes == [1] * 10
    assert result.final["loss"] < result.metrics[0]["loss"]


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ({"steps": 77}, "steps"),
        ({"gradients": 77}, "gradients"),
        ({"seconds": 77.0}, "seconds"),
        ({"loss": 0.5, "steps": 10**6}, "target loss"),
        ({"wall_s": 0.05}, "wall time"),
    ],
)
def test_stop_rules(stop, reason):
    task = quadratic(3, workers=4, seed=2)
    result = offbeat.run(task, "minibatch(lr=0.01)", "4 1..4", stop=stop, evaluate={"steps": 5})
    assert result.reason == reason
    if reason == "seconds":
        assert result.final["time_s"] == 77.0
        assert column(result.trace, "time_s").max() < 77.0
    elif reason in stop:
        assert result.final["step"] == 77
    elif reason == "target loss":
        assert result.metrics[-1]["loss"] <= 0.5 < result.metrics[-2]["loss"]


def test_a_target_needs_a_bound():
    with pytest.raises(ConfigError, match="may never be reached"):
        Stop(loss=0.1)


def test_evaluations_are_at_their_steps_and_seconds():
    task = quadratic(3, workers=4)
    by_step = offbeat.run(task, "pure", "4 1..4", stop={"steps": 100}, evaluate={"steps": 30})
    assert [row["step"] for row in by_step.metrics] == [0, 30, 60, 90]
    by_time = offbeat.run(task, "pure", "4 1..4", stop={"seconds": 10}, evaluate={"seconds": 2.5})
    assert [row["time_s"] for row in by_time.metrics] == [0, 2.5, 5, 7.5, 10]
    before = column(by_time.trace, "time_s")
    assert [row["gradients"] for row in by_time.metrics] == [
        int((before < t).sum()) for t in (0, 2.5, 5, 7.5, 10)
    ]


class Poisoned:
    """Gradients that stop being finite for one worker's later jobs."""

    spec = None

    def __init__(self, value):
        self.inner, self.value = quadratic(3, workers=4), value
        self.workers, self.dim = 4, 3
        self.initial, self.evaluate = self.inner.initial, self.inner.evaluate

    def gradient(self, x, worker, draw):
        losses, gradients = self.inner.gradient(x, worker, draw)
        gradients[(worker == 2) & (draw == 5), 1] = self.value
        return losses, gradients


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_at_its_arrival(value, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=r"worker 2's job 5 .* at step \d+ .*smaller step") as caught:
        offbeat.run(Poisoned(value), "pure", "4 1..4", stop={"steps": 100}, folder=folder)
    assert caught.value.exit_code == 7
    task = Poisoned(0.0)
    clean = offbeat.run(task, "pure", "4 1..4", stop={"steps": 100})
    at = np.flatnonzero((clean.trace[:, 1] == 2) & (clean.trace[:, 2] == 5))[0]
    assert f"at step {int(clean.trace[at, 4])} " in str(caught.value)
    # The checkpoint before it is kept and good.
    again = offbeat.resume(folder, task=task)
    np.testing.assert_array_equal(again.x, clean.x)


def test_large_finite_gradients_are_not_mistaken_for_infinite_ones():
    """Their squares overflow; they do not."""
    result = offbeat.run(Poisoned(1e200), "pure(lr=1e-300)", "4 1..4", stop={"steps": 100})
    assert result.reason == "steps"
    assert result.x[1] < 0


def test_memory_is_linear_in_jobs_in_flight():
    """A slow worker's result does not keep its whole batch alive, nor old models."""
    n, d = 200, 1000
    task = quadratic(d, workers=n)
    fleet = offbeat.Fleet(workers=n, speeds="lognormal(2.0, per=worker)")
    tracemalloc.start()
    try:
        offbeat.run(
            task, "pure", fleet, stop={"steps": 6000}, evaluate={"steps": 6000},
            record={"trace": False},
        )  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * (n * d * 8)  # a model, a gradient, and room for a batch in the making


def test_jobs_are_small():
    assert not hasattr(Job(0, 0, 0, np.zeros(1), 0, 0.0), "__dict__")


class Greedy(Algorithm):
    """Keeps two jobs at each worker and cancels one worker's jobs now and then."""

    def __init__(self):
        self.count = 0

    def start(self, server):
        for worker in range(server.n):
            server.assign(worker)
            server.assign(worker)

    def arrive(self, server, update):
        server.apply(0.01 * update.payload)
        self.count += 1
        if self.count % 10 == 0:
            server.cancel(1)
            server.assign(1)
            server.assign(1)
            if update.worker == 1:
                return
        server.assign(update.worker)


def test_cancelled_jobs_never_arrive_and_the_next_starts_at_once(tmp_path):
    task = quadratic(3, workers=3)
    result = offbeat.run(task, Greedy(), "3 1..3", stop={"steps": 200}, evaluate={"steps": 1})
    assert result.facts["cancelled"] > 10
    assert {row["outstanding"] for row in result.metrics} == {6}
    mine = result.trace[column(result.trace, "worker") == 1]
    start, end = column(mine, "start_s"), column(mine, "end_s")
    assert (start[1:] >= end[:-1]).all()
    assert (np.diff(column(mine, "job")) >= 1).all()
    assert (np.diff(column(mine, "job")) > 1).any()
    np.testing.assert_allclose(end - start, 2.0)


class Hoarding(Algorithm):
    """From 3 s on, worker 0 is given two jobs at a time; nobody else any."""

    def arrive(self, server, update):
        server.apply(0.1 * update.payload)
        if update.time_s < 3 and update.worker == 0:
            server.assign(0)
        elif not server.outstanding:
            server.assign(0)
            server.assign(0)


def test_who_comes_back_to_no_job_gets_the_next_that_would_wait(tmp_path):
    fleet = offbeat.Fleet(
        workers=2, on_outage="lose", outages=[offbeat.Outage(worker=1, from_s=1.5, to_s=2.5)]
    )
    task, method = quadratic(3, workers=2), Hoarding()
    result = offbeat.run(task, method, fleet, stop={"steps": 9}, folder=tmp_path / "r")
    rows = [(row[0], int(row[1])) for row in result.trace]
    # At 3 s the second of two jobs is for worker 1, which then has had its turn.
    assert rows[:6] == [(1.0, 0), (1.0, 1), (2.0, 0), (3.0, 0), (4.0, 0), (4.0, 1)]
    assert {worker for _, worker in rows[6:]} == {0}
    np.testing.assert_array_equal(
        result.x, offbeat.replay(tmp_path / "r", task=task, algorithm=Hoarding()).x
    )


def test_what_was_on_its_way_when_a_run_ended_is_not_lost_in_its_replay(tmp_path):
    """It is not in the trace, as little as what the worker that left had not finished."""
    outages = [offbeat.Outage(worker=0, from_s=6.11, to_s=26.0)]
    fleet = offbeat.Fleet(
        workers=3, speeds=0.1, jitter_s=1.0, outages=outages, on_outage="reassign"
    )
    parts = "quadratic(5, noise=0.3)", "pure(lr=0.05)", fleet
    result = offbeat.run(*parts, stop={"seconds": 8.343}, seed=40, folder=tmp_path / "run")
    again = offbeat.replay(tmp_path / "run")
    assert again.events == result.events
    assert result.events[0]["jobs"] == []
    np.testing.assert_array_equal(again.trace, result.trace)
    np.testing.assert_array_equal(again.x, result.x)


def test_results_are_shown_in_a_line_and_compared_in_a_picture(tmp_path):
    one, other = (
        offbeat.run("quadratic(5)", method, "4 1..4", stop={"steps": 40})
        for method in ("pure", "shuffled")
    )
    assert repr(one) == f"<Result {one}>"
    assert len(repr(one)) < 300
    alone = image.imread(one.plot(tmp_path / "one.png"))
    both = image.imread(one.plot(str(tmp_path / "both.png"), other))
    assert (alone != both).any()


def test_several_methods_at_once_are_refused_with_what_to_do():
    with pytest.raises(offbeat.ConfigError, match=r"one algorithm, not a list.*results\[0\].plot"):
        offbeat.run("quadratic(5)", ["pure", "shuffled"])


def test_what_offbeat_offers_is_listed():
    assert set(offbeat.__all__) == set(dir(offbeat))
