"""Compressed updates: EF21's claims, the bits of batches, what travels, and the time it takes."""

import numpy as np
import pytest
from canonical import L, canonical
from servers import METHODS, WORKS, N, make

import offbeat
from offbeat import ConfigError, Diverged, Fleet
from offbeat.algorithms.compression import COMPRESSORS, decode
from offbeat.algorithms.server import Algorithm
from offbeat.runtime.compute.backend import ALONE_BYTES, JobRequest, Runner
from offbeat.runtime.run.records import column
from offbeat.runtime.server.virtual import VirtualWorkers
from offbeat.workers.compressed import SENT, compressed
from offbeat.workers.tasks import quadratic
from offbeat.workers.work import WORK

TOPK = "compressed(topk(0.2))"


def run(name, work, fleet=f"{N} lognormal(1.0)", task=None, steps=80, **more):
    task = task or quadratic(20, workers=N, noise=0.3, seed=2)
    return offbeat.run(task, make(name), fleet, work=work, stop={"steps": steps}, seed=4, **more)


@pytest.mark.parametrize("name", METHODS)
def test_a_compressor_that_loses_nothing_changes_nothing(name):
    plain = WORKS.get(name, "gradient")
    ours, theirs = run(name, f"compressed(identity, {plain})"), run(name, plain)
    np.testing.assert_array_equal(ours.x, theirs.x)
    np.testing.assert_array_equal(ours.trace, theirs.trace)
    assert ours.final["bytes"] == len(ours.trace) * len(COMPRESSORS["identity"]()
        .compress(ours.x).encode()[0])  # fmt: skip


# -- The mathematics -------------------------------------------------------------------------------


def test_ef21_is_the_papers():
    """EF21 for several nodes in five lines, where all workers answer in every round."""
    task, lr, top = canonical(), 0.1 / L, COMPRESSORS.parse("topk(4)")
    x, h = task.initial(0), np.zeros((task.workers, task.dim))
    for _ in range(50):
        everyone = np.repeat(x[None], task.workers, axis=0)
        g = task.gradient(everyone, np.arange(task.workers), np.zeros(task.workers, int))[1]
        h += top.compress(g - h).dense()
        x = x - lr * h.mean(axis=0)
    ours = offbeat.run(task, f"local-sgd(lr={lr})", work="compressed(topk(4))", stop={"steps": 50})
    np.testing.assert_allclose(ours.x, x, rtol=1e-12)


def test_ef21_converges_where_top_k_alone_stalls():
    task = canonical()
    optimum = np.linalg.lstsq(task.a.reshape(-1, task.dim), task.b.reshape(-1), rcond=None)[0]

    def error(work, steps):
        result = offbeat.run(task, f"local-sgd(lr={0.1 / L})", work=work, stop={"steps": steps})
        return np.linalg.norm(result.x - optimum)

    assert error("compressed(topk(4))", 1000) < 1e-8
    stalled = [error("compressed(topk(4), feedback=false)", steps) for steps in (1000, 2000)]
    assert min(stalled) > 1.0
    assert error("compressed(contractive(qsgd(4)))", 2000) < 1e-8


@pytest.mark.parametrize("text", ["topk(0.2)", "randk(0.3)", "scaled-sign", "contractive(qsgd(2))"])
def test_what_is_kept_comes_nearer_at_the_rate_of_alpha(text):
    """E ||h' - u||^2 <= (1 - alpha) ||h - u||^2 for an update u that stays."""
    task, x = quadratic(30, workers=1, seed=1), np.zeros(30)
    jobs = 200
    work = compressed(text)
    u = task.gradient(x[None], np.array([0]), np.array([0]))[1][0]
    errors, kept = [u @ u], work.keep(1, x)
    rates = []
    for draw in range(jobs):
        work.update(task, x[None], np.array([0]), np.array([draw]), np.array([1]), kept)
        apart = kept[SENT][0] - u
        errors.append(apart @ apart)
        if errors[-2] > 1e-20:
            rates.append(errors[-1] / errors[-2])
    alpha = work.compressor.alpha(30)
    assert np.mean(rates) <= 1 - alpha + 0.02
    assert errors[-1] <= errors[0] * (1 - alpha) ** (jobs / 2)


# -- Bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["topk(0.2)", "randk(0.2)", "qsgd(4), feedback=false"])
@pytest.mark.parametrize("inner", ["gradient", "local-steps(momentum(lr=0.1), steps=3)"])
def test_jobs_in_a_batch_have_the_bits_of_single_ones(text, inner):
    task, g = quadratic(40, workers=5, noise=0.5), np.random.default_rng(0)
    compressor, _, rest = text.partition(", ")
    work = WORK.parse(f"compressed({compressor}, {inner}{', ' + rest if rest else ''})", seed=7)
    x, worker, draw = g.standard_normal((5, 40)), np.arange(5), np.array([3, 0, 9, 9, 1])
    steps, kept = np.array([2, 3, 1, 1, 2]), work.keep(5, x[0])
    for rows in kept.values():
        rows += np.abs(g.standard_normal(rows.shape)).astype(rows.dtype)
    alone = {name: rows.copy() for name, rows in kept.items()}
    losses, updates, message = work.coded(task, x, worker, draw, steps, kept)
    frames = message.encode()
    assert [len(frame) for frame in frames] == message.sizes.tolist()
    for j in range(5):
        at = slice(j, j + 1)
        mine = {name: rows[at] for name, rows in alone.items()}
        before = mine[SENT].copy() if SENT in mine else 0.0
        loss, update, one = work.coded(task, x[at], worker[at], draw[at], steps[at], mine)
        assert loss == losses[at]
        np.testing.assert_array_equal(update, updates[at])
        assert one.encode() == frames[at]
        np.testing.assert_array_equal(before + decode(frames[at], 40).dense()[None], update)
        for name, rows in kept.items():
            np.testing.assert_array_equal(rows[at], mine[name])


def test_what_is_drawn_is_the_jobs_own():
    task, x = quadratic(40, workers=2), np.ones((1, 40))

    def support(seed, worker, draw):
        work = compressed("randk(0.2)", seed=seed)
        job = np.array([worker]), np.array([draw]), np.array([1])
        return tuple(np.flatnonzero(work.update(task, x, *job, work.keep(1, x[0]))[1]))

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({support(*place) for place in places}) == 4
    assert support(0, 1, 5) == support(0, 1, 5)


# -- What a worker sends, and what it keeps --------------------------------------------------------


def test_only_the_frame_travels_and_what_the_work_keeps_itself():
    task = quadratic(1000, workers=2)
    work = WORK.parse("compressed(topk(0.01), local-steps(momentum, steps=2))")
    runner, x = Runner(task, work), task.initial(0)
    order = JobRequest(0, 1, 1, 0, 2, 0, x, work.keep(1, x))
    (answer,) = runner.compute([order])
    assert isinstance(answer.payload, bytes)
    assert len(answer.payload) < 150 < 8000
    assert set(answer.kept) == {"momentum", "steps"}
    h = runner._kept[1][SENT][0]
    np.testing.assert_array_equal(h, decode([answer.payload]).dense())
    assert np.count_nonzero(h) == 10
    (answer,) = runner.compute([order._replace(serial=1, draw=2, kept=None)])
    np.testing.assert_array_equal(runner._kept[1][SENT][0], h + decode([answer.payload]).dense())


def workers(work, dim=20, bandwidth=None, n=1):
    task = quadratic(dim, workers=n, noise=0.1)
    fleet = Fleet(workers=n, bandwidth=bandwidth)
    timing = fleet.timing(0, 8 * dim, True)
    return VirtualWorkers(task, fleet, timing, WORK.parse(work), task.initial(0))


@pytest.mark.parametrize("bandwidth", [None, 1e9])
@pytest.mark.parametrize("dim", [20, ALONE_BYTES // 8])
def test_a_job_that_is_taken_back_has_not_changed_what_was_sent(dim, bandwidth):
    made = workers(TOPK, dim, bandwidth)
    x = made.task.initial(0)
    made.take(0, x, 0)
    first = made.pop(np.inf)
    np.testing.assert_array_equal(made._kept[SENT][0], first.payload)
    held = first.payload.copy()
    made.take(0, x, 0)
    job = made.running()[0]
    if dim == 20 or bandwidth:  # it is computed, and nobody has it yet
        made._compute(job)
        assert not np.array_equal(job.payload, held)
    assert made.cancel(0) == 1
    np.testing.assert_array_equal(made._kept[SENT][0], held)
    made.take(0, x, 0)
    again = made.pop(np.inf)
    np.testing.assert_array_equal(made._kept[SENT][0], again.payload)
    np.testing.assert_array_equal(first.payload, held)  # the method may still look at it


# -- Bytes and time --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [50, ALONE_BYTES // 8 + 8])
@pytest.mark.parametrize(
    ("name", "speeds"),
    [("pure", "lognormal"), ("ringmaster", "lognormal"), ("random", "lognormal(mean=0.001)")],
)
@pytest.mark.parametrize("work", [TOPK, "compressed(bernoulli(0.5))"])
def test_an_update_takes_the_time_of_its_bytes(name, speeds, work, dim):
    """Every arrival is the end of its job, the latency, and its frame over the bandwidth."""
    latency_s, bandwidth, sizes = 0.01, 100.0 * dim, {}
    fleet = f"{N} {speeds} latency_s={latency_s} bandwidth={bandwidth}"
    task = quadratic(dim, workers=N, noise=0.3, seed=2)
    made = WORK.parse(work, seed=4)
    coded = made.coded

    def listening(task, x, worker, draw, steps, kept):
        found = coded(task, x, worker, draw, steps, kept)
        places = zip(worker.tolist(), draw.tolist(), found[2].sizes.tolist(), strict=True)
        sizes.update({(w, t): size for w, t, size in places})
        return found

    made.coded = listening
    result = run(name, made, fleet, task, steps=40)
    time_s, end_s = (column(result.trace, key) for key in ("time_s", "end_s"))
    jobs = result.trace[:, 1:3].astype(int)
    nbytes = np.array([sizes[worker, number] for worker, number in jobs.tolist()])
    assert len(set(nbytes.tolist())) > 1
    assert (np.diff(time_s) >= 0).all()
    due_s = end_s + latency_s + nbytes / bandwidth
    late = time_s > due_s + 1e-9  # behind what its worker sent before
    np.testing.assert_allclose(time_s[~late], due_s[~late], rtol=1e-12)
    assert late.any() == (name == "random" and "bernoulli" in work)
    assert late.mean() < 0.5
    for at in np.flatnonzero(late):
        before = np.flatnonzero(jobs[:at, 0] == jobs[at, 0])[-1]
        assert time_s[at] == time_s[before]
    assert result.final["bytes"] == nbytes.sum()


def test_compression_is_worth_what_the_link_says():
    task, fleet = quadratic(2000, workers=N), f"{N} 0.001 bandwidth=16000.0"
    done = {
        work: len(offbeat.run(task, "pure(lr=0.01)", fleet, work=work, stop={"seconds": 50}).trace)
        for work in ("gradient", "compressed(identity)", "compressed(topk(0.01))")
    }
    # A model takes a second down; a gradient as long up, and one percent of it hardly anything.
    assert done["gradient"] == 8 * 24
    assert done["compressed(identity)"] == 8 * 24
    assert 8 * 47 <= done["compressed(topk(0.01))"] <= 8 * 49


# -- Resuming, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("work", [TOPK, "compressed(randk(0.2), local-steps(momentum, steps=2))"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(work, tmp_path):
    fleet, task = f"{N} lognormal(1.0) bandwidth=3000.0", "quadratic(20, noise=0.3)"
    options = {"work": work, "seed": 3}
    whole = offbeat.run(task, "random(lr=0.02)", fleet, stop={"steps": 90}, **options)
    folder = tmp_path / "run"
    offbeat.run(task, "random(lr=0.02)", fleet, stop={"steps": 31}, folder=folder, **options)
    for steps in (32, 90):
        result = offbeat.resume(folder, overrides=[f"stop.steps={steps}"])
    np.testing.assert_array_equal(result.x, whole.x)
    np.testing.assert_array_equal(result.trace, whole.trace)
    assert result.final == whole.final
    assert result.experiment.work.seed == 3
    again = offbeat.replay(folder)
    np.testing.assert_array_equal(again.x, whole.x)
    assert again.final["bytes"] == whole.final["bytes"]


@pytest.mark.parametrize("work", [TOPK, "compressed(qsgd(4), feedback=false)"])
def test_what_is_not_finite_ends_the_run(work):
    with pytest.raises(Diverged, match="not finite"):
        offbeat.run("quadratic", "pure(lr=1e150)", work=work, stop={"steps": 10**4})


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("compressed(topk(0))", "greater than"),
        ("compressed(topq)", 'no compressor is called "topq"; did you mean "topk"'),
        ("compressed(topk, own-loop)", "own-loop sends its updates as they are"),
        ("compressed(topk, compressed(topk))", "compressed sends its updates as they are"),
        ("compressed(qsgd(4))", r"take contractive\(qsgd\(s=4.*, or feedback = false"),
        ("compressed(topk, feedbak=false)", 'unknown key "feedbak"; did you mean "feedback"'),
    ],
)
def test_mistakes(work, said):
    with pytest.raises(ConfigError, match=said):
        run("pure", work)


def test_gossip_compresses_by_itself():
    with pytest.raises(ConfigError, match=r"choco: gossip compresses .* method's own compressor"):
        offbeat.run("quadratic", "choco", "8", "ring", work="compressed(topk(0.1))")


class Twice(Algorithm):
    """Asks for two local steps."""

    def start(self, server):
        server.assign(0, steps=2)

    def arrive(self, server, update):
        raise AssertionError


def test_a_gradient_is_of_one_step():
    with pytest.raises(ConfigError, match="assigned 2 local steps to workers that compute one"):
        offbeat.run("quadratic", Twice(), work=TOPK)
