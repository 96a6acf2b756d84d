"""Computing on a device: the same numbers, few crossings, refusals.

Without a GPU, "cpu:0" takes every line that one takes but for page-locked memory and waiting for
streams, which are looked at with stand-ins.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from devices import DEVICES

import offbeat
from offbeat.algorithms.compression import decode
from offbeat.runtime.base import tensors
from offbeat.runtime.compute.backend import JobRequest, Runner
from offbeat.runtime.on_zeromq.worker import Worker
from offbeat.workers.compressed import SENT
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


def same(there, one, other, **room):
    """To the bit on a CPU; a GPU rounds in its own way."""
    if there == "cpu:0":
        np.testing.assert_array_equal(one, other)
    else:
        np.testing.assert_allclose(one, other, **room)


@pytest.mark.parametrize("k", [1, 2, 20])  # 20 are vmapped
@pytest.mark.parametrize("made", [text, tables])
@pytest.mark.parametrize("name", DEVICES)
def test_gradients_on_a_device_are_the_same_and_arrays(name, made, k):
    here, there = made(), made(name)
    assert (here.apart, there.apart) == (False, True)
    x, worker, draw = jobs(here, k)
    before = x.copy()
    for one, other in zip(
        here.gradient(x, worker, draw), there.gradient(x, worker, draw), strict=True
    ):
        assert type(other) is np.ndarray
        same(name, one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(x, before)
    one, other = here.evaluate(x[0]), there.evaluate(x[0])
    assert other == (one if name == "cpu:0" else pytest.approx(one, rel=1e-4))


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
@pytest.mark.parametrize("name", DEVICES)
def test_local_steps_on_a_device_are_the_same(name, work, exact):
    """Two jobs of two workers, of unlike numbers of steps: losses, updates, what is kept."""
    work, found = WORK.parse(work), []
    for task in (text(), text(name)):
        x, worker, _ = jobs(task, 2)
        kept, before = work.keep(2, x[0]), x.copy()
        work.update(task, x, worker, np.array([0, 9]), np.array([3, 3]), kept)
        losses, updates = work.update(task, x, worker, np.array([4, 20]), np.array([2, 3]), kept)
        np.testing.assert_array_equal(x, before)
        assert type(updates) is np.ndarray
        found.append({"losses": losses, "updates": updates} | kept)
    one, other = found
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        same(name if exact else "", one[key], other[key], rtol=1e-4, atol=2e-6)


def crossings(monkeypatch):
    """Numbers that are loaded and fetched from now on."""
    crossed = {"load": 0, "fetch": 0}

    def counted(name, really):
        def cross(x, *more):
            if name == "load" or torch.is_tensor(x):
                crossed[name] += x.size if name == "load" else x.numel()
            return really(x, *more)

        return cross

    for name in crossed:
        really = getattr(tensors, name)
        for module in [m for n, m in sys.modules.items() if n.startswith("offbeat.")]:
            if getattr(module, name, None) is really:
                monkeypatch.setattr(module, name, counted(name, really))
    return crossed


@pytest.mark.parametrize(
    ("work", "vectors"), [("gradient", 1), ("local-steps(sgd)", 1), ("local-steps(adamw)", 3)]
)
@pytest.mark.parametrize("name", DEVICES)
def test_vectors_cross_once_each_way_a_job(monkeypatch, name, work, vectors):
    """The model, and what the worker keeps, whatever the number of local steps."""
    work, task = WORK.parse(work), text(name)
    x, worker, draw = jobs(task, 1)
    crossed = crossings(monkeypatch)
    work.update(task, x, worker, draw, np.array([5]), work.keep(1, x[0]))
    assert crossed["fetch"] // task.dim == vectors
    assert crossed["load"] // task.dim == vectors
    assert max(crossed.values()) % task.dim < 5 * 4 * 17  # and the samples' places


@pytest.mark.parametrize("compressor", ["topk(0.01)", "scaled-sign", "bf16", "blocks(topk(1), 64)"])
@pytest.mark.parametrize("name", DEVICES)
def test_of_compressed_updates_only_messages_are_fetched(monkeypatch, name, compressor):
    """A process's second job: its model is loaded; h is there."""
    work, task = WORK.parse(f"compressed({compressor}, local-steps(sgd, steps=3))"), text(name)
    runner, x = Runner(task, work), task.initial(0)
    runner.compute([JobRequest(0, 1, 1, 0, 3, 0, x, work.keep(1, x))])
    assert torch.is_tensor(runner._kept[1][SENT])
    before = tensors.fetch(runner._kept[1][SENT]).copy()
    crossed = crossings(monkeypatch)
    (answer,) = runner.compute([JobRequest(1, 1, 1, 3, 3, 0, x, None)])
    message = decode([answer.payload], task.dim)
    halves = compressor == "bf16"  # as many numbers as there are, in half of the bytes
    assert crossed["fetch"] <= (1.01 if halves else 0.14) * task.dim
    assert crossed["load"] <= (2.1 if halves else 1.2) * task.dim
    monkeypatch.undo()
    np.testing.assert_array_equal(
        tensors.fetch(runner._kept[1][SENT]), before + message.dense()[None]
    )


@pytest.mark.parametrize("work", ["gradient", "local-steps(momentum, steps=3)"])
@pytest.mark.parametrize("compressor", ["topk(0.01)", "natural", "randk(0.1), feedback=false"])
@pytest.mark.parametrize("name", DEVICES)
def test_compressed_updates_are_the_same_wherever_they_are_compressed(name, compressor, work):
    """Also those of compressors that know no devices; jobs of several workers in one process."""
    compressor, _, more = compressor.partition(", ")
    if compressor == "natural":
        more = "feedback=false"
    work, found = WORK.parse(f"compressed({compressor}, {work}{more and ', '}{more})"), []
    for task in (text(), text(name)):
        runner, x = Runner(task, work), task.initial(0)
        orders = [JobRequest(i, i % 2, i % 2, 5 * i, 3, 0, x, None) for i in range(4)]
        answers = runner.compute(orders[:2]) + runner.compute(orders[2:])
        found.append([decode([a.payload], task.dim).dense() for a in answers])
        kept, three = work.keep(2, x), np.array([3, 3])
        job = np.array([x, x]), np.arange(2), np.array([0, 5]), three, kept
        losses, updates = work.update(task, *job)
        assert {type(one) for one in (losses, updates, *kept.values())} == {np.ndarray}
        np.testing.assert_array_equal(updates, found[-1][:2])
    for one, other in zip(*found, strict=True):
        if name == "cpu:0":
            np.testing.assert_array_equal(one, other)
        else:  # an entry at the edge may be kept by one and not by the other
            assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(one)


@pytest.mark.parametrize("name", DEVICES)
def test_moments_stay_on_the_device_and_are_told(monkeypatch, name):
    """A process's second job: the model crosses once there, update and moments once back."""
    work, task = WORK.parse("local-steps(adamw, steps=3)"), text(name)
    runner, x = Runner(task, work), task.initial(0)
    (first,) = runner.compute([JobRequest(0, 1, 1, 0, 3, 0, x, None)])
    before = {key: row.copy() for key, row in first.kept.items()}
    crossed = crossings(monkeypatch)
    (second,) = runner.compute([JobRequest(1, 1, 1, 3, 3, 0, x, None)])
    assert (crossed["load"] // task.dim, crossed["fetch"] // task.dim) == (1, 3)
    monkeypatch.undo()
    again = Runner(task, work)  # another process, which is told what the first one kept
    (same_one,) = again.compute([JobRequest(1, 1, 1, 3, 3, 0, x, before)])
    np.testing.assert_array_equal(second.payload, same_one.payload)
    for key, row in second.kept.items():
        assert type(row) is np.ndarray
        np.testing.assert_array_equal(row, same_one.kept[key])
        np.testing.assert_array_equal(first.kept[key], before[key])


def test_dropout_leaves_the_generator_as_it_was():
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(), torch.nn.Linear(4, 3))
    data = torch.utils.data.TensorDataset(torch.randn(60, 5), torch.randint(3, (60,)))
    task = TorchTask(module, torch.nn.functional.cross_entropy, data, workers=3, batch=4)
    x, worker, draw = jobs(task, 1)
    state = torch.get_rng_state()
    one, other, third = (task.gradient(x, worker, at)[1] for at in (draw, draw, draw + 1))
    np.testing.assert_array_equal(one, other)
    assert (one != third).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_parameters_are_one():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (
                torch.nn.Linear(4, 4, bias=False),
                torch.nn.Linear(4, 4, bias=False),
            )
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    module, data = Tied(), torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 4))
    loss = torch.nn.functional.mse_loss
    task = TorchTask(module, loss, data, workers=1, batch="full")
    assert task.dim == 16
    x = task.initial(0)
    value = loss(module(data.tensors[0][task._order]), data.tensors[1][task._order])
    value.backward()
    found = task.gradient(x[None], np.array([0]), np.array([0]))[1]
    np.testing.assert_allclose(found[0], module.one.weight.grad.ravel(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_not_finite_on_a_device_is_told(name):
    task, work = text(name), WORK.parse("compressed(topk(0.1))")
    x = np.full(task.dim, np.inf, np.float32)
    (answer,) = Runner(task, work).compute([JobRequest(0, 0, 0, 0, 1, 0, x, None)])
    assert np.isnan(answer.loss)
    assert np.isfinite(decode([answer.payload], task.dim).dense()).all()


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
    monkeypatch.setattr(tensors, "is_tensor", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert tensors.fetch(There()).tolist() == [1, 1, 1]
    assert done == [("locked", True), ("copy", True), "awaited", "read"]
    assert not tensors.memory(3, torch.float32, torch.device("cpu")).is_pinned()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("work", ["{}", "compressed(topk(0.1), {})"])
def test_a_whole_run_on_a_device_is_the_same(work, name):
    work = work.format("local-steps(momentum, steps=3)")
    one, other = (
        offbeat.run(made, "delayed-nesterov", "3 1..3", work=work, stop={"gradients": 30})
        for made in (text(), text(name))
    )
    if name == "cpu:0":
        np.testing.assert_array_equal(one.x, other.x)
    assert other.final["loss"] == pytest.approx(one.final["loss"], rel=0.02)


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
