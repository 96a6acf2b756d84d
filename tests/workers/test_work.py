"""Local steps: against torch's optimisers, in batches, kept between jobs, under the clock."""

import numpy as np
import pytest
import torch

import offbeat
from offbeat import ConfigError
from offbeat.algorithms.server import Algorithm
from offbeat.runtime.run.records import column
from offbeat.runtime.server import virtual
from offbeat.workers.tasks import logistic, mlp, quadratic
from offbeat.workers.work import INNERS, WORK, orthogonal

TORCH = {
    "sgd(lr=0.1, weight_decay=0.01)": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum(lr=0.1, beta=0.8, weight_decay=0.01)": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.8, weight_decay=0.01
    ),
    "momentum(lr=0.1, nesterov=true)": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, nesterov=True
    ),
    "adamw(lr=0.01, beta2=0.99, weight_decay=0.1)": lambda p: torch.optim.AdamW(
        p, 0.01, betas=(0.9, 0.99), weight_decay=0.1
    ),
}
ADAMW = "local-steps(adamw(lr=0.01), steps=3)"


def test_every_inner_optimiser_is_compared_with_torch():
    assert {text.split("(")[0] for text in TORCH} | {"muon"} == set(INNERS)


def test_muon_is_torchs():
    """On matrices torch's Muon (which computes in 16 bits), on the rest torch's AdamW."""
    from offbeat.workers.tasks import lm
    from offbeat.workers.tasks.lm import BYTES, SHAPES
    from offbeat.workers.tasks.transformer import Transformer

    task = lm(workers=2, length=16, batch=4)
    work = WORK.parse("local-steps(muon(lr=0.01, weight_decay=0.1), steps=3)")
    x = task.initial(0)
    kept = work.keep(1, x)
    update = one_job(work, task, x, 0, 0, 3, kept)[1][0]
    module = Transformer(BYTES, 16, *SHAPES["0.1M"])
    parameters = list(module.parameters())
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), parameters)
    linear = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in parameters if all(p is not q for q in linear)]
    optimisers = [
        torch.optim.Muon(linear, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 0.01, weight_decay=0.1),
    ]
    for step in range(3):
        y = torch.nn.utils.parameters_to_vector(parameters).detach().numpy().copy()
        g = task.gradient(y[None], np.array([0]), np.array([step]))[1][0]
        at = 0
        for p in parameters:
            p.grad = torch.from_numpy(g[at : at + p.numel()].reshape(p.shape))
            at += p.numel()
        for optimiser in optimisers:
            optimiser.step()
    moved = x - torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    assert len(task.matrices) == len(linear) == 8
    assert np.linalg.norm(update - moved) < 0.03 * np.linalg.norm(moved)
    inside = np.zeros(len(x), bool)
    for first, a, b in task.matrices:
        inside[first : first + a * b] = True
    assert inside.sum() == sum(p.numel() for p in linear)


def test_orthogonal_keeps_singular_vectors_and_evens_out_their_values():
    x = np.random.default_rng(0).standard_normal((2, 30, 12))
    found = orthogonal(x)
    assert np.linalg.svd(found)[1].min() > 0.65
    assert np.linalg.svd(found)[1].max() < 1.25
    u, _, v = np.linalg.svd(x, full_matrices=False)
    inner = np.abs(u.transpose(0, 2, 1) @ found @ v.transpose(0, 2, 1))
    off = inner - np.stack([np.diag(np.diag(each)) for each in inner])
    assert off.max() < 1e-10
    np.testing.assert_array_equal(orthogonal(x[1:]), found[1:])


def one_job(work, task, x, worker, draw, steps, kept):
    return work.update(task, x[None], np.array([worker]), np.array([draw]), np.array([steps]), kept)


@pytest.mark.parametrize("inner", TORCH)
def test_inner_optimisers_are_torchs(inner):
    """Two jobs of 4 steps, the moments kept between them: torch's 8 steps, restarted at x."""
    task, g = quadratic(6, workers=3, noise=0.3), np.random.default_rng(0)
    work = WORK.parse(f"local-steps({inner}, steps=4)")
    kept = {name: rows[:1] for name, rows in work.keep(3, task.initial(0)).items()}
    y = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimiser = TORCH[inner]([y])
    for job in range(2):
        x = g.standard_normal(6)
        _, update = one_job(work, task, x, 2, 4 * job, 4, kept)
        y.data = torch.from_numpy(x.copy())
        for step in range(4):
            at = y.detach().numpy()[None]
            gradient = task.gradient(at, np.array([2]), np.array([4 * job + step]))[1][0]
            y.grad = torch.from_numpy(gradient)
            optimiser.step()
        np.testing.assert_allclose(update[0], x - y.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", TORCH)
@pytest.mark.parametrize("kind", [quadratic, logistic, mlp])
def test_rows_of_unequal_steps_have_the_bits_of_single_ones(kind, inner):
    task = kind(workers=5)
    work = WORK.parse(f"local-steps({inner}, clip=0.5, warmup=3, total=30)")
    g, x0 = np.random.default_rng(1), task.initial(0)
    x = (x0 + g.standard_normal((5, task.dim))).astype(x0.dtype)
    workers, draws, steps = np.arange(5), np.array([0, 7, 2, 5, 1]), np.array([2, 5, 1, 5, 3])
    together, alone = work.keep(5, x0), work.keep(5, x0)
    for _ in range(2):  # the second time with moments
        losses, updates = work.update(task, x, workers, draws, steps, together)
        for j in range(5):
            rows = {name: held[j : j + 1] for name, held in alone.items()}
            loss, update = one_job(work, task, x[j], j, draws[j], steps[j], rows)
            assert loss[0] == losses[j]
            np.testing.assert_array_equal(update[0], updates[j])
    for name, held in together.items():
        np.testing.assert_array_equal(held, alone[name])
        if name == "steps":
            assert held.tolist() == (2 * steps).tolist()


def test_one_step_of_sgd_is_the_gradient_and_the_received_model_is_left_alone():
    task = quadratic(4, workers=2)
    x = np.random.default_rng(2).standard_normal((2, 4))
    before, ones = x.copy(), np.ones(2, int)
    found = WORK.parse("local-steps(sgd(lr=0.25), steps=1)").update(
        task, x, np.arange(2), ones, ones, {}
    )
    exact = task.gradient(x, np.arange(2), ones)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(found[0], exact[0])
    np.testing.assert_allclose(found[1], 0.25 * exact[1], rtol=1e-14)


def test_the_schedule():
    work = WORK.parse("local-steps(sgd(lr=0.8), warmup=10, total=50, last_lr=0.1)")
    rates = [work.rate(t, 0) for t in range(70)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.4)
    assert rates[10] == 0.8
    assert rates[30] == pytest.approx(0.45)  # half-way down
    assert rates[50:] == [0.1] * 20
    assert np.all(np.diff(rates[10:51]) < 0)
    assert np.abs(np.diff(rates)).max() <= 0.08 + 1e-12  # no jumps


def test_clipping_bounds_what_a_step_moves():
    task, x = quadratic(4, workers=1), np.full((1, 4), 100.0)
    ones = np.ones(1, int)
    for clip, moved in ((0.5, 0.5), (1e9, None)):
        work = WORK.parse(f"local-steps(sgd(lr=1.0), steps=1, clip={clip})")
        update = work.update(task, x, 0 * ones, 0 * ones, ones, {})[1][0]
        exact = task.gradient(x, 0 * ones, 0 * ones)[1][0]
        length = np.linalg.norm(exact)
        np.testing.assert_allclose(update, exact * (moved or length) / length, rtol=1e-12)


class Restless(Algorithm):
    """Two jobs a worker, of unequal steps; cancels one worker's now and then."""

    def __init__(self):
        self.count = 0

    def start(self, server):
        for worker in range(server.n):
            server.assign(worker)
            server.assign(worker, steps=1 + worker % 4)

    def arrive(self, server, update):
        server.apply(0.3 * update.payload)
        self.count += 1
        if self.count % 7 == 0:
            for _ in range(server.cancel(1)):
                server.assign(1, steps=2)
            if update.worker == 1:
                return
        server.assign(update.worker, steps=1 + self.count % 4, shard=self.count % server.n)


@pytest.mark.parametrize("on_outage", ["lose", "reassign"])
def test_what_is_computed_ahead_leaves_no_trace_if_it_is_dropped(on_outage, monkeypatch):
    """Jobs computed ahead in batches and singly when due: the same bits, also of the moments."""
    task = logistic("digits", workers=6)
    fleet = offbeat.Fleet(
        workers=6, speeds="exponential", on_outage=on_outage,
        outages=[offbeat.Outage(worker=w, from_s=9.0 + w, to_s=30.0) for w in (0, 2)],
    )  # fmt: skip
    runs, sizes, once = [], [], task.gradient
    task.gradient = lambda x, w, d: sizes.append(len(x)) or once(x, w, d)
    for alone in (virtual.ALONE_BYTES, 0):
        monkeypatch.setattr(virtual, "ALONE_BYTES", alone)
        sizes.append(0)
        runs.append(offbeat.run(task, Restless(), fleet, work=ADAMW, stop={"seconds": 100}))
        assert (max(sizes[sizes.index(0) :]) > 1) == (alone > 0)
        sizes.clear()
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    np.testing.assert_array_equal(runs[0].trace, runs[1].trace)
    assert runs[0].final == runs[1].final
    assert runs[0].facts["cancelled"] > 10
    assert runs[0].facts["lost"] + runs[0].facts["reassigned"] > 0


def test_what_workers_keep_is_resumed_and_replayed(tmp_path):
    task, fleet = quadratic(5, workers=6, noise=0.3), "6 lognormal(1.0)"
    options = {"work": ADAMW, "evaluate": {"gradients": 50}}
    whole = offbeat.run(
        task, Restless(), fleet, stop={"gradients": 900}, folder=tmp_path / "a", **options
    )
    offbeat.run(task, Restless(), fleet, stop={"gradients": 101}, folder=tmp_path / "b", **options)
    for gradients in (102, 555, 900):
        again = offbeat.resume(
            tmp_path / "b", task=task, algorithm=Restless(),
            overrides=[f"stop.gradients={gradients}"],
        )  # fmt: skip
    np.testing.assert_array_equal(whole.x, again.x)
    for file in ("metrics.jsonl", "trace.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    replayed = offbeat.replay(tmp_path / "b", task=task, algorithm=Restless())
    np.testing.assert_array_equal(whole.x, replayed.x)


def test_a_job_of_h_steps_takes_h_draws_and_h_times_as_long():
    task, seen = quadratic(3, workers=3), {0: [], 1: [], 2: []}
    once = task.gradient

    def watched(x, worker, draw):
        for w, t in zip(worker.tolist(), draw.tolist(), strict=True):
            seen[w].append(t)
        return once(x, worker, draw)

    task.gradient = watched
    result = offbeat.run(
        task, "pure", "3 1..3", work="local-steps(sgd, steps=5)", stop={"gradients": 100}
    )
    assert result.final["gradients"] == 100
    assert len(result.trace) == 20
    for w, draws in seen.items():
        assert sorted(draws) == list(range(len(draws)))
        mine = result.trace[column(result.trace, "worker") == w]
        np.testing.assert_allclose(column(mine, "end_s") - column(mine, "start_s"), 5 * (w + 1))


@pytest.mark.parametrize("law", ["lognormal(1.0)", "markov(10.0, fast_s=5.0, slow_s=5.0)", "1..3"])
def test_local_steps_lengthen_jobs_of_every_law(law):
    from offbeat.workers.speeds import parse

    clock, factors = parse(law), np.array([1.0, 4.0])
    one, many = (clock.clock(2, 0, factors) for _ in range(2))
    for worker in range(2):
        short, long = one.finish(worker, 3, 0.0), many.finish(worker, 3, 0.0, 7)
        if "markov" in law:
            assert long > short
        else:
            assert long == pytest.approx(7 * short)


def test_evaluations_are_at_their_gradients():
    result = offbeat.run(
        "quadratic", "pure", "10 1..10", work="local-steps(sgd, steps=4)",
        stop={"gradients": 400}, evaluate={"gradients": 80},
    )  # fmt: skip
    assert [row["gradients"] for row in result.metrics] == [0, 80, 160, 240, 320, 400]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("local-step", 'no work is called "local-step"; did you mean "local-steps"?'),
        ("local-steps(adam)", 'no inner optimiser is called "adam"; did you mean "adamw"?'),
        ("local-steps(sgd(lr=-1.0))", 'inner optimiser "sgd": "lr" should be greater than 0'),
        (
            "local-steps(muon)",
            "muon needs a task with torch's linear layers, such as lm; take adamw",
        ),
        ("local-steps(steps=0)", 'work "local-steps": "steps" should be greater than or equal'),
        ("local-steps(warmup=9, total=9)", "total=9 must be more than warmup=9"),
        ("local-steps(last_lr=0.01)", "last_lr=0.01 is where a cosine ends; give its total"),
        (
            "local-steps(sgd(lr=0.1), total=9, last_lr=0.2)",
            "last_lr=0.2 is above the learning rate",
        ),
        (7, "7 is no work"),
    ],
)
def test_mistakes_are_told(work, message):
    with pytest.raises(ConfigError) as caught:
        offbeat.run("quadratic", "pure", work=work, stop={"steps": 1})
    assert message in str(caught.value)


def test_work_is_in_the_file(tmp_path):
    offbeat.run(
        "quadratic", "pure(lr=0.5)", "10 1.0", work="local-steps(momentum(lr=0.01), steps=2)",
        stop={"steps": 30}, folder=tmp_path / "r",
    )  # fmt: skip
    again = offbeat.resume(tmp_path / "r", overrides=["stop.steps=60"])
    assert again.experiment.work.spec.table()["inner"] == "momentum(lr=0.01)"
    assert again.final["gradients"] == 120


def test_several_steps_need_work_that_has_steps():
    with pytest.raises(ConfigError, match="assigned 2 local steps to workers that compute one gr"):
        offbeat.run("quadratic", Restless(), stop={"steps": 9})


class Doubled:
    """Work made by hand: twice the gradient."""

    spec, steps = None, 1

    def keep(self, n, x):
        return {}

    def update(self, task, x, worker, draw, steps, kept):
        losses, gradients = task.gradient(x, worker, draw)
        return losses, 2 * gradients


def test_work_made_by_hand_runs_and_resumes_with_its_object(tmp_path):
    options = {"task": "quadratic(5)", "fleet": "10 1..10"}
    twice = offbeat.run(algorithm="pure(lr=0.25)", stop={"steps": 90}, **options)
    offbeat.run(
        algorithm="pure(lr=0.125)", work=Doubled(), stop={"steps": 40}, folder=tmp_path / "r",
        **options,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r'work "python:Doubled".*resume.*work='):
        offbeat.resume(tmp_path / "r")
    again = offbeat.resume(tmp_path / "r", work=Doubled(), overrides=["stop.steps=90"])
    np.testing.assert_array_equal(again.x, twice.x)
    np.testing.assert_array_equal(offbeat.replay(tmp_path / "r", work=Doubled()).x, twice.x)


class Roaming(Algorithm):
    """Plain gradients; every third job is on somebody else's data."""

    def arrive(self, server, update):
        server.apply(0.1 * update.payload)
        if update.number % 3 == 2:
            server.assign(update.worker, shard=(update.worker + 1) % server.n)
        else:
            server.assign(update.worker)


def test_a_shard_gives_no_sample_twice_whoever_asks(tmp_path):
    task, seen = quadratic(3, workers=4, noise=0.1), []
    once = task.gradient
    task.gradient = lambda x, w, d: (
        seen.extend(zip(w.tolist(), d.tolist(), strict=True)) or once(x, w, d)
    )
    result = offbeat.run(task, Roaming(), "4 1..4", stop={"steps": 200}, folder=tmp_path / "r")
    assert len(seen) >= 200
    assert len(set(seen)) == len(seen)
    for shard in range(4):
        draws = sorted(d for w, d in seen if w == shard)
        assert draws == list(range(len(draws)))
    replayed = offbeat.replay(tmp_path / "r", task=task, algorithm=Roaming())
    np.testing.assert_array_equal(result.x, replayed.x)
