"""Training loops that are the nodes of a gossip run: what they compute, and what they are told."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from loops import digits_loop, free_port, little, together

import offbeat
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.experiment.experiment import read
from offbeat.runtime.on_zeromq.alike import PeerAddress, alone
from offbeat.runtime.on_zeromq.peer import PeerProcess
from offbeat.runtime.report import report
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
    path.write_text(tomli_w.dumps({k: v for k, v in table.items() if v is not None}))
    return str(path), {f"n{i}": f"tcp://127.0.0.1:{free_port()}" for i in range(N)}


PARSING = threading.Lock()  # Python 3.11 cannot parse in two threads (gh-106905)


def join(*args, **options):
    with PARSING:
        return offbeat.join(*args, **options)


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
                address,
                task,
                lambda p: torch.optim.SGD(p, lr=0.1),
                join=join,
                **place(tmp_path, name, hosts),
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


EXTERNAL = f"external({sum(p.numel() for p in little().parameters())})"


def test_a_run_of_external_loops_and_a_node_that_returns_after_its_end(tmp_path, caplog):
    address, hosts = written(tmp_path, EXTERNAL, "dsgd(lr=1.0)", evaluate={"steps": 2})
    nets = {name: little() for name in hosts}
    runs = [
        offbeat.join(address, nets[n], sgd(nets[n]), **place(tmp_path, n, hosts)) for n in hosts
    ]
    jobs = together(*[lambda run=run: train(run) for run in runs])
    assert jobs == [6] * N
    rows = (tmp_path / "n1" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(row) for row in rows]
    assert told[-1]["step"] == 6
    assert told[-1]["loss"] == 2.0  # as the loops said
    assert not caplog.records
    assert report.data([tmp_path / "n1"])["runs"][0]["c"]["loss"][-1] == 2.0
    assert len(report.data([tmp_path])["runs"]) == N  # a folder of all their folders
    net, began_s = little(), time.monotonic()
    with offbeat.join(address, net, sgd(net), **place(tmp_path, "n1", hosts)) as late:
        assert late.over
        with pytest.raises(offbeat.ConfigError, match="the run is over"):
            late.step()
    assert time.monotonic() - began_s < 3
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"the run in {tmp_path / 'n1'} is over: its 6 rounds are done"
    assert "was over before this loop joined it" in said[1]


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.01)


def train(run):
    """Say steps that change nothing, until the run is over."""
    with run:
        while run.step(2.0):
            pass
    return run.jobs


def test_a_loop_that_leaves_comes_back_to_its_place(tmp_path):
    """It fails in the middle of a job; its neighbours go on, and it goes on from there."""
    address, hosts = written(tmp_path, EXTERNAL, "dsgd(lr=1.0)", steps=60)

    def joined(name):
        net = little()
        return offbeat.join(address, net, sgd(net), **place(tmp_path, name, hosts))

    def slow(run):
        with run:
            while run.step(2.0):
                time.sleep(0.01)
        return run.jobs

    def failing(run):
        with run:
            while run.step(1 / 0 if run.jobs == 4 else 2.0):
                pass

    runs, again = [joined(name) for name in hosts], []

    def fails():
        with pytest.raises(ZeroDivisionError):
            failing(runs[0])
        left = json.loads((tmp_path / "n0" / "summary.json").read_text())
        assert left["reason"] == "interrupted"
        again.append(joined("n0"))
        return slow(again[0])

    jobs = together(fails, lambda: slow(runs[1]), lambda: slow(runs[2]))
    assert runs[0].jobs == 4
    assert jobs[1:] == [60, 60]
    assert 1 <= jobs[0] <= 56
    events = (tmp_path / "n1" / "trace.jsonl").read_text()
    assert '"event":"down"' in events.replace(" ", "")
    assert '"event":"up"' in events.replace(" ", "")


# -- Mistakes --------------------------------------------------------------------------------------


def test_models_that_begin_otherwise_are_refused_with_the_difference(tmp_path):
    address, hosts = written(tmp_path, EXTERNAL, "dsgd(lr=1.0)")
    nets = [little(), little()]
    with torch.no_grad():
        nets[1][0].bias += 1
    runs = [
        offbeat.join(address, net, sgd(net), **place(tmp_path, name, hosts))
        for net, name in zip(nets, hosts, strict=False)
    ]

    def refused(run):
        with pytest.raises(offbeat.ConfigError, match=r"runs another experiment: .*beginning as"):
            train(run)
        return True

    assert together(*[lambda run=run: refused(run) for run in runs]) == [True, True]


def test_neighbours_that_are_not_there(tmp_path, caplog):
    address, hosts = written(tmp_path, EXTERNAL, "dsgd(lr=1.0)")
    net = little()
    run = offbeat.join(address, net, sgd(net), patience_s=1.5, **place(tmp_path, "n0", hosts))
    with pytest.raises(ComputeError, match="nobody of the neighbours of n0 was heard"), run:
        assert not run
    assert "waiting for the neighbours of n0; after the end of a run" in caplog.text


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"algorithm": "motef-vr"}, {}, "at 2 points on one sample, .*; take motef"),
        ({"work": "gradient"}, {}, 'needs work = "own-loop'),
        ({"task": "external(7)"}, {}, r"float32\[29\], not float32\[7\]"),
        ({}, {"name": "n7"}, 'no node is called "n7"'),
        ({}, {"hosts": None}, "with hosts = "),
        ({}, {"bf16": True}, "a gossip method has a compressor"),
        ({"algorithm": "diloco", "topology": None}, {}, "no peers; see offbeat serve"),
        ({"algorithm": ["dsgd", "dsgt"]}, {}, "is a comparison of 2 runs"),
    ],
)
def test_runs_that_no_loop_can_be_a_node_of(tmp_path, change, options, said):
    table = {"task": EXTERNAL, "algorithm": "dsgd(lr=1.0)"} | change
    more = {key: value for key, value in table.items() if key not in ("task", "algorithm")}
    address, hosts = written(tmp_path, table["task"], table["algorithm"], **more)
    net = little()
    with (
        pytest.raises(offbeat.ConfigError, match=said),
        offbeat.join(address, net, sgd(net), **{**place(tmp_path, "n0", hosts), **options}),
    ):
        assert not said


def test_the_command_cannot_be_a_node_of_loops(tmp_path):
    address, hosts = written(tmp_path, EXTERNAL, "dsgd(lr=1.0)")
    (experiment,) = read(Path(address))
    with pytest.raises(offbeat.ConfigError, match="gossip needs no server"):
        PeerProcess(alone(experiment), [PeerAddress(*s) for s in hosts.items()], 0, tmp_path / "n0")
