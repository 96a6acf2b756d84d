"""Training loops of the user's own on Ray actors, which are killed meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import loops
import numpy as np
import pytest
import torch
from loops import digits_loop, little
from processes import command
from ray.cloudpickle import register_pickle_by_value

import offbeat
from offbeat.runtime.on_ray.start import start
from offbeat.workers.tasks import TASKS
from offbeat.workers.work import OwnLoop

pytestmark = pytest.mark.xdist_group("ray")  # one Ray for all
register_pickle_by_value(sys.modules[__name__])  # actors cannot import from here
register_pickle_by_value(loops)
EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 120.0  # for an actor to be there again
DIGITS = "mlp(digits, hidden=[16], batch=16, dtype=float64)"
STEPS = {"steps": 6}


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One Ray, which runs find and leave as it is."""
    session = start()
    yield
    session.stop()


def digits(address):
    """What the built-in worker does, with its samples."""
    digits_loop(address, TASKS.parse(DIGITS, workers=2), lambda p: torch.optim.SGD(p, lr=0.1))


LOCAL = "local-steps(sgd(lr=0.1), steps=5)"


@pytest.mark.parametrize(
    ("method", "topology", "workers_per_actor"),
    [
        ("diloco(lr=0.7, momentum=0.5)", None, 1),
        pytest.param("diloco(lr=0.7, momentum=0.5)", None, 2, marks=pytest.mark.soak),
        pytest.param("dsgt(lr=0.5)", "ring", 1, marks=pytest.mark.soak),
        ("dsgt(lr=0.5)", "ring", 2),
    ],
)
def test_loops_on_actors_are_the_built_in_workers(method, topology, workers_per_actor):
    around = {"topology": topology, "stop": STEPS}
    engine = f"ray({workers_per_actor})"
    here = offbeat.run(DIGITS, method, "2 1", work=LOCAL, **around)
    there = offbeat.run(DIGITS, method, "2 real", work=OwnLoop(5, digits), engine=engine, **around)
    np.testing.assert_allclose(there.x, here.x, rtol=1e-9, atol=1e-9)
    assert there.reason == "steps"


class Place:
    """A folder by which loops know that one was killed, and that another came.

    A node that comes back has work only when its neighbours go on: they are slow, and do not wait.
    """

    def __init__(self, folder, slow):
        self.killed, self.again = folder / "killed", folder / "again"
        self.folder, self.limit_s = folder, 0.5 if slow else LIMIT_S

    def enter(self, worker):
        if self.killed.exists() and self.killed.read_text() == str(worker):
            self.again.touch()

    def kill(self, worker):
        try:
            with self.killed.open("x") as file:
                file.write(str(worker))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def wait(self):
        until_s = time.monotonic() + self.limit_s
        while self.killed.exists() and not self.again.exists() and time.monotonic() < until_s:
            time.sleep(0.02)


def external(place=None):
    """A loop on noise; the first process that has made twelve steps is killed, if anywhere."""

    def loop(address):
        net, at = little(), 0
        steps = torch.optim.SGD(net.parameters(), lr=0.01)
        with offbeat.join(address, net, steps) as run:
            if place:
                place.enter(run.shard)
            while not run.over:
                at += 1
                if place and at == 12:
                    place.kill(run.shard)
                if place and at > 12:
                    place.wait()
                loss = net(torch.randn(8, 3)).pow(2).mean()
                steps.zero_grad()
                loss.backward()
                steps.step()
                run.step(loss)
        if place:
            (place.folder / f"{os.getpid()}.json").write_text(json.dumps(run.jobs))

    return loop


EXTERNAL = f"external({sum(p.numel() for p in little().parameters())})"


@pytest.mark.parametrize(
    ("method", "topology"), [("async-local-sgd(lr=0.5)", None), ("dsgd(lr=1.0)", "ring")]
)
def test_an_actor_is_killed_in_its_loop(tmp_path, method, topology):
    place = Place(tmp_path, slow=topology is not None)
    result = offbeat.run(
        EXTERNAL, method, "3 real", topology=topology, work=OwnLoop(5, external(place)),
        engine="ray", stop={"steps": 30}, evaluate={"steps": 5}, folder=tmp_path / "run",
        record={"save_every_s": 1000.0},  # nodes rest for it, which loops that wait cannot
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    assert result.reason == "steps"
    assert result.facts["restarts"] == 1
    assert 0 < result.final["loss"] < 10
    assert [event["event"] for event in result.events] == ["gone", "back"]
    jobs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(jobs) == 3  # the loops went on after the block, and ended by themselves
    assert sum(jobs) >= 28  # the one that was killed had answered two
    if topology is None:
        assert {k: v.shape for k, v in offbeat.weights(tmp_path / "run").items()} == {
            name: tuple(p.shape) for name, p in little().named_parameters()
        }


def fails(address):
    net = little()
    with offbeat.join(address, net, torch.optim.SGD(net.parameters(), lr=0.01)) as run:
        run.step(1 / 0)


def forgets(address):
    assert address == "ray"


@pytest.mark.parametrize(
    ("work", "task", "said"),
    [
        (OwnLoop(5, fails), EXTERNAL, "ZeroDivisionError"),
        (OwnLoop(5, forgets), EXTERNAL, "the loop ended without offbeat.join"),
        (OwnLoop(5, external()), "external(7)", r"float32\[29\], not float32\[7\]"),
        ("own-loop(loop='no_such:thing')", EXTERNAL, 'there is no "no_such:thing" here'),
        ("own-loop", EXTERNAL, r"name it, as work = \"own-loop\(loop="),
    ],
)
@pytest.mark.parametrize(("method", "topology"), [("diloco", None), ("dsgd", "ring")])
def test_loops_that_cannot_be(work, task, said, method, topology):
    with pytest.raises(offbeat.OffbeatError, match=said):
        offbeat.run(
            task, method, "2 real", work=work, topology=topology, engine="ray", stop={"steps": 3}
        )


def waits(address):
    assert address == "ray"
    time.sleep(LIMIT_S)


def dies(address):
    assert address == "ray"
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("loop", "said"), [(waits, "did not join within 5 s"), (dies, "the loop's process dies")]
)
def test_loops_that_never_join(loop, said, monkeypatch):
    if loop is waits:
        monkeypatch.setattr("offbeat.runtime.on_ray.loops.JOIN_S", 5.0)
    work, more = OwnLoop(5, loop), {"engine": "ray", "stop": {"steps": 3}}
    with pytest.raises(offbeat.OffbeatError, match=said):
        offbeat.run(EXTERNAL, "diloco", "2 real", work=work, **more)


def test_a_loop_that_nobody_runs():
    net = little()
    with (
        pytest.raises(offbeat.ConfigError, match="belongs into a function that Ray runs"),
        offbeat.join("ray", net, torch.optim.SGD(net.parameters(), lr=0.01)),
    ):
        assert not net


def test_the_example(tmp_path):
    done = subprocess.run(
        command("run", "served/own_ray.toml", "--out", str(tmp_path / "run")),
        cwd=EXAMPLES, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    told = [row["loss"] for row in rows if "loss" in row]
    assert told[-1] < 0.5 * told[0] < 1.5
    assert re.search("steps", done.stdout + done.stderr)
