"""Training loops that are the nodes of a gossip run: what they compute, and what they are told."""

import numpy as np
import pytest
import tomli_w
import torch
from loops import digits_loop, free_port, little, together

import offbeat
from offbeat.workers.tasks import TASKS

N = 3
DIGITS = "mlp(digits, hidden=[16], batch=16, dtype=float64)"
QUIET = {"suspect_after_s": 5.0}  # nobody is slow enough here to be suspected


def written(folder, task, algorithm, steps=6, **more):
    """An experiment of loops, and its hosts: the ``address`` and ``hosts`` of ``offbeat.join``."""
    table = {
        "task": task, "algorithm": algorithm, "topology": "ring", "work": "own-loop(steps=5)",
        "fleet": {"workers": N, "speeds": "real"}, "stop": {"steps": steps}, "clock": "real",
        "engine": "zmq", **more,
    }  # fmt: skip
    path = folder / "gossip.toml"
    path.write_text(tomli_w.dumps(table))
    return str(path), {f"n{i}": f"tcp://127.0.0.1:{free_port()}" for i in range(N)}


def place(folder, name, hosts):
    return {"name": name, "hosts": hosts, "folder": folder / name, **QUIET}


METHODS = [
    "dsgd(lr=1.0)",
    "dsgd(lr=1.0, order=combine-then-adapt)",
    "dsgt(lr=0.5)",
    "motef(lr=0.5, gamma=0.5, lam=0.5, compressor='topk(0.2)')",
    "choco(lr=1.0, gamma=0.5, compressor='topk(0.5)')",
    "noloco(lr=1.0, momentum=0.5, gamma=0.5)",
    "exact-diffusion(lr=1.0)",
]


@pytest.mark.parametrize("method", METHODS)
def test_loops_are_the_built_in_nodes(tmp_path, method):
    """Same draws, same optimiser: every node's model is the virtual run's."""
    built_in = offbeat.run(
        DIGITS, method, f"{N} 1", topology="ring",
        work="local-steps(sgd(lr=0.1), steps=5)", stop={"steps": 6},
    )  # fmt: skip
    task = TASKS.parse(DIGITS, workers=N)
    address, hosts = written(tmp_path, DIGITS, method)
    jobs = together(
        *[
            lambda name=name: digits_loop(
                address, task, lambda p: torch.optim.SGD(p, lr=0.1), **place(tmp_path, name, hosts)
            )
            for name in hosts
        ]
    )
    first = 1 if method.startswith(("dsgt", "motef")) else 0  # they begin with a gradient
    assert jobs == [6 + first] * N
    ends = [
        np.concatenate([p.ravel() for p in offbeat.weights(tmp_path / name).values()])
        for name in hosts
    ]
    np.testing.assert_allclose(np.mean(ends, axis=0), built_in.x, rtol=1e-9, atol=1e-9)


def fit(address, net=None, most=None, **options):
    """A loop on noise; answers its run."""
    net = net or little()
    steps = torch.optim.SGD(net.parameters(), lr=0.01)
    with offbeat.join(address, net, steps, **{"patience_s": 20.0, **options}) as run:
        while not run.over and (most is None or run.jobs < most):
            loss = net(torch.randn(8, 3)).pow(2).mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            run.step(loss)
    return run


EXTERNAL = f"external({sum(p.numel() for p in little().parameters())})"
