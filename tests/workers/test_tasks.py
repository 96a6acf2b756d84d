"""Gradients against finite differences, batches against single calls, samples against theory."""

import numpy as np
import pytest
import torch

import offbeat
from offbeat.runtime.experiment.experiment import from_table
from offbeat.workers.tasks import TASKS as TASK_REGISTRY
from offbeat.workers.tasks import TorchTask, lm, logistic, mlp, quadratic
from offbeat.workers.tasks.shards import FEW, Draws

TASKS = {
    "binary": lambda **k: logistic("breast_cancer", workers=3, l2=0.1, **k),
    "binary nonconvex": lambda **k: logistic(
        "breast_cancer", workers=3, nonconvex=0.1, start=1.0, intercept=True, **k
    ),
    "multinomial": lambda **k: logistic("digits", workers=3, nonconvex=0.01, **k),
    "mlp relu": lambda **k: mlp("iris", workers=3, hidden=[5, 4], l2=0.01, **k),
    "mlp tanh": lambda **k: mlp("iris", workers=3, hidden=[5], activation="tanh", **k),
}
EVERY = pytest.mark.parametrize("name", TASKS)


@EVERY
@pytest.mark.parametrize("batch", [7, "full"])
def test_gradient_is_the_derivative_of_the_loss(name, batch):
    task = TASKS[name](dtype="float64", batch=batch)
    g = np.random.default_rng(0)
    x = task.initial(0) + 0.3 * g.standard_normal(task.dim)
    worker, draw = np.array([1]), np.array([4])
    _, gradient = task.gradient(x[None], worker, draw)
    for _ in range(5):
        v, h = g.standard_normal(task.dim), 1e-6
        ahead, _ = task.gradient((x + h * v)[None], worker, draw)
        behind, _ = task.gradient((x - h * v)[None], worker, draw)
        assert float((ahead - behind)[0] / (2 * h)) == pytest.approx(
            float(gradient[0] @ v), rel=1e-5, abs=1e-7
        )


@EVERY
def test_objective_is_the_mean_of_the_workers_full_losses(name):
    task = TASKS[name](dtype="float64", batch="full", partition="dirichlet(1.0)")
    x = task.initial(0) + 0.1
    losses, gradients = task.gradient(np.tile(x, (3, 1)), np.arange(3), np.zeros(3, int))
    facts = task.evaluate(x)
    assert facts["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert facts["grad_norm"] == pytest.approx(np.linalg.norm(gradients.mean(axis=0)), rel=1e-9)
    assert 0 <= facts["accuracy"] <= 1


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampling", ["replacement", "passes"])
def test_a_row_does_not_depend_on_its_batch(name, dtype, sampling):
    """Bit for bit: alone, in a small batch, in one that is cut into several pieces."""
    task = TASKS[name](dtype=dtype, sampling=sampling, batch=16)
    g = np.random.default_rng(1)
    k = 700
    x = g.standard_normal((k, task.dim)).astype(dtype)
    worker, draw = g.integers(3, size=k), g.integers(200, size=k)
    losses, gradients = task.gradient(x, worker, draw)
    assert gradients.dtype == np.dtype(dtype)
    for size in (1, 2, FEW, FEW + 1, 150):
        for first in (0, 333):
            part = slice(first, first + size)
            some_losses, some = task.gradient(x[part], worker[part], draw[part])
            np.testing.assert_array_equal(some, gradients[part])
            np.testing.assert_array_equal(some_losses, losses[part])


def test_mlp_equals_torch():
    task = mlp("digits", workers=2, hidden=[8], dtype="float64", batch="full")
    x = task.initial(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    net.double()
    with torch.no_grad():
        at = 0
        for layer in (net[0], net[2]):
            i, o = layer.in_features, layer.out_features
            layer.weight.copy_(torch.from_numpy(x[at : at + i * o].reshape(i, o).T.copy()))
            layer.bias.copy_(torch.from_numpy(x[at + i * o : at + i * o + o].copy()))
            at += i * o + o
    shards = task.shards
    mine = shards.draws.share(1)
    a, y = torch.from_numpy(shards.features[mine]), torch.from_numpy(shards.labels[mine])
    value = torch.nn.functional.cross_entropy(net(a), y)
    value.backward()
    loss, gradient = task.gradient(x[None], np.array([1]), np.array([0]))
    assert float(loss[0]) == pytest.approx(value.item(), rel=1e-12)
    expected = [p.grad.T.reshape(-1) if p.grad.ndim == 2 else p.grad for p in net.parameters()]
    np.testing.assert_allclose(gradient[0], torch.cat(expected).numpy(), rtol=1e-9, atol=1e-15)


def test_samples_are_uniform_and_uncorrelated():
    draws = Draws([np.arange(0, 50), np.arange(50, 150)], batch=40, sampling="replacement", seed=1)
    rows = draws.rows(np.ones(5000, int), np.arange(5000))
    assert rows.min() == 50
    assert rows.max() == 149
    counts = np.bincount(rows.ravel() - 50, minlength=100)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 60 < chi2 < 150  # 99 degrees of freedom: mean 99, deviation 14
    centred = rows - rows.mean()
    for shifted in (
        (centred[1:] * centred[:-1]).mean(),  # the next job, same place
        (centred[:, 1:] * centred[:, :-1]).mean(),  # the same job, next place
        (centred[1:, :-1] * centred[:-1, 1:]).mean(),
    ):
        assert abs(shifted) / centred.var() < 0.01


def test_passes_visit_every_sample_once():
    draws = Draws([np.arange(10), np.arange(10, 33)], batch=7, sampling="passes", seed=1)
    rows = draws.rows(np.ones(23, int), np.arange(23)).ravel()
    for one_pass in rows.reshape(7, 23):
        assert sorted(one_pass) == list(range(10, 33))
    assert len({tuple(one_pass) for one_pass in rows.reshape(7, 23).tolist()}) == 7


def test_noise_of_the_quadratic_has_its_variance():
    task = quadratic(50, workers=2, noise=0.7, seed=5)
    k = 4000
    x = np.zeros((k, 50))
    _, gradients = task.gradient(x, np.ones(k, int), np.arange(k))
    noise = gradients + task.centers[1]
    assert noise.std() == pytest.approx(0.7, rel=0.01)
    assert abs(noise.mean()) < 0.01
    quiet = quadratic(50, workers=2, seed=5, condition=10.0)
    assert quiet.curvature.max() / quiet.curvature.min() == pytest.approx(10)


# -- TorchTask ---------------------------------------------------------------------------------


def torch_task(module=None, **options):
    g = torch.Generator().manual_seed(0)
    a, y = torch.randn(60, 6, generator=g), torch.randint(3, (60,), generator=g)
    torch.manual_seed(1)
    module = module or torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    )
    dataset = torch.utils.data.TensorDataset(a.double(), y)
    loss = torch.nn.functional.cross_entropy
    options = {"workers": 4, "batch": 8, **options}
    return TorchTask(module.double(), loss, dataset, **options)


def test_torch_batched_equals_one_by_one():
    task = torch_task(partition="sorted")
    k = 40
    g = np.random.default_rng(0)
    x = task.initial(0) + 0.1 * g.standard_normal((k, task.dim))
    worker, draw = g.integers(4, size=k), g.integers(9, size=k)
    losses, gradients = task.gradient(x, worker, draw)
    for j in range(k):
        part = slice(j, j + 1)
        loss, gradient = task.gradient(x[part], worker[part], draw[part])
        np.testing.assert_allclose(gradient[0], gradients[j], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(loss, losses[part], rtol=1e-12)


def test_torch_objective_matches_its_gradients_and_trains():
    task = torch_task(batch="full")
    x = task.initial(0)
    losses, gradients = task.gradient(np.tile(x, (4, 1)), np.arange(4), np.zeros(4, int))
    facts = task.evaluate(x)
    assert facts["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert facts["grad_norm"] == pytest.approx(np.linalg.norm(gradients.mean(0)), rel=1e-9)
    result = offbeat.run(
        torch_task(), "shuffled(lr=0.2)", "4 1..4", stop={"steps": 400}, evaluate={"steps": 400}
    )
    assert result.final["loss"] < 0.8 * facts["loss"]


def test_torch_map_style_dataset_and_dropout_are_addressed():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return torch.full((2,), float(i) / 30), torch.tensor([float(i) ** 2 / 900])

    module = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
    )
    loss = torch.nn.functional.mse_loss
    task = TorchTask(module, loss, Squares(), workers=3, batch=5)
    x = np.tile(task.initial(0), (20, 1))
    worker, draw = np.arange(20) % 3, np.arange(20)
    _, first = task.gradient(x, worker, draw)
    torch.manual_seed(99)
    _, again = task.gradient(x[3:5], worker[3:5], draw[3:5])
    np.testing.assert_array_equal(first[3:5], again)
    assert "accuracy" not in task.evaluate(task.initial(0))


def test_a_module_that_cannot_be_vmapped_is_looped_over(caplog):
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, a):
            return self.layer(a) if float(a.sum()) > -1e9 else a

    task = torch_task(Branch())
    x = np.tile(task.initial(0), (20, 1))
    with caplog.at_level("WARNING", logger="offbeat"):
        task.gradient(x, np.zeros(20, int), np.arange(20))
        task.gradient(x, np.zeros(20, int), np.arange(20))
    assert sum("cannot be vmapped" in r.message for r in caplog.records) == 1


def test_running_statistics_are_refused():
    module = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(offbeat.ConfigError, match="running statistics"):
        torch_task(module)


def test_frozen_parameters_stay_and_functional_dropout_is_addressed():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)
            self.a.requires_grad_(False)

        def forward(self, x):
            return self.b(torch.nn.functional.dropout(self.a(x), 0.5, self.training))

    task = torch_task(Net())
    assert task.dim == 5 * 3 + 3
    fleet = offbeat.Fleet(workers=4, speeds="exponential")
    one, other = (offbeat.run(task, "pure", fleet, stop={"steps": 40}) for _ in range(2))
    np.testing.assert_array_equal(one.x, other.x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "\"batch\" should be greater than or equal to 1, or should be 'full'|batch"),
        ({"sampling": "pass"}, "sampling.*'replacement' or 'passes'"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
        ({"wrkers": 3}, 'did you mean "workers"'),
    ],
)
def test_torch_task_mistakes_are_one_sentence(options, said):
    with pytest.raises(offbeat.ConfigError, match=said) as caught:
        torch_task(**options)
    assert str(caught.value).startswith("TorchTask: ")


MINE = """
import torch
from {beside} import WIDTH

def make():
    a = torch.arange(60.0).reshape(30, 2) / 60
    data = torch.utils.data.TensorDataset(a, a.sum(1, keepdim=True))
    return torch.nn.Linear(WIDTH, 1), torch.nn.functional.mse_loss, data

def wrong():
    return torch.nn.Linear(WIDTH, 1)
"""


@pytest.fixture
def mine(tmp_path):
    """A file of a user's, which imports another beside it."""
    (tmp_path / "width_of_mine.py").write_text("WIDTH = 2\n")
    (tmp_path / "mine.py").write_text(MINE.format(beside="width_of_mine"))
    return tmp_path / "mine.py"


def test_a_file_of_ones_own_is_a_task_in_a_run_folder_too(mine, tmp_path):
    result = offbeat.run(f"torch:{mine}", "pure(lr=0.1)", "3 1..3", stop={"steps": 60}, seed=5,
                         folder=tmp_path / "run")  # fmt: skip
    task = result.experiment.task
    assert result.final["loss"] < 0.1 * result.metrics[0]["loss"]
    np.testing.assert_array_equal(offbeat.replay(tmp_path / "run").x, result.x)
    other = TASK_REGISTRY.parse(f"torch:{mine}", workers=3, seed=6)
    assert task.dim == 3
    assert not np.array_equal(task.initial(0), other.initial(0))  # the seed is of the module, too


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"make": "mak"}, 'has no function "mak"; did you mean "make"'),
        ({"make": "wrong"}, r"wrong\(\) in .* answered Linear, not \(module, loss, dataset\)"),
        ({"file": "nowhere.py"}, "there is no file nowhere.py"),
    ],
)
def test_mistakes_of_a_file_of_ones_own(mine, options, said):
    with pytest.raises(offbeat.ConfigError, match=said):
        TASK_REGISTRY.table({"name": "torch", "file": str(mine), **options})


@pytest.mark.parametrize("written", ["torch:{}", {"name": "torch", "file": "{}"}])
def test_a_table_from_elsewhere_runs_no_file(mine, written):
    """What a server sends to a worker is read so."""
    mine.write_text("raise AssertionError('it ran')")
    task = written.format(mine) if isinstance(written, str) else {**written, "file": str(mine)}
    with pytest.raises(offbeat.ConfigError, match="nobody elsewhere may name"):
        from_table({"task": task, "algorithm": "pure"})
    with pytest.raises(AssertionError, match="it ran"):
        from_table({"task": task, "algorithm": "pure"}, ours=True)


def test_a_file_of_ones_own_is_not_served(mine):
    with pytest.raises(offbeat.ConfigError, match='"own-loop", and let your loops join'):
        offbeat.run(f"torch:{mine}", "pure", "3", engine="zmq")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_task_moves_to_a_device_that_is_there():
    task = lm(workers=2)
    assert task.to("cpu") is task
    with pytest.raises(offbeat.ConfigError, match=r'device "cuda" is not there; torch sees no GPU'):
        task.to("cuda")
