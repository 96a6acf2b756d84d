"""Computing on a device: the same numbers, few crossings, refusals.  No GPU is needed.

"cpu:0" takes every line that a GPU takes but for page-locked memory and waiting for streams, which
are looked at with stand-ins.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import offbeat
from offbeat.runtime.net.worker import Worker
from offbeat.workers.tasks import TorchTask, device, lm, logistic, mixtures, mlp, quadratic
from offbeat.workers.work import WORK

SMALL = {"length": 16, "batch": 4, "evaluated": 8, "workers": 3}


def text(name="cpu"):
    return lm(**SMALL, device=name)


def tables(name="cpu"):
    """A task of a TensorDataset, whose module can be vmapped."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = torch.utils.data.TensorDataset(torch.randn(60, 5), torch.randint(3, (60,)))
    loss = torch.nn.functional.cross_entropy
    return TorchTask(module, loss, data, workers=3, batch=4, device=name)


def jobs(task, k):
    x = np.tile(task.initial(0), (k, 1)) * np.linspace(0.9, 1.1, k, dtype=np.float32)[:, None]
    return x, np.arange(k) % 3, np.arange(k) * 7


@pytest.mark.parametrize("k", [1, 2, 20])  # 20 are vmapped
@pytest.mark.parametrize("made", [text, tables])
def test_gradients_on_a_device_are_the_same_and_arrays(made, k):
    here, there = made(), made("cpu:0")
    assert (here.apart, there.apart) == (False, True)
    x, worker, draw = jobs(here, k)
    before = x.copy()
    for one, other in zip(
        here.gradient(x, worker, draw), there.gradient(x, worker, draw), strict=True
    ):
        assert type(other) is np.ndarray
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(x, before)
    assert here.evaluate(x[0]) == there.evaluate(x[0])


@pytest.mark.parametrize(
    ("work", "exact"),
    [
        ("local-steps(sgd(weight_decay=0.1), steps=3)", True),
        ("local-steps(momentum(nesterov=true), steps=3)", True),
        ("local-steps(momentum, steps=3, fresh=true)", True),
        # torch's square roots are not rounded as numpy's, nor are its sums taken in that order.
        ("local-steps(adamw(weight_decay=0.1), steps=4, warmup=2)", False),
        ("local-steps(adamw, steps=4, clip=0.1)", False),
        ("local-steps(muon, steps=3)", False),
    ],
)
def test_local_steps_on_a_device_are_the_same(work, exact):
    """Two jobs of two workers, of unlike numbers of steps: losses, updates, what is kept."""
    work, found = WORK.parse(work), []
    for task in (text(), text("cpu:0")):
        x, worker, _ = jobs(task, 2)
        kept, before = work.keep(2, x[0]), x.copy()
        work.update(task, x, worker, np.array([0, 9]), np.array([3, 3]), kept)
        losses, updates = work.update(task, x, worker, np.array([4, 20]), np.array([2, 3]), kept)
        np.testing.assert_array_equal(x, before)
        assert type(updates) is np.ndarray
        found.append({"losses": losses, "updates": updates} | kept)
    one, other = found
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        if exact:
            np.testing.assert_array_equal(one[name], other[name])
        else:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("work", "vectors"), [("gradient", 1), ("local-steps(sgd)", 1), ("local-steps(adamw)", 3)]
)
def test_vectors_cross_once_each_way_a_job(monkeypatch, work, vectors):
    """The model, and what the worker keeps, whatever the number of local steps."""
    work, crossed = WORK.parse(work), {"load": 0, "fetch": 0}
    task = text("cpu:0")

    def counted(name):
        really = getattr(device, name)

        def cross(x, *more):
            crossed[name] += x.shape == (1, task.dim)
            return really(x, *more)

        return cross

    for name in crossed:
        monkeypatch.setattr(device, name, counted(name))
    x, worker, draw = jobs(task, 1)
    work.update(task, x, worker, draw, np.array([5]), work.keep(1, x[0]))
    assert crossed == {"load": vectors, "fetch": vectors}


def test_what_a_gpu_computed_is_awaited_in_page_locked_memory(monkeypatch):
    done = []
    real = torch.empty

    class There:
        device, shape, dtype = SimpleNamespace(type="cuda"), (3,), torch.float32

    class Here:
        def copy_(self, x, non_blocking):
            done.append(("copy", non_blocking))

        def numpy(self):
            done.append("read")
            return np.ones(3, np.float32)

    def empty(size, dtype, pin_memory):
        done.append(("locked", pin_memory))
        return Here() if pin_memory else real(size, dtype=dtype)

    stream = SimpleNamespace(synchronize=lambda: done.append("awaited"))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert device.fetch(There()).tolist() == [1, 1, 1]
    assert done == [("locked", True), ("copy", True), "awaited", "read"]
    assert not device.memory(3, torch.float32, torch.device("cpu")).is_pinned()


def test_a_whole_run_on_a_device_is_the_same():
    options = {"work": "local-steps(momentum, steps=3)", "stop": {"gradients": 30}}
    one, other = (
        offbeat.run(made, "delayed-nesterov", "3 1..3", **options)
        for made in (text(), text("cpu:0"))
    )
    np.testing.assert_array_equal(one.x, other.x)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: mixtures(4, samples=64), "mixtures"),
        (lambda: mlp("iris"), "mlp"),
        (lambda: logistic("iris"), "logistic"),
        (lambda: quadratic(5), "quadratic"),
    ],
)
def test_what_numpy_computes_says_what_can_move(made, name):
    task = made()
    with pytest.raises(offbeat.ConfigError) as caught:
        device.placed(task, "cuda:0")
    assert str(caught.value) == (
        f'{name} is computed by numpy, on the CPU; on device "cuda:0" can be computed lm, and any '
        "TorchTask"
    )
    assert device.placed(task, "cpu") is task


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "mps", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(offbeat.ConfigError, match=f'"{name}" is no device; give cpu, cuda or'):
        device.found(name)


def test_a_device_that_is_not_there_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.found("cuda:1") == torch.device("cuda:1")
    with pytest.raises(offbeat.ConfigError, match=r'"cuda:2" .* torch sees cuda:0 to cuda:1'):
        device.found("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for begin in (
        lambda: Worker("tcp://127.0.0.1:1", device="cuda:0"),
        lambda: device.check(tables(), "cuda:0", here=True),
        lambda: device.placed(tables(), "cuda:0"),
        lambda: tables("cuda:0"),
    ):
        with pytest.raises(offbeat.ConfigError, match=r'"cuda:0" is not there; torch sees no GPU'):
            begin()
    device.check(tables(), "cuda:0")  # it may be on the machine that is asked for it
