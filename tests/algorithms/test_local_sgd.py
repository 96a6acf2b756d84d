"""Asynchronous Local-SGD: windows and DyLU against published traces, outer rules by identities."""

import math
from itertools import pairwise

import numpy as np
import pytest
import reference

import offbeat
from offbeat.algorithms.compression.contract import made
from offbeat.algorithms.server import (
    async_local_sgd,
    decoupled_diloco,
    delayed_nesterov,
    diloco,
    eager_diloco,
    halos,
    local_sgd,
    look_ahead,
    streaming_diloco,
)
from offbeat.algorithms.server.decoupled import Fragments
from offbeat.algorithms.server.heloco import Align, aligned
from offbeat.algorithms.server.local_sgd import LocalUpdates, ShardSampling, Windows
from offbeat.algorithms.server.method import Buffer, DiscardStale, Method, StalenessWeight, StepSize
from offbeat.algorithms.server.muloco import ErrorFeedback
from offbeat.algorithms.server.outer import Adam, Compensate, DelayedNesterov, Momentum
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.run.records import Records, column
from offbeat.runtime.server.loop import ServerLoop
from offbeat.runtime.server.virtual import VirtualWorkers
from offbeat.workers.speeds import Changing, Law
from offbeat.workers.tasks import Quadratic, logistic, mlp, quadratic
from offbeat.workers.work import WORK

PROFILE = [0.58, 0.75, 1.51, 3.33]  # seconds a local step: the authors' four devices
FLEET = offbeat.Fleet(workers=4, speeds=PROFILE)
H20 = "local-steps(sgd(lr=0.1), steps=20)"


class Server:
    """As much of the facade as rules look at."""

    def __init__(self, x, step=0, n=4):
        self.x, self.step, self.n = x, step, n


class Update:
    def __init__(self, x=None, step=0):
        self.x, self.step = x, step


def moved(rules, gs, x=None):
    """Where updates ``gs`` take x, all of them fresh."""
    server = Server(np.zeros_like(gs[0]) if x is None else x)
    for g in gs:
        for rule in rules:
            g = rule(server, Update(server.x, server.step), g)
            if g is None:
                break
        else:
            server.x = server.x - g
            server.step += 1
    return server.x


def draws(count, d=6, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, d)))


# -- The scheduler ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "dylu", "first"),
    [
        (20, False, [
            (11.60, 0, 0), (15.00, 1, 1), (23.20, 0, 1), (30.00, 1, 1), (30.20, 2, 4),
            (34.80, 0, 2), (45.20, 1, 1), (46.40, 0, 1), (58.00, 0, 0), (60.20, 1, 2),
            (60.40, 2, 5), (66.60, 3, 11), (69.60, 0, 3), (75.40, 1, 2),
        ]),
        (20, True, [
            (9.99, 3, 0), (10.57, 2, 1), (11.25, 1, 2), (11.60, 0, 3), (19.98, 3, 3),
            (21.14, 2, 3),
        ]),
        (50, True, [
            (26.64, 3, 0), (28.50, 1, 1), (28.69, 2, 2), (29.00, 0, 3), (53.28, 3, 3),
        ]),
    ],
)  # fmt: skip
def test_published_traces_of_the_scheduler(steps, dylu, first):
    """(time, worker, staleness) of the released scheduler, grace 0.5 s."""
    method = async_local_sgd(
        grace_s=0.5, charged=False, dylu=dylu, seconds=PROFILE if dylu else None
    )
    work = f"local-steps(sgd(lr=0.01), steps={steps})"
    result = offbeat.run(
        quadratic(3, workers=4), method, FLEET, work=work, stop={"steps": len(first)}
    )
    tau = column(result.trace, "step") - column(result.trace, "read_step")
    rows = zip(column(result.trace, "time_s"), column(result.trace, "worker"), tau, strict=True)
    assert [(round(t, 2), int(w), int(s)) for t, w, s in rows] == first


@pytest.mark.parametrize(
    ("dylu", "mean", "most", "shares"),
    [(False, 2.75, 14, [0.43, 0.33, 0.165, 0.075]), (True, 2.82, 4, [0.23, 0.24, 0.26, 0.27])],
)
def test_staleness_and_throughput_of_the_published_profile(dylu, mean, most, shares):
    """DyLU leaves the mean staleness and cuts its maximum from 14 to 4."""
    method = async_local_sgd(
        lr=0.1, outer="sgd", grace_s=0.5, charged=False, dylu=dylu,
        seconds=PROFILE if dylu else None,
    )  # fmt: skip
    result = offbeat.run(quadratic(3, workers=4), method, FLEET, work=H20, stop={"steps": 4000})
    assert result.final["staleness_mean"] == pytest.approx(mean, abs=0.006)
    assert result.final["staleness_max"] == most
    counts = np.bincount(column(result.trace, "worker").astype(int), minlength=4)
    np.testing.assert_allclose(counts / 4000, shares, atol=0.005)
    if dylu:  # but for rounding down to whole steps, all take as long
        spans = column(result.trace, "end_s") - column(result.trace, "start_s")
        assert spans.max() - spans.min() <= PROFILE[3]
    else:
        rate = result.final["gradients"] / result.final["time_s"]
        assert rate == pytest.approx(sum(1 / s for s in PROFILE), rel=0.01)
        assert rate == pytest.approx(4.01, abs=0.01)


def profiled(steps, grace_s, dylu=True, updates=4000):
    """A run of the published devices, with workers that restart at a window's last result."""
    method = async_local_sgd(
        lr=0.1, outer="sgd", grace_s=grace_s, charged=False, dylu=dylu,
        seconds=PROFILE if dylu else None,
    )  # fmt: skip
    work = f"local-steps(sgd(lr=0.01), steps={steps})"
    return offbeat.run(quadratic(3, workers=4), method, FLEET, work=work, stop={"steps": updates})


def test_staleness_of_each_published_device_and_of_more_steps():
    """The slower, the staler; with DyLU and 50 steps a mean of 2.33 and at most 4."""
    trace = profiled(20, 0.5, dylu=False).trace
    tau, worker = column(trace, "step") - column(trace, "read_step"), column(trace, "worker")
    means = [tau[worker == w].mean() for w in range(4)]
    np.testing.assert_allclose(means, [1.2, 1.5, 5.0, 12.3], atol=0.06)
    final = profiled(50, 0.5).final
    assert final["staleness_mean"] == pytest.approx(2.33, abs=0.006)
    assert final["staleness_max"] == 4


@pytest.mark.parametrize(("steps", "spread"), [(20, 1.61), (50, 2.36)])
def test_a_window_as_long_as_the_spread_of_dylus_rounds_has_everybody_in_it(steps, spread):
    """Four updates of one model, in turn: a mean of 1.5 and at most 3; not so in a shorter one."""
    final = profiled(steps, spread + 0.005, updates=400).final
    assert (final["staleness_mean"], final["staleness_max"]) == (1.5, 3)
    assert profiled(steps, spread - 0.005, updates=400).final["staleness_mean"] > 2


@pytest.mark.parametrize("c", [0.0, 0.25])
def test_an_endless_window_with_a_buffer_of_all_is_diloco(c):
    """The same models at the same times, with a stateful inner optimiser."""
    task, work = logistic("digits", workers=4), "local-steps(adamw(lr=0.01), steps=5)"
    options = {"work": work, "stop": {"seconds": 500.0}}
    sync = offbeat.run(task, diloco(lr=0.5), FLEET, **options)
    buffered = async_local_sgd(lr=0.5, buffer=4, grace_s=math.inf)
    other = offbeat.run(task, buffered, FLEET, **options)
    np.testing.assert_array_equal(sync.x, other.x)
    np.testing.assert_array_equal(sync.trace, other.trace)
    assert sync.final["step"] == int(500 / (5 * 3.33))
    assert sync.final["staleness_max"] == 0
    delayed = offbeat.run(
        task, delayed_nesterov(lr=0.5, buffer=4, grace_s=math.inf), FLEET, **options
    )
    np.testing.assert_allclose(delayed.x, sync.x, rtol=1e-4, atol=1e-5)


def test_one_worker_alone_is_synchronous():
    task, fleet = logistic("digits", workers=1), "1 lognormal(0.5)"
    runs = [
        offbeat.run(task, method, fleet, work=H20, stop={"steps": 20})
        for method in (diloco(), async_local_sgd(), async_local_sgd(grace_s=3.0))
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(runs[0].x, run.x)
        np.testing.assert_array_equal(runs[0].trace, run.trace)


def test_one_worker_one_step_and_outer_sgd_is_sgd():
    task = quadratic(5, workers=1, noise=0.5)
    result = offbeat.run(
        task, local_sgd(), "1 1.0", work="local-steps(sgd(lr=0.2), steps=1)", stop={"steps": 50}
    )
    x, gradient = task.initial(0), reference.one_by_one(task)
    for t in range(50):
        x = x - 0.2 * gradient(x, 0, t)
    np.testing.assert_allclose(result.x, x, rtol=1e-12)


def test_local_sgd_averages_the_workers_models():
    task, gradient = quadratic(5, workers=3, noise=0.5), None
    result = offbeat.run(
        task, local_sgd(), "3 1..3", work="local-steps(sgd(lr=0.2), steps=7)", stop={"steps": 9}
    )
    x, gradient = task.initial(0), reference.one_by_one(task)
    for turn in range(9):
        models = []
        for worker in range(3):
            y = x
            for t in range(7 * turn, 7 * turn + 7):
                y = y - 0.2 * gradient(y, worker, t)
            models.append(y)
        x = np.mean(models, axis=0)
    np.testing.assert_allclose(result.x, x, rtol=1e-12)


@pytest.mark.parametrize("charged", [False, True])
def test_those_of_a_window_start_again_together(charged):
    """Finishing at 2.0, 2.3 and 9: the first two wait for the window's end, or as if they did."""
    fleet = offbeat.Fleet(workers=3, speeds=[1.0, 1.15, 4.5])
    method = async_local_sgd(grace_s=0.5, charged=charged)
    work = "local-steps(sgd, steps=2)"
    result = offbeat.run(quadratic(3, workers=3), method, fleet, work=work, stop={"steps": 4})
    start, read = column(result.trace, "start_s"), column(result.trace, "read_step")
    assert read[2:4].tolist() == [2, 2]  # one model, with both their updates
    np.testing.assert_allclose(start[2:4], 2.5 if charged else 2.3)
    assert result.trace[:, 1].tolist() == [0, 1, 0, 1]


def test_without_grace_every_window_has_one_result():
    result = offbeat.run(
        quadratic(3, workers=4), async_local_sgd(lr=0.1, grace_s=0.0), "4 lognormal(1.0)",
        work=H20, stop={"steps": 200},
    )  # fmt: skip
    pure = offbeat.run(
        quadratic(3, workers=4), "pure(lr=0.1)", "4 lognormal(1.0)", work=H20, stop={"steps": 200}
    )
    np.testing.assert_array_equal(result.trace, pure.trace)


# -- DyLU and shards --------------------------------------------------------------------------


class Fixed:
    def __init__(self, steps):
        self.steps = steps


@pytest.mark.parametrize(
    ("known", "steps", "expected"),
    [
        (PROFILE, 50, [50, 38, 19, 8]),
        (PROFILE, 20, [20, 15, 7, 3]),
        ([2.0] * 4, 50, [50] * 4),
        ([1.0, 1000.0], 50, [50, 1]),
    ],
)
def test_dylu_gives_slow_workers_fewer_steps(known, steps, expected):
    rule = LocalUpdates(known)
    assert [rule.steps(Fixed(steps), w) for w in range(len(known))] == expected


def test_estimated_speeds_become_the_known_ones():
    method = async_local_sgd(lr=0.1, outer="sgd", dylu=True)
    result = offbeat.run(quadratic(3, workers=4), method, FLEET, work=H20, stop={"steps": 100})
    spans = column(result.trace, "end_s") - column(result.trace, "start_s")
    worker = column(result.trace, "worker").astype(int)
    steps = np.round(spans / np.array(PROFILE)[worker]).astype(int)
    for w, expected in enumerate([20, 15, 7, 3]):
        mine = steps[worker == w]
        assert mine[0] == 20  # not heard of yet
        assert set(mine[2:].tolist()) == {expected}


def test_a_worker_that_slows_down_gets_fewer_steps_within_two_rounds():
    def segments(worker):
        yield 100.0, 1.0
        while True:
            yield 1e9, 4.0 if worker == 2 else 1.0

    law = Law(1.0, lambda means, seed: Changing(means, segments))
    result = offbeat.run(
        quadratic(3, workers=3), async_local_sgd(lr=0.1, outer="sgd", dylu=True),
        offbeat.Fleet(workers=3, speeds=law), work=H20, stop={"seconds": 500.0},
    )  # fmt: skip
    mine = result.trace[column(result.trace, "worker") == 2]
    slow = mine[column(mine, "start_s") >= 100.0]
    steps = np.round((column(slow, "end_s") - column(slow, "start_s")) / 4).astype(int)
    assert steps[0] == 20  # it was told so before it slowed down
    assert steps[1] == 8  # estimate 1 -> 2.5
    assert steps[2] == 6  # -> 3.25
    assert set(steps[4:].tolist()) == {5}


def test_shards_that_lag_are_drawn():
    rule = ShardSampling([10, 10, 10])
    np.testing.assert_array_equal(rule.weights([5, 5, 5]), [5, 5, 5])  # balanced: by size
    np.testing.assert_array_equal(rule.weights([1, 2, 3]) > 0, [False, False, True])
    np.testing.assert_array_equal(ShardSampling([9, 20, 10]).weights([1, 2, 1]) > 0, [1, 0, 0])
    np.testing.assert_array_equal(ShardSampling([0, 0]).weights([3, 1]), [3, 1])


def test_sampled_shards_are_learned_evenly_however_fast_their_workers_are():
    task = logistic("digits", workers=4)
    task.sizes = np.array([100, 200, 300, 400])
    used, once = np.zeros(4, int), task.gradient
    task.gradient = lambda x, w, d: np.add.at(used, w, 1) or once(x, w, d)
    even = async_local_sgd(lr=0.1, outer="sgd", sample_shards=True)
    offbeat.run(task, even, FLEET, work=H20, stop={"steps": 1000}, evaluate={"steps": 1000})
    share = used / task.sizes
    assert (share.max() - share.min()) * 100 <= 2 * 20 * 4  # a round or so
    used[:] = 0
    own = async_local_sgd(lr=0.1, outer="sgd")
    offbeat.run(task, own, FLEET, work=H20, stop={"steps": 1000}, evaluate={"steps": 1000})
    assert used[0] > 5 * used[3]


def test_there_can_be_more_shards_than_workers():
    """Ten shards on four workers of the published profile: all are learned alike."""
    task = logistic("digits", workers=10, partition="classes(1)")
    used, once = np.zeros(10, int), task.gradient
    task.gradient = lambda x, w, d: np.add.at(used, w, 1) or once(x, w, d)
    method = "async-local-sgd(lr=0.5, outer=sgd, sample_shards=true)"
    options = {"work": "local-steps(sgd(lr=0.1), steps=10)", "evaluate": {"gradients": 4000}}
    run = offbeat.run(task, method, FLEET, stop={"gradients": 4000}, **options)
    share = used / task.sizes
    assert (share.max() - share.min()) * task.sizes.mean() <= 2 * 10 * 4  # a round or so
    assert run.final["accuracy"] > 0.85  # of ten classes, of which a worker alone has one at a time


@pytest.mark.parametrize("steps", [40, 41])
def test_more_shards_than_workers_in_a_folder(steps, tmp_path):
    experiment = {
        "task": {"name": "quadratic", "workers": 7, "noise": 0.3},
        "algorithm": "delayed-nesterov(lr=0.1, sample_shards=true)",
        "fleet": {"workers": 3, "speeds": "1..3"}, "work": "local-steps(momentum(0.1), steps=2)",
    }  # fmt: skip
    offbeat.run(**experiment, stop={"steps": steps}, folder=tmp_path / "r")
    again = offbeat.resume(tmp_path / "r", overrides=["stop.steps=90"])
    whole = offbeat.run(**experiment, stop={"steps": 90})
    np.testing.assert_array_equal(whole.x, again.x)
    np.testing.assert_array_equal(whole.x, offbeat.replay(tmp_path / "r").x)


@pytest.mark.parametrize(
    ("method", "workers", "message"),
    [
        (
            "diloco",
            3,
            "divided among 10 workers, but the fleet has 3; for more shards than workers",
        ),
        ("diloco(sample_shards=true)", 11, "among 10 workers, but the fleet has 11"),
    ],
)
def test_shards_without_workers_are_refused(method, workers, message):
    with pytest.raises(offbeat.ConfigError, match=message):
        offbeat.run(quadratic(3, workers=10), method, f"{workers} 1.0", work=H20)


def test_what_a_worker_keeps_stays_with_it_whatever_shard_it_is_given():
    """AdamW's number of steps is that of the worker, its moments those of all its gradients."""
    steps = {w: 0 for w in range(4)}
    shards = {w: set() for w in range(4)}

    class Watched(Method):
        def arrive(self, server, update):
            steps[update.worker] += update.steps
            shards[update.worker].add(update.shard)
            super().arrive(server, update)

    plan = Windows(local=LocalUpdates(PROFILE), shards=ShardSampling())
    work, fleet = WORK.parse("local-steps(adamw(lr=0.01), steps=20)"), FLEET
    task = logistic("digits", workers=4)
    workers = VirtualWorkers(task, fleet, fleet.timing(0, 0), work, task.initial(0))
    engine = ServerLoop(
        task, Watched(plan, [StepSize(0.1)]), workers, Records(fleet, None), seed=0,
        stop=Stop(steps=60), evaluate=Evaluate(steps=60),
    )  # fmt: skip
    engine.run()
    assert workers._kept["steps"].tolist() == [steps[w] for w in range(4)]
    assert min(len(seen) for seen in shards.values()) > 1


def test_what_a_barrier_has_heard_counts_where_the_last_job_is_lost():
    """The slow worker is gone for good at 30 s: the round's two others make its step then."""
    fleet = offbeat.Fleet(
        workers=3, speeds=[1.0, 1.0, 4.0], on_outage="lose",
        outages=[offbeat.Outage(worker=2, from_s=30.0)],
    )  # fmt: skip
    task, work = quadratic(5, workers=3), "local-steps(sgd(lr=0.2), steps=5)"
    result = offbeat.run(
        task, local_sgd(), fleet, work=work, stop={"steps": 3}, evaluate={"steps": 1}
    )
    assert result.column("time_s").tolist() == [0.0, 20.0, 30.0, 35.0]
    gradient, x = reference.one_by_one(task), task.initial(0)
    for there in ((0, 1, 2), (0, 1), (0, 1)):
        models = []
        for worker in there:
            y = x
            for _ in range(5):
                y = y - 0.2 * gradient(y, worker, 0)
            models.append(y)
        x = np.mean(models, axis=0)
    np.testing.assert_allclose(result.x, x, rtol=1e-12)


def test_schedules_follow_the_shard_whoever_works_on_it():
    """Positions of a shard's draws are 0, 1, 2, ... without gaps, over all its workers."""
    task, seen = logistic("digits", workers=4), {w: [] for w in range(4)}
    once = task.gradient

    def watched(x, w, d):
        for shard, draw in zip(w.tolist(), d.tolist(), strict=True):
            seen[shard].append(draw)
        return once(x, w, d)

    task.gradient = watched
    method = async_local_sgd(lr=0.1, sample_shards=True)
    offbeat.run(task, method, FLEET, work=H20, stop={"steps": 200}, evaluate={"steps": 200})
    for drawn in seen.values():
        assert len(set(drawn)) == len(drawn)
        assert max(drawn) - len(drawn) < 4 * 20 + 1  # but for what is in flight


# -- Outer rules ------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "times"), [(1, 1.9), (2, 1.21 * 3.8), (4, 12.1441)])
def test_momentum_at_every_update_overshoots(k, times):
    """Displacement by k like updates in turn: k (1 + b) + b^2 sum_{j<k} sum_{i<j} b^i."""
    g, beta = np.ones(3), 0.9
    exact = k * (1 + beta) + beta**2 * sum(beta**i for j in range(k) for i in range(j))
    found = -moved([Momentum(beta, nesterov=True)], [g] * k)
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    assert exact == pytest.approx(times, rel=0.01)


def test_outer_rules_are_torchs():
    import torch

    gs, x = draws(12), np.ones(6)
    makers = [
        ([StepSize(0.3)], lambda p: torch.optim.SGD(p, 0.3)),
        ([Momentum(0.8), StepSize(0.3)], lambda p: torch.optim.SGD(p, 0.3, momentum=0.8)),
        (
            [Momentum(0.8, nesterov=True), StepSize(0.3)],
            lambda p: torch.optim.SGD(p, 0.3, momentum=0.8, nesterov=True),
        ),
        ([Adam(0.8), StepSize(0.3)], lambda p: torch.optim.Adam(p, 0.3, betas=(0.8, 0.999))),
    ]
    for rules, make in makers:
        y = torch.nn.Parameter(torch.from_numpy(x.copy()))
        optimiser = make([y])
        for g in gs:
            y.grad = torch.from_numpy(g.copy())
            optimiser.step()
        np.testing.assert_allclose(moved(rules, gs, x), y.detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_delayed_nesterov_of_one_is_nesterov(c):
    gs = draws(30)
    np.testing.assert_array_equal(
        moved([DelayedNesterov(0.9, 1, c)], gs), moved([Momentum(0.9, nesterov=True)], gs)
    )


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_block_of_delayed_nesterov_is_a_nesterov_step_on_its_mean(n):
    gs = draws(10 * n)
    one = moved([DelayedNesterov(0.9, n, 0.0)], gs)
    other = moved([Buffer(n), Momentum(0.9, nesterov=True)], gs)
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("c", [0.05, 0.25])
def test_the_displacement_of_a_block_with_activated_momentum(c):
    """-(mean g + beta ((1 - c (N - 1)) m_new + c (N - 1) m_old)), which is no Nesterov step."""
    n, beta, gs = 4, 0.9, draws(12)
    rule, before = DelayedNesterov(beta, n, c), np.zeros(6)
    for first in range(0, 12, n):
        old = np.array(rule.m)
        now = before + moved([rule], gs[first : first + n])
        mean = np.mean(gs[first : first + n], axis=0)
        new = beta * old + mean
        np.testing.assert_allclose(rule.m, new, rtol=1e-12)
        step = mean + beta * ((1 - c * (n - 1)) * new + c * (n - 1) * old)
        np.testing.assert_allclose(before - now, step, rtol=1e-10)
        before = now


def test_between_flushes_delayed_nesterov_is_sgd_and_keeps_its_momentum():
    gs, rule = draws(7), DelayedNesterov(0.9, 4, 0.0)
    moved([rule], gs[:4])
    held = np.array(rule.m)
    np.testing.assert_allclose(moved([rule], gs[4:]), -sum(gs[4:]) / 4, rtol=1e-12)
    np.testing.assert_array_equal(rule.m, held)


def test_a_buffer_of_one_is_none_and_a_block_has_no_order():
    gs, rules = draws(12), lambda n: [Buffer(n), Momentum(0.9, nesterov=True), StepSize(0.5)]
    np.testing.assert_array_equal(moved(rules(1), gs), moved(rules(1)[1:], gs))
    mixed = [gs[i] for i in (2, 0, 1, 3, 7, 6, 5, 4, 9, 11, 10, 8)]
    np.testing.assert_allclose(moved(rules(4), gs), moved(rules(4), mixed), rtol=1e-12)
    np.testing.assert_array_equal(moved(rules(4), gs[:3]), np.zeros(6))


def test_no_momentum_is_sgd():
    gs = draws(9)
    np.testing.assert_array_equal(moved([Momentum(0.0, nesterov=True)], gs), moved([], gs))


def test_polynomial_and_thresholded_staleness():
    g = np.ones(3)
    for tau, factor in ((0, 1.0), (3, 0.5)):
        found = StalenessWeight(0.5)(Server(g, step=tau), Update(step=0), g)
        np.testing.assert_allclose(found, factor * g)
    assert DiscardStale(11)(Server(g, step=11), Update(step=0), g) is None
    assert DiscardStale(11)(Server(g, step=10), Update(step=0), g) is g
    method = async_local_sgd(discard=11, power=0.5)
    before, server = method.rules[-2], Server(g, step=11)
    assert method.rules[0](server, Update(step=0), g) is None
    assert before.m is None  # nothing behind it has heard of the update


def test_delay_compensation():
    g, now, given = draws(3)
    rule = Compensate(0.7)
    expected = g + 0.7 * g * g * (now - given)
    np.testing.assert_allclose(rule(Server(now), Update(given), g), expected)
    np.testing.assert_array_equal(rule(Server(now), Update(now), g), g)
    np.testing.assert_array_equal(Compensate(0.0)(Server(now), Update(given), g), g)


def test_asynchronous_nesterov_is_told_from_delayed_by_the_size_of_its_steps():
    """At one outer learning rate: delayed settles where plain Nesterov overshoots."""
    task = Quadratic(np.tile(np.arange(5.0), (4, 1)))
    losses = {
        name: offbeat.run(
            task, method, FLEET, work="local-steps(sgd(lr=0.5), steps=20)", stop={"steps": 400}
        ).column("loss")
        for name, method in (
            ("plain", async_local_sgd(lr=0.3)),
            ("delayed", delayed_nesterov(lr=0.3)),
        )
    }
    assert losses["delayed"].max() <= losses["delayed"][0]
    assert losses["plain"].max() > 2 * losses["plain"][0]


# -- What came after --------------------------------------------------------------------------


def test_look_ahead_starts_where_momentum_would_be_next():
    task, gradient = quadratic(5, workers=4, noise=0.5), None
    result = offbeat.run(task, look_ahead(lr=0.1, momentum=0.8), "4 1..3", stop={"steps": 60})
    gradient = reference.one_by_one(task)
    x, m = task.initial(0), np.zeros(5)
    starts = [x]
    for row in result.trace:
        _, worker, number, read, _ = row[:5].tolist()
        m = 0.8 * m + gradient(starts[int(read)], int(worker), int(number))
        x = x - 0.1 * m
        starts.append(x - 0.1 * 0.8 * m)
    np.testing.assert_allclose(result.x, x, rtol=1e-10)
    assert result.final["staleness_max"] > 3
    none, sgd = (
        offbeat.run(task, method, "4 1..3", stop={"steps": 60})
        for method in (look_ahead(momentum=0.0), async_local_sgd(lr=0.1, outer="sgd"))
    )
    np.testing.assert_array_equal(none.x, sgd.x)


def test_decoupled_diloco_between_its_corners():
    """A quorum of all is DiLoCo, a quorum of one without grace is asynchronous Nesterov."""
    task, options = logistic("digits", workers=4), {"work": H20, "stop": {"seconds": 700.0}}
    for decoupled, other in (
        (decoupled_diloco(quorum=4, merge="mean"), diloco()),
        (decoupled_diloco(quorum=1, lr=0.1), async_local_sgd(lr=0.1)),
        (streaming_diloco(fragments=1, overlap=0, alpha=0.0), diloco()),
    ):
        runs = [offbeat.run(task, method, FLEET, **options) for method in (decoupled, other)]
        np.testing.assert_allclose(runs[0].x, runs[1].x, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(runs[0].trace, runs[1].trace)
        assert runs[0].final["step"] >= 10


@pytest.mark.parametrize(
    "method",
    [
        decoupled_diloco(momentum=0.0, quorum=4),
        decoupled_diloco(momentum=0.0, quorum=2),
        decoupled_diloco(momentum=0.0, fragments=2, overlap=1, alpha=0.5),
        streaming_diloco(momentum=0.0, fragments=3, overlap=2),
    ],
)
def test_learners_give_what_they_moved_whoever_does_their_jobs(method):
    """Not what the model moved since a learner was last there, nor by how much two are apart."""
    task = Quadratic(np.tile(np.arange(1.0, 6.0), (4, 1)))
    away = [offbeat.Outage(worker=w, from_s=5.5 + w, to_s=200.5 + 3 * w) for w in (0, 1)]
    speeds = [1.0, 1.1, 1.2, 1.3]
    fleet = offbeat.Fleet(workers=4, speeds=speeds, outages=away, on_outage="reassign")
    work, ends = "local-steps(sgd(0.1), steps=2)", {"seconds": 400}
    result = offbeat.run(task, method, fleet, work=work, stop=ends, evaluate={"seconds": 1})
    assert result.facts["reassigned"] >= 2
    loss = result.column("loss")
    assert (loss[1:] <= 1.001 * loss[:-1]).all()


class Uneven(Fragments):
    """Its first jobs have 20, 5 and 20 local steps."""

    def start(self, server):
        super().start(Unassigning(server))
        for worker, steps in enumerate((20, 5, 20)):
            server.assign(worker, steps=steps)


class Unassigning:
    def __init__(self, server):
        self.server = server

    def __getattr__(self, name):
        return getattr(self.server, name)

    def assign(self, worker):
        pass


@pytest.mark.parametrize("merge", ["mean", "radial-directional"])
def test_a_merge_weighs_by_local_steps(merge):
    """Results of 20 and 5 steps in one window: four fifths and one fifth."""
    task = quadratic(5, workers=3)
    gradient = reference.one_by_one(task)
    method = Uneven(1.0, 0.0, 2, None, 1, 0, 0.0, merge)
    fleet = offbeat.Fleet(workers=3, speeds=[1.0, 4.5, 100.0])
    work = "local-steps(sgd(lr=0.1), steps=20)"
    result = offbeat.run(task, method, fleet, work=work, stop={"steps": 1})
    moves = []
    for worker, steps in ((0, 20), (1, 5)):
        y = task.initial(0)
        for t in range(steps):
            y = y - 0.1 * gradient(y, worker, t)
        moves.append(task.initial(0) - y)
    step = 0.8 * moves[0] + 0.2 * moves[1]
    if merge != "mean":  # (sum w |v|) u/|u|, u = sum w v/|v|
        lengths = np.linalg.norm(moves, axis=1)
        u = 0.8 * moves[0] / lengths[0] + 0.2 * moves[1] / lengths[1]
        step = (0.8 * lengths[0] + 0.2 * lengths[1]) * u / np.linalg.norm(u)
    np.testing.assert_allclose(result.x, task.initial(0) - step, rtol=1e-12)


def test_streaming_diloco_by_hand():
    """Equal speeds, P = 2, one job of overlap: each merge is taken one job after it was given."""
    task, h, lr, beta, alpha = quadratic(6, workers=3, noise=0.3), 4, 0.7, 0.5, 0.25
    method = streaming_diloco(lr=lr, momentum=beta, fragments=2, overlap=1, alpha=alpha)
    work = f"local-steps(sgd(lr=0.1), steps={h})"
    result = offbeat.run(task, method, "3 1.0", work=work, stop={"steps": 11})
    gradient, parts = reference.one_by_one(task), [slice(0, 3), slice(3, 6)]
    x, m = task.initial(0), np.zeros(6)
    theta, base, due = [x.copy() for _ in range(3)], [x.copy() for _ in range(3)], None
    for job in range(11):
        for i in range(3):
            for t in range(h * job, h * job + h):
                theta[i] = theta[i] - 0.1 * gradient(theta[i], i, t)
        part = parts[job % 2]
        g = np.mean([base[i][part] - theta[i][part] for i in range(3)], axis=0)
        for i in range(3):
            if due is not None:  # the last round's
                theta[i][due] = alpha * theta[i][due] + (1 - alpha) * x[due]
                base[i][due] = x[due]
        m[part] = beta * m[part] + g
        x = x.copy()
        x[part] -= lr * (g + beta * m[part])
        due = part
    np.testing.assert_allclose(result.x, x, rtol=1e-12)
    assert len(result.trace) == 33


def test_learners_of_streaming_diloco_stop_only_when_they_run_out_of_overlap():
    """Speeds 1, 1 and 3: the fast ones do one job and as many as they may beyond it a round."""
    fleet, work = offbeat.Fleet(workers=3, speeds=[1.0, 1.0, 3.0]), "local-steps(sgd, steps=2)"
    busy = {}
    for overlap in (0, 1, 3):
        method = streaming_diloco(fragments=2, overlap=overlap)
        run = offbeat.run(quadratic(6, workers=3), method, fleet, work=work, stop={"seconds": 300})
        busy[overlap] = run.final["busy"]
    assert busy == pytest.approx({0: 5 / 9, 1: 7 / 9, 3: 1.0}, abs=0.01)


def test_the_window_is_as_long_as_nobody_need_stand_still():
    """A quorum at 3 s of jobs of 2 and 3 s; the third comes at 3.9 s."""
    fleet, work = offbeat.Fleet(workers=3, speeds=[1.0, 1.5, 1.95]), "local-steps(sgd, steps=2)"
    merged = {}
    for grace_s in (None, 0.0, 10.0):
        method = decoupled_diloco(quorum=2, grace_s=grace_s, fragments=2, overlap=1, alpha=0.5)
        run = offbeat.run(
            quadratic(6, workers=3), method, fleet, work=work, stop={"steps": 1},
            evaluate={"steps": 1},
        )  # fmt: skip
        merged[grace_s] = run.final["time_s"]
    # xi_step is 1.5 of those heard of: 1 x 2 x 1.5 - 3 leaves nothing; the third is not waited for.
    assert merged == pytest.approx({None: 3.0, 0.0: 3.0, 10.0: 3.9})
    slow = offbeat.Fleet(workers=4, speeds=[1.0, 1.0, 3.0, 3.4])
    method = decoupled_diloco(quorum=2, fragments=2, overlap=2, alpha=0.5)
    run = offbeat.run(
        quadratic(6, workers=4), method, slow, work=work, stop={"seconds": 60.0},
    )  # fmt: skip
    first = run.trace[column(run.trace, "step") == 0]
    assert column(first, "time_s").max() == pytest.approx(4.0)  # 2 s, and 2 x 2 x 1 - 2 more


def test_tensors_are_dealt_out_to_fragments():
    task, server = mlp(workers=2, hidden=[8]), Server(np.zeros(1), n=2)
    server.x, server.assign = task.initial(0), lambda *a, **k: None
    ends = np.cumsum([0, *task.tensors]).tolist()
    server.tensors = [slice(a, b) for a, b in pairwise(ends)]
    method = streaming_diloco(fragments=3)
    method.start(server)
    assert method.parts[0] == [(ends[0], ends[1]), (ends[3], ends[4])]
    assert sum(end - first for part in method.parts for first, end in part) == task.dim
    server.tensors = [slice(0, 10)]
    server.x = np.zeros(10)
    method.start(server)
    assert method.parts == [[(0, 3)], [(3, 6)], [(6, 10)]]


def test_eager_updates_by_hand():
    """Own new update, the others' last ones; of one worker alone: DiLoCo."""
    task, h, lr, beta = quadratic(5, workers=3, noise=0.3), 4, 0.7, 0.5
    work = f"local-steps(sgd(lr=0.1), steps={h})"
    result = offbeat.run(
        task, eager_diloco(lr=lr, momentum=beta), "3 1.0", work=work, stop={"steps": 27}
    )
    gradient, rounds = reference.one_by_one(task), 9
    x, m = [task.initial(0)] * 3, [np.zeros(5)] * 3
    before = [np.zeros(5)] * 3
    for job in range(rounds):
        moved = []
        for i in range(3):
            y = x[i]
            for t in range(h * job, h * job + h):
                y = y - 0.1 * gradient(y, i, t)
            moved.append(x[i] - y)
        for i in range(3):
            g = (moved[i] + sum(before[j] for j in range(3) if j != i)) / 3
            m[i] = beta * m[i] + g
            x[i] = x[i] - lr * (g + beta * m[i])
        before = moved
    np.testing.assert_allclose(result.x, np.mean(x, axis=0), rtol=1e-12)
    uneven = offbeat.run(task, eager_diloco(), "3 1..3", work=work, stop={"seconds": 108.0})
    counts = np.bincount(column(uneven.trace, "worker").astype(int)).tolist()
    assert counts == [10, 10, 8]  # with round 8 of the slowest due, and those ahead in their tenth
    one = logistic("digits", workers=1)
    options = {"work": H20, "stop": {"steps": 12}}
    alone = [offbeat.run(one, method, "1 1.0", **options) for method in (eager_diloco(), diloco())]
    np.testing.assert_allclose(alone[0].x, alone[1].x, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(alone[0].trace, alone[1].trace)


def test_updates_are_turned_towards_momentum():
    """Lengths and cosines of HeLoCo's three cases."""
    m = np.array([2.0, 0.0, 0.0])

    def at(cosine, length=1.0):
        return length * np.array([cosine, np.sqrt(1 - cosine**2), 0.0])

    for cosine in (0.2, 0.7, 1.0):
        np.testing.assert_array_equal(aligned(at(cosine), m), at(cosine))
    sure = 1 / (1 + 3 * 2)
    for cosine in (-0.3, -1.0):  # a share of what points backwards is taken off
        share = min(0.5 * -cosine * sure, 0.5)
        expected = at(cosine) - np.array([share * cosine, 0, 0])
        np.testing.assert_allclose(aligned(at(cosine), m), expected, rtol=1e-12)
        assert aligned(at(-1.0, 1e9), m)[0] == pytest.approx(-0.5e9)  # no more than half
    for cosine in (0.0, 0.1):  # turned, and as long as before
        found, turn = aligned(at(cosine, 3.0), m), (1 - cosine) * 3 / (3 + 6)
        assert np.linalg.norm(found) == pytest.approx(3.0)
        mixed = (1 - turn) * at(cosine) + turn * m / 2
        np.testing.assert_allclose(found / 3, mixed / np.linalg.norm(mixed), rtol=1e-12)
    np.testing.assert_array_equal(aligned(m, 0 * m), m)
    np.testing.assert_array_equal(aligned(0 * m, m), 0 * m)


def test_heloco_is_look_ahead_where_updates_agree_and_turns_each_tensor_by_itself():
    same = Quadratic(np.tile(np.arange(5.0), (4, 1)))
    options = {"work": "local-steps(sgd(lr=0.01), steps=2)", "stop": {"steps": 60}}
    runs = [offbeat.run(same, f"{name}(lr=0.05)", FLEET, **options)
            for name in ("heloco", "look-ahead")]  # fmt: skip
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    rule, server = Align(Momentum(0.9, m=np.ones(6))), Server(np.zeros(6))
    server.tensors = [slice(0, 2), slice(2, 6)]
    g = np.array([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    found = rule(server, Update(), g)
    np.testing.assert_array_equal(found[:2], g[:2])
    np.testing.assert_allclose(found[2:], aligned(g[2:], np.ones(4)))
    assert not np.allclose(found[2:], g[2:])


@pytest.mark.parametrize("compressor", ["quantile(2)", "topk(0.05)", "qsgd(2)"])
def test_error_feedback_loses_nothing(compressor):
    """All that was sent and what is still owed add up to all updates, of each worker."""
    rule, gs = ErrorFeedback(made(compressor)), draws(40, d=200)
    server, sent = Server(np.zeros(200)), np.zeros((2, 200))
    server.rng = lambda purpose, index: np.random.default_rng(index)
    for k, g in enumerate(gs):
        update = Update()
        update.worker = k % 2
        sent[k % 2] += rule(server, update, g)
    for worker in range(2):
        total = np.sum(gs[worker::2], axis=0)
        np.testing.assert_allclose(sent[worker] + rule.error[worker], total, rtol=1e-10)
        assert np.linalg.norm(total - sent[worker]) > 0.01


def test_muloco_is_near_diloco_at_two_bits_and_is_diloco_uncompressed():
    task = logistic("digits", workers=4)
    options = {"work": H20, "stop": {"steps": 40}}
    whole, same, few = (
        offbeat.run(task, method, "4 1.0", **options)
        for method in ("diloco", "muloco(compressor=identity)", "muloco")
    )
    np.testing.assert_array_equal(whole.x, same.x)
    assert not np.array_equal(whole.x, few.x)
    assert few.final["loss"] == pytest.approx(whole.final["loss"], rel=0.05)


def test_halos_with_one_region_is_its_server():
    """Pushed at once, taken over in full, merged in full: Delayed Nesterov."""
    task = logistic("digits", workers=4)
    one = halos(
        regions=1, push=1, alpha=1.0, lr=1.0, momentum=0.0, buffer=1,
        region_lr=0.4, region_momentum=0.9, region_buffer=4,
    )  # fmt: skip
    options = {"work": H20, "stop": {"steps": 80}}
    runs = [
        offbeat.run(task, method, FLEET, **options)
        for method in (one, delayed_nesterov(lr=0.4, buffer=4))
    ]
    np.testing.assert_allclose(runs[0].x, runs[1].x, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(runs[0].trace, runs[1].trace)


def test_regions_of_halos_are_apart_between_pushes():
    """A region's workers start from its own model; the global one moves at pushes only."""
    task = quadratic(4, workers=4)
    method = halos(regions=2, push=3, region_buffer=1, region_momentum=0.0, region_lr=0.1, lr=1.0)
    result = offbeat.run(task, method, "4 1..4", stop={"gradients": 60}, evaluate={"gradients": 1})
    counts, pushes = [0, 0], 0
    for worker in column(result.trace, "worker").astype(int):
        counts[worker // 2] += 1
        pushes += counts[worker // 2] % 3 == 0
    assert result.final["step"] == pushes > 10


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("delayed-nesterov(buffer=4, c=0.3)", "c=0.3 is more than 1/4"),
        ("delayed-nesterov(c=0.3)", "c=0.3 is more than 1/10"),
        ("async-local-sgd(dylu=true, seconds=[1.0, 2.0])", "2 given for 10 workers; give one each"),
        ("async-local-sgd(seconds=[1.0])", "seconds are for dylu=true"),
        ("async-local-sgd(outer=adams)", '"outer" should be \'sgd\', \'momentum\', \'nesterov\''),
        ("decoupled-diloco(overlap=1)", "with one fragment and alpha=0"),
        ("streaming-diloco(fragments=99)", "99 fragments of a model of"),
        ("decoupled-diloco(quorum=11)", "a quorum of 11, but there are 10 workers"),
        ("halos(regions=11)", "11 regions, but there are 10 workers"),
        ("halos(alpha=1.5)", "alpha=1.5 is a weight; give at most 1"),
        ("diloco(grace_s=1.0)", 'unknown key "grace_s"'),
    ],
)  # fmt: skip
def test_mistakes_are_told(method, message):
    with pytest.raises(offbeat.ConfigError) as caught:
        offbeat.run("quadratic", method, "10 1..10", work=H20, stop={"steps": 5})
    assert message in str(caught.value)
