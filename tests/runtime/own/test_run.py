"""Training loops that join a run: what they compute, and what they are told when it goes wrong."""

import time
from itertools import pairwise

import numpy as np
import pytest
import tomli_w
import torch
from loops import digits_loop, little, serving, together
from safetensors.torch import save_file
from torch import nn

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ComputeError, Refused
from offbeat.runtime.compute.flat import Flat, names
from offbeat.runtime.experiment.experiment import from_table
from offbeat.runtime.join.courier import Courier
from offbeat.runtime.on_zeromq.worker import built
from offbeat.runtime.protocol.messages import Welcome
from offbeat.runtime.report import report
from offbeat.workers.tasks import TASKS

ROUNDS = {"stop": {"steps": 6}, "evaluate": {"steps": 2}, "clock": "real"}


class Plain(torch.optim.Optimizer):
    """p -= lr g, rounded as the built-in inner optimiser does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])


DIGITS = "mlp(digits, hidden=[16], batch=16, dtype={})"
OUTER = "diloco(lr=0.7, momentum=0.5)"
CASES = {
    "sgd": ("float32", "sgd(lr=0.1)", Plain, True, 0.0),
    "momentum": (
        "float64",
        "momentum(lr=0.1, beta=0.9)",
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        False,
        1e-10,
    ),
    "adamw": (
        "float64",
        "adamw(lr=0.01, weight_decay=0.1)",
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        False,
        1e-6,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_of_ones_own_is_the_built_in_worker(case):
    """Same draws, same optimiser: the same models, to the bit where the arithmetic is the same."""
    dtype, inner, optimizer, exact, apart = CASES[case]
    text = DIGITS.format(dtype)
    built_in = offbeat.run(
        text, OUTER, "2", work=f"local-steps({inner}, steps=5)", **(ROUNDS | {"clock": "virtual"})
    )
    task = TASKS.parse(text, workers=2)
    with serving(text, OUTER, "2 real", **ROUNDS) as (address, ended):
        jobs = together(*[lambda: digits_loop(address, task, optimizer, exact)] * 2)
    assert min(jobs) >= 6  # a job that was begun when the run ended may be done, too
    result = ended["result"]
    assert result.reason == "steps"
    np.testing.assert_allclose(result.x, built_in.x, rtol=apart, atol=apart)
    mine, theirs = result.column("loss"), built_in.column("loss")
    np.testing.assert_allclose(mine, theirs, rtol=max(apart, 1e-12))


def fit(address, net, **options):
    """A loop on noise; answers its run."""
    steps = torch.optim.SGD(net.parameters(), lr=0.01)
    with offbeat.join(address, net, steps, **{"patience_s": 20.0, **options}) as run:
        while not run.over:
            inputs = torch.randn(8, 3)
            loss = net(inputs).pow(2).mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            run.step(loss)
    return run


def flat(net):
    named = sorted(net.named_parameters())
    return np.concatenate([p.detach().numpy().reshape(-1) for _, p in named])


def test_the_first_loop_brings_the_model(tmp_path):
    net, folder = little(), tmp_path / "run"
    begin = flat(net)
    task = f"external({len(begin)})"
    with serving(task, "diloco", "1 real", folder=folder, record={"trace": True}) as (at, ended):
        run = fit(at, net)
    result = ended["result"]
    assert (run.jobs >= 3, run.over, result.reason) == (True, True, "steps")
    assert "loss" not in result.metrics[0]  # nobody had said anything yet
    assert 0 < result.final["loss"] < 10
    shift = np.abs(result.x - begin).max()
    assert 0 < shift < 0.5  # 15 small steps from where the loop began
    last = offbeat.weights(folder)
    assert {name: part.shape for name, part in last.items()} == {
        name: tuple(p.shape) for name, p in net.named_parameters()
    }
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in last.values()]), result.x)
    assert api.checkpointed(folder)["step"] == 3
    report.write([folder], tmp_path / "page.html", figures=True)  # the first loss is not known
    (shown,) = report.data([folder])["runs"]
    assert shown["c"]["loss"][0] is None
    assert shown["c"]["loss"][-1] == pytest.approx(result.final["loss"], rel=1e-4)
    with pytest.raises(offbeat.ConfigError, match="only training loops that join can compute"):
        api.replay(folder)


def test_the_server_brings_the_model(tmp_path):
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    path = tmp_path / "model.safetensors"
    save_file(dict(theirs.named_parameters()), path)
    net, seen = little(), []
    with (
        serving(f"external(file='{path}')", "diloco", "1 real") as (at, ended),
        offbeat.join(at, net, torch.optim.SGD(net.parameters(), lr=0.1)) as run,
    ):
        seen.append(flat(net))
        while run.step():
            pass
    np.testing.assert_array_equal(seen[0], flat(theirs))
    assert "loss" not in ended["result"].final  # nobody ever said
    np.testing.assert_array_equal(ended["result"].x, seen[0])  # nor moved


WRAPPERS = {
    "whole": lambda net: torch.compile(net, backend="eager"),
    "part": lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
    "parallel": nn.DataParallel,
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_module_that_was_wrapped(wrap, tmp_path):
    """What is recorded loads strictly into the plain module, and by name into the wrapped one."""
    plain, folder = little(), tmp_path / "run"
    wrapped = WRAPPERS[wrap](little())
    save_file({k: p.detach().clone() for k, p in wrapped.named_parameters()}, tmp_path / "begin")
    task = f"external(file='{tmp_path / 'begin'}')"
    with (
        serving(task, "diloco", "1 real", folder=folder) as (at, ended),
        offbeat.join(at, plain, torch.optim.SGD(plain.parameters(), lr=0.1)) as run,
    ):
        while run.step(0.0):
            pass
    assert ended["result"].reason == "steps"
    last = offbeat.weights(folder)
    assert [*last] == sorted(name for name, _ in plain.named_parameters())
    with torch.no_grad():
        for p in wrapped.parameters():
            p.fill_(7.0)
    there = {k: torch.from_numpy(v) for k, v in offbeat.weights(folder, wrapped).items()}
    assert not wrapped.load_state_dict(there, strict=False).unexpected_keys
    np.testing.assert_array_equal(Flat(wrapped).values(), ended["result"].x)
    with pytest.raises(offbeat.ConfigError, match=r"another than that of the run in .* is there"):
        offbeat.weights(folder, nn.Linear(1, 1))


def test_only_what_wrappers_add_is_left_out_of_names():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))

    holder = Holder()
    assert [*names(holder)] == [name for name, _ in holder.named_parameters()]
    with pytest.raises(offbeat.ConfigError, match="the model is lazy"):
        Flat(nn.LazyLinear(2))


def test_bfloat16_halves_what_travels():
    net = little(64)
    with serving(f"external({len(flat(net))})", "local-sgd", "1 real") as (at, ended):
        run = fit(at, net, bf16=True)
    assert run.jobs >= 3
    assert np.isfinite(ended["result"].x).all()
    one = Flat(little(64), bf16=True)
    one.receive(np.zeros(one.dim, np.float32))
    assert len(one.moved()) < 2 * one.dim + 64
    raw = Flat(little(64))
    raw.receive(np.zeros(raw.dim, np.float32))
    moved = raw.moved()
    np.testing.assert_array_equal(moved, -flat(little(64)))


def test_parameters_are_views_of_one_vector():
    net = little()
    before = flat(net)
    vector = Flat(net)
    np.testing.assert_array_equal(flat(net), before)
    starts = [p.data_ptr() for _, p in sorted(net.named_parameters())]
    sizes = [4 * p.numel() for _, p in sorted(net.named_parameters())]
    assert [b - a for a, b in pairwise(starts)] == sizes[:-1]
    x = np.arange(vector.dim, dtype=np.float32)
    vector.receive(x)
    vector.load()
    np.testing.assert_array_equal(flat(net), x)
    assert [p.data_ptr() for _, p in sorted(net.named_parameters())] == starts
    with torch.no_grad():
        net[0].bias += 1
    moved = vector.moved()
    assert sorted(set(moved.tolist())) == [-1.0, 0.0]
    assert (moved == -1).sum() == 4


# -- Mistakes ------------------------------------------------------------------------------------


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_another_model_is_refused_with_the_difference(tmp_path):
    path, net = tmp_path / "model.safetensors", little()
    save_file(dict(net.named_parameters()), path)
    turned = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(4), nn.Linear(3, 4))
    wider = little(5)
    with serving(f"external(file='{path}')", "diloco", "1 real") as (at, ended):
        with pytest.raises(offbeat.ConfigError, match=r"<f4\[36\] here, .*<f4\[29\] there"):
            fit(at, wider)
        said = r"0\.bias is \[1\] here, \[4\] there; 0\.weight is \[1, 4\] here, \[4, 3\] there"
        with pytest.raises(Refused, match=said):
            fit(at, turned)
        assert fit(at, net).jobs >= 3
    assert ended["result"].reason == "steps"


def test_no_server():
    net = little()
    began_s = time.monotonic()
    with pytest.raises(
        ComputeError, match=r"no server at tcp://127\.0\.0\.1:1 for \d+ s; begin it with"
    ):
        fit("tcp://127.0.0.1:1", net, patience_s=0.3)
    assert time.monotonic() - began_s < 5


def test_a_server_with_other_work():
    like, table = np.zeros(3, np.float32), {"work": {"name": "local-steps"}}
    courier = Courier("tcp://127.0.0.1:1", "me", None, like, "", lambda n: np.empty(n, np.uint8))
    welcome = Welcome(1, 1, 0, 1.0, tomli_w.dumps(table), "")
    with pytest.raises(offbeat.ConfigError, match='needs work = "own-loop'):
        courier._build(welcome)
    courier.leave("the test is done")


def test_the_command_that_joins_is_told_to_be_a_loop():
    text = tomli_w.dumps({"work": {"name": "own-loop"}})
    with pytest.raises(offbeat.ConfigError, match=r"join it from one, with offbeat\.join"):
        built(text, "cpu")


def test_steps_outside_of_a_run():
    net = little()
    with serving(f"external({len(flat(net))})", "diloco", "1 real") as (at, _):
        run = offbeat.join(at, net, sgd(net))
        with pytest.raises(offbeat.ConfigError, match="belongs into the block"):
            run.step()
        with run:
            again = offbeat.join(at, net, sgd(net))
            with pytest.raises(offbeat.ConfigError, match="takes part in a run already"):
                again.__enter__()
            while run.step(1.0):
                pass
            assert run.over
            with pytest.raises(offbeat.ConfigError, match="the run is over: end the loop"):
                run.step()
        with pytest.raises(offbeat.ConfigError, match="belongs into the block"):
            run.step()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: sgd(little()), "no optimiser steps 0.weight, 0.bias, 1.weight, 1.bias..."),
        (lambda net: [sgd(net), sgd(little())], "steps 6 tensors that are not the model's"),
        (lambda net: sgd(net.half()), "keep them in torch.float32"),
        (lambda net: sgd(net.requires_grad_(False)), "no trainable parameters"),
        (lambda net: [sgd(net), net[0].double()][0], "several dtypes"),
    ],
)
def test_models_that_cannot_take_part(change, said):
    net = little()
    optimizer = change(net)
    with (
        pytest.raises(offbeat.ConfigError, match=said),
        offbeat.join("tcp://127.0.0.1:1", net, optimizer),
    ):
        assert not said


@pytest.mark.parametrize(
    ("task", "work", "engine", "said"),
    [
        ("external(5)", "own-loop", "virtual", "only training loops that join can compute"),
        ("external(5)", "own-loop", "zmq(processes=2)", "processes = 2: only training loops"),
        ("quadratic(5)", "own-loop", "virtual", "own-loop: only training loops"),
        ("external(5)", "gradient", "virtual", "external: only training loops"),
        ("external", "own-loop", "zmq", "give either dim, .*parameters.*, or a file"),
        ("external(file=no.safetensors)", "own-loop", "zmq", "no.safetensors: cannot be read"),
    ],
)
def test_runs_that_no_loop_can_join(task, work, engine, said):
    with pytest.raises(offbeat.ConfigError, match=said):
        offbeat.run(task, "diloco", "2", work=work, engine=engine, clock=None, stop={"steps": 2})


@pytest.mark.parametrize(
    ("more", "law"),
    [
        ({"engine": "zmq"}, "real"),
        ({"engine": "zmq", "fleet": {"workers": 2, "speeds": "2.0"}}, "constant"),
        ({"engine": "zmq", "fleet": {"workers": 2, "stragglers": "1x10"}}, "constant"),
        ({"engine": "zmq", "clock": "virtual"}, "constant"),
        ({"engine": "zmq", "work": "gradient", "task": "quadratic"}, "constant"),
    ],
)
def test_loops_of_ones_own_are_as_fast_as_they_are(more, law):
    """Unless a speed is asked for, none is emulated: else every step would be made to last 1 s."""
    table = {"task": "external(5)", "algorithm": "diloco", "work": "own-loop"}
    (experiment,) = from_table({**table, "fleet": {"workers": 2}, **more})
    assert experiment.fleet.law().spec.name == law


def test_a_loop_that_leaves_and_one_that_fails():
    """What they had is somebody else's; the run goes on."""
    net, task = little(), f"external({len(flat(little()))})"
    with serving(task, "async-local-sgd(lr=0.5)", "1 real", stop={"steps": 6}) as (at, ended):
        with offbeat.join(at, net, sgd(net), name="first") as run:
            for _ in range(7):
                run.step(2.0)
        with (
            pytest.raises(ZeroDivisionError),
            offbeat.join(at, net, sgd(net), name="second") as run,
        ):
            run.step(1 / 0)
        assert fit(at, little(), name="third").jobs >= 5
    gone = [event["why"] for event in ended["result"].events if event["event"] == "gone"]
    assert "its loop ended" in gone
    assert "its loop ended: ZeroDivisionError" in gone
