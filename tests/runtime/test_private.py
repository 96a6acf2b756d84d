"""Code of a user's own, in place and with torch: nobody else's memory changes."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from canonical import METHODS as GOSSIP
from modules import made
from servers import METHODS, WORKS, make
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import offbeat
from offbeat.algorithms.compression.identity import Identity
from offbeat.algorithms.gossip import Channel, Gossip
from offbeat.algorithms.server import Algorithm
from offbeat.runtime.compute.backend import JobRequest, Runner
from offbeat.workers.compressed import Compressed
from offbeat.workers.speeds import Constant, Law
from offbeat.workers.tasks.contract import guarded
from offbeat.workers.tasks.empirical import EmpiricalRisk
from offbeat.workers.tasks.mlp import MLP
from offbeat.workers.tasks.shards import Shards
from offbeat.workers.work import WORK, Gradient

Q = "quadratic(10, noise=0.1)"


class Positive(nn.Module):
    """Non-negative weights, as they are usually written."""

    def __init__(self, graph=False):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.graph = nn.Parameter(torch.randn(6, 3)), graph

    def forward(self, a):
        if self.graph:
            with torch.no_grad():
                self.w.clamp_(min=0)
        else:
            self.w.data.clamp_(min=0)
        return a @ self.w


def in_place(outputs, targets):
    targets.mul_(0.5)
    return F.mse_loss(outputs, targets)


class Rude:
    """A numpy task whose torch computes on what it is given, and which answers what it keeps."""

    spec, workers, dim = None, 3, 4

    def __init__(self):
        self.start, self.answer = np.full(4, 3.0), np.zeros((64, 4))

    def initial(self, seed):
        return self.start

    def gradient(self, x, worker, draw):
        t = torch.from_numpy(x).clamp_(max=1.0)
        found = self.answer[: len(x)]
        found[:] = t.numpy() - worker[:, None]
        return found.sum(1), found

    def evaluate(self, x):
        torch.from_numpy(x).mul_(0.5)
        return {"loss": float((x**2).sum())}


class Forgetful(Rude):
    def gradient(self, x, worker, draw):
        return np.zeros(len(x)), np.random.default_rng().random(x.shape)


@pytest.mark.parametrize("more", [{}, {"topology": "ring"}, {"engine": "ray"}])
def test_a_task_of_ones_own_whose_jobs_do_not_repeat_is_refused(more):
    method = "dsgd" if "topology" in more else "pure"
    with pytest.raises(offbeat.ConfigError, match="Forgetful: a job computed again, after another"):
        offbeat.run(Forgetful(), method, "3 1..3", stop={"steps": 5}, **more)


class Lacking(Rude):
    """It needs what this machine does not have."""

    def gradient(self, x, worker, draw):
        raise RuntimeError("no GPU")


class Elsewhere:
    spec, clocks = None, ("virtual",)

    def backend(self, experiment, folder=None):
        raise LookupError("processes are asked for")


@pytest.mark.parametrize(("engine", "met"), [("virtual", RuntimeError), (Elsewhere(), LookupError)])
def test_a_task_need_not_compute_here_what_others_compute(engine, met):
    with pytest.raises(met):
        offbeat.run(Lacking(), "pure", "3", stop={"steps": 5}, engine=engine)


class Halving(Gradient):
    """A work that changes the model it is given."""

    def update(self, task, x, worker, draw, steps, kept):
        torch.from_numpy(x).mul_(0.5)
        return task.gradient(x, worker, draw)


class Pure(Algorithm):
    """Whose author computes in place."""

    def arrive(self, server, update):
        torch.from_numpy(update.x).fill_(100.0)
        torch.from_numpy(server.x).mul_(1.5)
        server.apply(0.1 * update.payload)
        torch.from_numpy(update.payload).fill_(100.0)
        server.assign(update.worker)


class Handing(Algorithm):
    """Hands out models, which it then changes if it is ``rude``."""

    def __init__(self, how, rude):
        self.how, self.rude, self.held = how, rude, None

    def arrive(self, server, update):
        server.apply(0.1 * update.payload)
        if self.held is None or not self.rude:
            self.held = np.zeros_like(server.x)
        self.held[:] = 0.5 * server.x
        how = {"at": self.held} if self.how == "at" else {"like": update}
        server.assign(update.worker, **how)
        if self.rude and self.how == "like":
            update.x[:] = 3.0


@pytest.mark.parametrize("how", ["at", "like"])
def test_models_that_a_method_hands_out_are_what_they_were(how):
    runs = [offbeat.run(Q, Handing(how, rude), "4 1..4", stop={"steps": 50}) for rude in (0, 1)]
    np.testing.assert_array_equal(runs[0].x, runs[1].x)


def setting(server, update):
    server.x -= 0.1 * update.payload


WRONG = {
    "set": (setting, r"sets server\.x, which changes nothing; server\.apply\(delta\)"),
    "column": (lambda s, u: s.apply(u.payload[:, None]), r"of shape \[10, 1\]; the model's"),
    "number": (lambda s, u: s.apply(0.1), r"a step of shape \[\]; the model's is \[10\]"),
}


def by(does):
    return type("Mine", (Algorithm,), {"arrive": lambda self, server, update: does(server, update)})


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_method_cannot_do_is_said(wrong):
    does, sentence = WRONG[wrong]
    with pytest.raises(offbeat.ConfigError, match=sentence):
        offbeat.run(Q, by(does)(), "4 1..4", stop={"steps": 50, "wall_s": 5})


def test_steps_of_another_precision_leave_the_models():
    def apply(server, update):
        server.apply(torch.from_numpy(np.float64(0.1) * update.payload))
        server.assign(update.worker)

    task = made()
    one = offbeat.run(task, by(apply)(), "3 1..3", stop={"steps": 50})
    other = offbeat.run(task, "pure(lr=0.1)", "3 1..3", stop={"steps": 50})
    assert one.x.dtype == np.float32
    np.testing.assert_allclose(one.x, other.x, rtol=1e-4, atol=1e-6)


def derived(method):
    """As a user would derive it, changing nothing."""
    method = copy.deepcopy(method)
    method.__class__ = type("Mine", (type(method),), {"__module__": "mine"})
    return method


@pytest.mark.parametrize("name", [*METHODS, *GOSSIP])
def test_a_method_that_is_derived_from_ours_is_it(name):
    method = make(name) if name in METHODS else GOSSIP[name]
    more = {"work": WORKS.get(name, "gradient")} if name in METHODS else {"topology": "complete"}
    modes = [{}] if name in METHODS else [{"mode": "synchronous"}, {"mode": "asynchronous"}]
    for mode in modes:
        if mode and not getattr(method, mode["mode"]):
            continue
        one, other = (
            offbeat.run("quadratic(10, noise=0.1, workers=8)", m, "8 1..8", stop={"steps": 30},
                        evaluate={"steps": 7}, **more, **mode)
            for m in (method, derived(method))
        )  # fmt: skip
        np.testing.assert_array_equal(one.x, other.x)
        assert one.metrics == other.metrics


class Dsgd(Gossip):
    """Whose author computes in place if it is ``rude``, else as the contract wants it."""

    def __init__(self, rude):
        super().__init__({"x": Channel()})
        self.rude = rude

    def sum(self, a, b):
        return np.add(a, b, out=a if self.rude else None)

    def init(self, node):
        node.publish("x", node.x)
        return node.x

    def begin(self, node, gradient):
        node.x = self.sum(node.x, -0.1 * gradient)

    def ask(self, node):
        mixed = node.mix("x")
        node.x = self.sum(node.x, self.sum(mixed, 0.1 * mixed))
        return node.x

    def tell(self, node, gradient):
        node.publish("x", node.x)
        node.x = self.sum(node.x, -0.1 * gradient)

    def models(self, node):
        return self.sum(node.x, 1.0)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_gossip_method_of_ones_own_may_compute_in_place(mode):
    one, other = (
        offbeat.run(Q, Dsgd(rude), "4 1..4", topology="ring", mode=mode, stop={"steps": 50})
        for rude in (True, False)
    )
    assert one.metrics == other.metrics
    np.testing.assert_array_equal(one.x, other.x)


class Emptying(Identity):
    def _compress(self, x, rng):
        message = super()._compress(x.copy(), rng)
        x[:] = 0
        return message


def test_a_compressor_of_ones_own_leaves_what_it_compresses():
    for x in (np.ones((2, 3)), torch.ones(2, 3)):
        np.testing.assert_array_equal(Emptying().compress(x).dense(), np.ones((2, 3)))
        np.testing.assert_array_equal(x, np.ones((2, 3)))


class Shouting(MLP):
    """A model of a user's own, which changes the samples it is given."""

    def gradient(self, x, a, y, c):
        a *= 0.5
        y[:] = 0
        return super().gradient(x, a, y, c)


def test_a_model_of_ones_own_leaves_the_data_as_they_are():
    a, y = np.random.default_rng(0).random((30, 4)), np.arange(30) % 3
    shards = Shards(a, y, [np.arange(15), np.arange(15, 30)], batch="full")
    task = EmpiricalRisk(shards, Shouting([4, 5, 3]))
    x = np.ones((1, task.dim))
    first = task.evaluate(x[0])
    for _ in range(2):
        task.gradient(x, np.array([1]), np.array([0]))
    assert task.evaluate(x[0]) == first
    np.testing.assert_array_equal(shards.features, a)
    np.testing.assert_array_equal(shards.labels, y)


def test_what_is_derived_from_a_fast_path_is_asked_itself():
    class Late(Constant):
        def finish(self, worker, number, start_s, steps=1):
            return super().finish(worker, number, start_s, steps) + 5

    law = Law([1.0, 1.0], lambda means, seed: Late(means))
    timing = offbeat.Fleet(workers=2, speeds=law).timing(0, 0)
    np.testing.assert_array_equal(timing.finish_all(0, np.zeros(2)), [6.0, 6.0])

    class Rounded(Identity):
        pass

    method = Dsgd(True)
    assert method.exact
    method.compressor = Rounded()
    assert not method.exact
    with pytest.raises(offbeat.ConfigError, match="write coded in place of update"):
        type("Mine", (Compressed,), {"update": lambda *job: job})


def regressing(module, **options):
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(60, 6, generator=g), torch.rand(60, 3, generator=g))
    return made(module, in_place, data, **options)


RUDE = {
    "module": (lambda: regressing(Positive()), "gradient", "pure(lr=0.1)"),
    "no_grad": (lambda: regressing(Positive(graph=True)), "gradient", "pure(lr=0.1)"),
    "full": (lambda: regressing(Positive(), batch="full"), "gradient", "pure(lr=0.1)"),
    "local": (lambda: regressing(Positive()), "local-steps(sgd, steps=2)", "local-sgd"),
    "task": (Rude, "gradient", "pure(lr=0.1)"),
    "work": (Rude, Halving(), "pure(lr=0.1)"),
    "compressed": (Rude, "compressed(topk(0.5))", "pure(lr=0.1)"),
    "method": (made, "gradient", Pure()),
    "gossip": (lambda: regressing(Positive()), "gradient", "dsgd(lr=0.1)"),
    "gossip task": (Rude, Halving(), "dsgd(lr=0.1)"),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", RUDE)
def test_looking_more_often_changes_nothing(kind):
    task, work, method = RUDE[kind]
    gossip = {"topology": "ring"} if "dsgd" in str(method) else {}
    results = [
        offbeat.run(task(), method, "3 1..3", work=work, stop={"steps": 120},
                    evaluate={"steps": every}, **gossip)
        for every in (10, 40, 120)
    ]  # fmt: skip
    assert len({result.final["loss"] for result in results}) == 1
    for result in results[1:]:
        np.testing.assert_array_equal(result.x, results[0].x)
    if kind == "method":
        plain = offbeat.run(task(), "pure(lr=0.1)", "3 1..3", stop={"steps": 120})
        np.testing.assert_array_equal(results[0].x, plain.x)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("work", ["gradient", "local-steps(sgd, steps=3)", Halving()])
@pytest.mark.parametrize("task", [Rude, lambda: regressing(Positive())])
def test_a_process_that_computes_leaves_the_model_as_it_is(task, work):
    """As on Ray, where it is other processes' too: one order and several, twice the same."""
    work = WORK.parse(work) if isinstance(work, str) else work
    runner = Runner(task(), work)
    x = runner.task.initial(0) - 1
    before = x.copy()
    x.flags.writeable = False
    orders = [JobRequest(i, i, i, 7 * i, work.steps, 0, x, None) for i in range(3)]
    together = [answer.payload.copy() for answer in runner.compute(orders)]
    singly = [runner.compute([order])[0].payload for order in orders]
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(together, singly)


# -- Two threads -----------------------------------------------------------------------------------


class Slow(nn.Module):
    """Between its two looks at its parameters there is time for another thread."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(6, 3)

    def forward(self, a):
        first = self.inner(a)
        time.sleep(0.002)
        return first + self.inner(a)


def test_a_task_that_is_evaluated_meanwhile_computes_the_same():
    """As a peer does, whose evaluations have a thread of their own."""

    class Own:
        spec, workers, dim = None, 3, 4

        def initial(self, seed):
            return np.arange(4.0)

        def gradient(self, x, worker, draw):
            self.at = x
            time.sleep(0.002)
            return np.zeros(len(x)), 2 * self.at

        def evaluate(self, x):
            self.at = x[None]
            time.sleep(0.002)
            return {"loss": float(self.at.sum())}

    for task in (made(Slow()), guarded(Own())):
        x = task.initial(0)
        job = x[None], np.array([1]), np.array([2])
        true, facts = task.gradient(*job)[1], task.evaluate(2 * x)
        with ThreadPoolExecutor(1) as side:
            seen = [side.submit(task.evaluate, 2 * x) for _ in range(10)]
            gradients = [task.gradient(*job)[1] for _ in range(30)]
        assert all(one.result() == facts for one in seen)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, true)
