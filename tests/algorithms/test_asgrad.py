"""The AsGrad family against the reference machine, and the identities it must satisfy."""

import numpy as np
import pytest
import reference

import offbeat
from offbeat.algorithms.server import ALGORITHMS, minibatch, pure, random, shuffled
from offbeat.runtime.run.records import column
from offbeat.workers.tasks import Quadratic, quadratic

LAWS = ["1..10", "poisson(1..10)", "normal(1..10)", "uniform(1..10)", "lognormal(1.0)"]
N = 10


@pytest.fixture
def task():
    return quadratic(5, workers=N, seed=123)


def machine(task, speeds, lr, seed=0):
    fleet = offbeat.Fleet(workers=N, speeds=speeds)
    clock = fleet.law().clock(N, seed, fleet.factors())
    times = lambda i, number: clock.finish(i, number, 0.0)  # noqa: E731
    return reference.Machine(reference.one_by_one(task), task.initial(0), times, N, lr)


@pytest.mark.parametrize("speeds", LAWS)
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("pure", reference.pure),
        ("random", reference.random(N, 0)),
        ("shuffled", reference.shuffled(N, 0)),
        ("shuffle-once", reference.shuffled(N, 0, once=True)),
    ],
)
@pytest.mark.parametrize("wait", [1, 3, 10])
def test_equals_the_reference_machine(task, speeds, name, schedule, wait):
    if name == "random":
        schedule = reference.random(N, 0)  # a stream is used up
    elif name != "pure":
        schedule = reference.shuffled(N, 0, once=name == "shuffle-once")
    oracle = machine(task, speeds, 0.05)
    x = oracle.run(schedule, wait, 300)
    result = offbeat.run(
        task,
        ALGORITHMS[name](lr=0.05, wait=wait),
        offbeat.Fleet(workers=N, speeds=speeds),
        stop={"steps": 300},
    )
    np.testing.assert_array_equal(result.trace[:, :5], np.array(oracle.trace))
    np.testing.assert_array_equal(result.x, x)  # bit for bit


@pytest.mark.parametrize("name", ["pure", "random", "shuffled", "shuffle-once"])
def test_one_worker_is_plain_sgd_bit_for_bit(name):
    task = quadratic(4, workers=1, noise=0.5, seed=3)
    result = offbeat.run(task, ALGORITHMS[name](lr=0.1), "1 exponential", stop={"steps": 50})
    x = task.initial(0)
    for t in range(50):
        x = x - 0.1 * reference.one_by_one(task)(x, 0, t)
    np.testing.assert_array_equal(result.x, x)
    assert result.final["staleness_max"] == 0


@pytest.mark.parametrize("speeds", LAWS)
@pytest.mark.parametrize("name", ["pure", "random", "shuffled"])
def test_delays_obey_the_conservation_law(task, speeds, name):
    """sum tau_t = (n-1) T - sum over outstanding jobs of (T - a), as integers."""
    steps = 997
    fleet = offbeat.Fleet(workers=N, speeds=speeds)
    result = offbeat.run(task, ALGORITHMS[name](lr=0.01), fleet, stop={"steps": steps})
    taus = column(result.trace, "step") - column(result.trace, "read_step")
    ages = sum(steps - read for read in result.outstanding)
    assert len(result.outstanding) == N
    assert int(taus.sum()) == (N - 1) * steps - ages
    assert result.facts["concurrency"] == N
    assert int((np.arange(len(result.histogram)) * result.histogram).sum()) == int(taus.sum())
    assert result.final["staleness_max"] == taus.max()


@pytest.mark.parametrize("name", ["pure", "random", "shuffled"])
def test_mean_staleness_is_jobs_in_flight_minus_one(task, name):
    fleet = offbeat.Fleet(workers=N, speeds="1..10")
    result = offbeat.run(task, ALGORITHMS[name](lr=0.01), fleet, stop={"steps": 8000})
    taus = (column(result.trace, "step") - column(result.trace, "read_step"))[4000:]
    assert taus.mean() == pytest.approx(N - 1, rel=0.02)


def test_pure_completions_follow_speeds(task):
    result = offbeat.run(task, pure(lr=0.01), "10 1..10", stop={"seconds": 25200})
    counts = np.bincount(column(result.trace, "worker").astype(int))
    np.testing.assert_allclose(counts * np.arange(1, 11), 25200, rtol=1e-3)
    assert abs(result.final["staleness_max"] - sum(10 / s for s in range(1, 11))) <= 3


def test_pure_with_equal_speeds_is_cyclic_with_delay_n_minus_1(task):
    result = offbeat.run(task, pure(lr=0.1), "10 1.0", stop={"steps": 200})
    trace = result.trace
    np.testing.assert_array_equal(column(trace, "worker"), np.arange(200) % N)
    taus = column(trace, "step") - column(trace, "read_step")
    np.testing.assert_array_equal(taus, np.minimum(np.arange(200), N - 1))


@pytest.mark.parametrize("speeds", ["1..10", "lognormal(1.0)"])
def test_waiting_for_all_is_minibatch_bit_for_bit(task, speeds):
    fleet = offbeat.Fleet(workers=N, speeds=speeds)
    runs = [
        offbeat.run(task, method, fleet, stop={"steps": 40 * N})
        for method in (pure(lr=0.02, wait=N), shuffled(lr=0.02, wait=N), minibatch(lr=0.02))
    ]
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0].x, other.x)
        np.testing.assert_array_equal(
            column(runs[0].trace, "time_s"), column(other.trace, "time_s")
        )


def test_minibatch_of_all_is_gradient_descent(task):
    result = offbeat.run(task, minibatch(lr=0.02), "10 1..10", stop={"steps": 30 * N})
    x, all_workers = task.initial(0), np.arange(N)
    for _ in range(30):
        x = x - 0.02 * task.gradient(np.tile(x, (N, 1)), all_workers, all_workers)[1].sum(axis=0)
    np.testing.assert_allclose(result.x, x, rtol=1e-12)


def test_minibatch_draws_distinct_workers(task):
    result = offbeat.run(task, minibatch(lr=0.02, batch=4), "10 1..10", stop={"steps": 400})
    rounds = column(result.trace, "worker").reshape(100, 4)
    assert all(len(set(workers)) == 4 for workers in rounds.tolist())
    np.testing.assert_array_equal(column(result.trace, "read_step"), np.arange(400) // 4 * 4)


@pytest.mark.parametrize("name", ["random-reshuffling", "shuffle-once-sgd"])
def test_reshuffling_covers_every_worker_in_every_pass(task, name):
    result = offbeat.run(task, ALGORITHMS[name](lr=0.02), "10 1..10", stop={"steps": 100})
    passes = column(result.trace, "worker").reshape(10, N)
    assert all(sorted(one) == list(range(N)) for one in passes.tolist())
    assert result.final["staleness_max"] == 0
    assert (len(np.unique(passes, axis=0)) == 1) == (name == "shuffle-once-sgd")


def test_shuffled_assigns_each_worker_once_per_n_assignments(task):
    """The job handed out after step t is read at step t + 1: n of them in a row are distinct."""
    result = offbeat.run(task, shuffled(lr=0.02), "10 1..10", stop={"steps": 1000})
    handed = {int(row[3]) - 1: int(row[1]) for row in result.trace if row[3] >= 1}
    whole = [range(first, first + N) for first in range(0, 900, N)]
    assert all(sorted(handed[t] for t in one) == list(range(N)) for one in whole)


@pytest.mark.parametrize(
    ("method", "sequential"), [(random, "sgd"), (shuffled, "random-reshuffling")]
)
def test_jobs_are_handed_out_in_the_order_of_the_sequential_method(task, method, sequential):
    """Without delay random is with-replacement SGD and shuffled is random reshuffling.

    The job handed out after step t is read at step t + 1; its worker is the one that the
    sequential method, drawing from the same stream, uses at step t.
    """
    asynchronous = offbeat.run(task, method(lr=0.01), "10 1..10", stop={"steps": 500}).trace
    one_by_one = offbeat.run(task, ALGORITHMS[sequential](), "10 1..10", stop={"steps": 500}).trace
    later = asynchronous[column(asynchronous, "read_step") >= 1]
    steps = column(later, "read_step").astype(int) - 1
    assert len(later) > 400
    np.testing.assert_array_equal(column(later, "worker"), column(one_by_one, "worker")[steps])


def test_a_busy_worker_queues_the_model_of_assignment(task):
    """Two picks of one worker: the second job starts as the first ends, on its own snapshot."""
    result = offbeat.run(task, random(lr=0.02), "10 1..10", stop={"steps": 500})
    trace, queued = result.trace, 0
    for worker in range(N):
        mine = trace[column(trace, "worker") == worker]
        start, end = column(mine, "start_s"), column(mine, "end_s")
        times = dict(zip(column(trace, "step"), column(trace, "time_s"), strict=True))
        for k in range(1, len(mine)):
            assigned_s = times.get(column(mine, "read_step")[k] - 1, 0.0)
            assert start[k] == max(end[k - 1], assigned_s)
            queued += assigned_s < end[k - 1]
    assert queued > 50  # it did happen


@pytest.mark.parametrize("name", ["random", "shuffled"])
def test_running_workers_never_fall_without_cause(task, name):
    """Busy workers do not decay (in the released simulator they fall from 10 to 1)."""
    result = offbeat.run(task, ALGORITHMS[name](lr=0.02), "10 1..10", stop={"steps": 3000})
    trace = result.trace
    start, end = column(trace, "start_s"), column(trace, "end_s")
    times = column(trace, "time_s")
    running = [int(((start <= t) & (end > t)).sum()) for t in times[500:2500]]
    assert np.mean(running[:500]) == pytest.approx(np.mean(running[-500:]), rel=0.3)
    assert min(running) >= 1
    assert result.final["busy"] * N > 4  # measured 5.3 and 5.5 with speeds 1..10


def test_gradients_do_not_disturb_the_clock(task):
    a, b = (
        offbeat.run(task, pure(lr=lr), "10 lognormal(1.0)", stop={"steps": 300}).trace
        for lr in (1e-9, 0.1)
    )
    np.testing.assert_array_equal(a, b)


def test_pure_optimises_the_frequency_weighted_objective():
    """The floor of pure is ||sum p_i c_i - mean(c)||^2, within 1%."""
    task = quadratic(5, workers=N, seed=123)
    p = 1 / np.arange(1, 11)
    p /= p.sum()
    floor = float(((p @ task.centers - task.optimum) ** 2).sum())
    assert floor == pytest.approx(0.15259, abs=1e-5)
    assert tail_error(task, pure(lr=2**-7), seeds=[0]) == pytest.approx(floor, rel=0.01)


def tail_error(task, method, seeds=(0, 1), **options):
    """Mean of ||x - x*||^2 over the second half of 20,000 steps, and over seeds."""
    errors = []
    for seed in seeds:
        result = offbeat.run(
            task, method, "10 1..10", stop={"steps": 20000}, evaluate={"steps": 7}, seed=seed
        )
        error = result.column("distance2")
        errors.append(error[len(error) // 2 :].mean())
    return float(np.mean(errors))


def test_random_leaves_an_error_of_order_gamma():
    """Slope 1, and the error of with-replacement SGD: gamma / (2 - gamma) mean ||c_i - c||^2."""
    task = quadratic(5, workers=N, seed=123)
    spread = float(((task.centers - task.optimum) ** 2).sum(axis=1).mean())
    powers = (4, 6, 8)
    errors = [tail_error(task, random(lr=2.0**-p), seeds=range(4)) for p in powers]
    assert -np.polyfit(powers, np.log2(errors), 1)[0] == pytest.approx(1.0, abs=0.1)
    theory = [2.0**-p / (2 - 2.0**-p) * spread for p in powers]
    assert errors == pytest.approx(theory, rel=0.1)


def test_shuffled_leaves_an_error_of_order_gamma_squared():
    """Slope 2, and the values of an independent implementation."""
    task = quadratic(5, workers=N, seed=123)
    powers = (4, 6, 8)
    errors = [tail_error(task, shuffled(lr=2.0**-p)) for p in powers]
    assert -np.polyfit(powers, np.log2(errors), 1)[0] == pytest.approx(2.0, abs=0.1)
    assert errors == pytest.approx([0.0269, 0.00159, 9.86e-5], rel=0.1)


def test_waiting_shrinks_the_bias_of_pure():
    task = quadratic(5, workers=N, seed=123)
    tails = [tail_error(task, pure(lr=2**-7, wait=wait), seeds=[0]) for wait in (1, 5, 10)]
    assert tails == pytest.approx([0.1529, 0.0524, 0.000391], rel=0.05)


def test_throughput_is_bounded_by_the_slowest_worker(task):
    """With speeds 1..10: pure 2.93 gradients a second, shuffled 1.00, random 0.90."""
    rates = {
        name: 20000
        / offbeat.run(task, ALGORITHMS[name](lr=0.001), "10 1..10", stop={"steps": 20000}).final[
            "time_s"
        ]
        for name in ("pure", "shuffled", "random")
    }
    assert rates["pure"] == pytest.approx(2.93, rel=0.01)
    assert rates["shuffled"] == pytest.approx(1.0, rel=0.02)
    assert rates["random"] == pytest.approx(0.90, rel=0.05)


def test_a_quadratic_knows_its_optimum():
    task = Quadratic(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert task.evaluate(np.array([2.0, 4.0]))["loss"] == 0
