"""The examples of loops: real processes against a real server, and a trainer's callback."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loops import free_port, listens, serving
from torch import nn

import offbeat
from offbeat.runtime.commands.network import asking

EXAMPLES = Path(__file__).parents[3] / "examples"


def started(*words, cwd=None):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
    )


@pytest.fixture
def processes():
    begun = []
    yield begun
    for one in begun:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_two_processes_and_a_server(tmp_path, processes):
    address, out = f"tcp://127.0.0.1:{free_port()}", tmp_path / "run"
    words = ("-m", "offbeat.runtime.commands.cli", "serve", EXAMPLES / "served" / "own_loop.toml")
    server = started(*words, "--bind", address, "--out", out)
    processes.append(server)
    while not listens(address):
        assert server.poll() is None, server.communicate()
        time.sleep(0.02)
    loops = [started(EXAMPLES / "own_loop.py", address) for _ in range(2)]
    processes += loops
    said = [loop.communicate(timeout=120)[0] for loop in loops]
    assert server.wait(60) == 0
    done = [int(re.search(r"(\d+) jobs done", text)[1]) for text in said]
    assert min(done) >= 40
    assert all(loop.returncode == 0 for loop in loops)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [row["loss"] for row in rows if "loss" in row]
    assert told[-1] < 0.5 * told[0] < 1.5
    last = offbeat.weights(out)
    assert {name: part.shape for name, part in last.items()} == {
        "0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)
    }  # fmt: skip


def callback(file="trainer_callback.py"):
    spec = importlib.util.spec_from_file_location("cb", EXAMPLES / file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.OffbeatCallback


class StubTrainer:
    """Calls a callback as transformers.Trainer does, and stops where it is told to."""

    def __init__(self, model, steps, callback):
        self.model, self.steps, self.callback = model, steps, callback

    def train(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        state, control = SimpleNamespace(), SimpleNamespace(should_training_stop=False)
        told = {"model": self.model, "optimizer": optimizer}
        self.callback.on_train_begin(None, state, control, **told)
        made = 0
        while made < self.steps and not control.should_training_stop:
            loss = self.model(torch.ones(4, 3)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made += 1
            self.callback.on_log(None, state, control, logs={"loss": loss.item()}, **told)
            self.callback.on_step_end(None, state, control, **told)
        self.callback.on_train_end(None, state, control, **told)
        return made


def test_a_trainer_with_the_callback():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with serving("external(8)", "local-sgd", "1 real") as (address, ended):
        made = StubTrainer(model, 10_000, callback()(address, patience_s=20.0)).train()
    assert 15 <= made < 10_000  # three jobs of five steps; then it was stopped
    assert ended["result"].final["loss"] < ended["result"].metrics[-2]["loss"]


class StubLightning:
    """Calls a callback as lightning's Trainer does; two batches make a step of the optimiser."""

    def __init__(self, model, steps, callback):
        self.model, self.steps, self.callback = model, steps, callback
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.05)]
        self.global_step, self.should_stop = 0, False

    def fit(self):
        self.callback.on_train_start(self, self.model)
        at = 0
        while self.global_step < self.steps and not self.should_stop:
            loss = self.model(torch.ones(4, 3)).pow(2).mean()
            (loss / 2).backward()
            if at % 2:
                self.optimizers[0].step()
                self.optimizers[0].zero_grad()
                self.global_step += 1
            outputs = {"loss": loss.detach()}
            self.callback.on_train_batch_end(self, self.model, outputs, None, at)
            at += 1
        self.callback.on_train_end(self, self.model)
        return self.global_step


def test_lightning_with_its_callback():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with serving("external(8)", "local-sgd", "1 real") as (address, ended):
        made = callback("lightning_callback.py")(address, patience_s=20.0)
        steps = StubLightning(model, 10_000, made).fit()
    assert 15 <= steps < 10_000  # three jobs of five steps; then it was stopped
    assert ended["result"].final["loss"] < ended["result"].metrics[-2]["loss"]


@pytest.mark.parametrize("package", ["transformers", "lightning"])
def test_an_example_says_what_it_lacks(package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    file = {"transformers": "trainer_callback.py", "lightning": "lightning_callback.py"}[package]
    example = started(EXAMPLES / file)
    said, _ = example.communicate(timeout=60)
    assert example.returncode == 1
    assert f"{package} is not installed here; pip install {package}" in said


def test_three_processes_that_gossip_one_of_them_killed(tmp_path, processes):
    """Nobody serves; the one that is killed in mid-run is started again, and returns to it."""
    ports = [free_port() for _ in range(3)]
    hosts = "".join(
        f'[[hosts]]\nname = "n{i}"\naddress = "127.0.0.1"\nport = {port}\n'
        for i, port in enumerate(ports)
    )
    (tmp_path / "hosts.toml").write_text(hosts)
    text = (EXAMPLES / "served" / "own_gossip.toml").read_text()
    (tmp_path / "gossip.toml").write_text(
        text.replace("steps = 40", "steps = 100000").replace('"real"', '"0.005"')
    )

    def joins(i):
        words = (EXAMPLES / "own_loop.py", "gossip.toml", "hosts.toml", f"n{i}")
        processes.append(started(*words, cwd=tmp_path))
        return processes[-1]

    def events(i):
        path = tmp_path / "runs" / f"gossip-n{i}" / "trace.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if '"event"' in line]
        return [row["event"] for row in rows if row.get("node") == 1]

    def text_of(i):
        path = tmp_path / "runs" / f"gossip-n{i}" / "experiment.toml"
        return path.read_text() if path.exists() else ""

    def until(condition):
        end_s = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < end_s, "it did not happen in time"
            assert loops[0].poll() is None, loops[0].communicate()
            time.sleep(0.05)

    loops = [joins(i) for i in range(3)]
    until(lambda: 'name = "own-loop"' in text_of(0))
    with asking(f"tcp://127.0.0.1:{ports[1]}", None, "test") as ask:
        until(lambda: ask()["round"] > 10)
    loops[1].kill()
    assert loops[1].wait() == -signal.SIGKILL
    until(lambda: "down" in events(0) and "down" in events(2))
    loops[1] = joins(1)
    until(lambda: all("up" in events(i)[events(i).index("down") :] for i in (0, 2)))
    with asking(f"tcp://127.0.0.1:{ports[1]}", None, "test") as ask:
        before = ask()["round"]
        until(lambda: ask()["round"] > before + 5)  # it computes again
    for loop in loops:
        loop.send_signal(signal.SIGINT)
    said = [loop.communicate(timeout=60)[0] for loop in loops]
    assert all("joined; 2410 parameters" in text for text in said)
    assert all("KeyboardInterrupt" in text for text in said)
    folders = [tmp_path / "runs" / f"gossip-n{i}" for i in range(3)]
    left = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [one["reason"] for one in left] == ["interrupted"] * 3
    assert min(one["round"] for one in left) > 10
    ends = [offbeat.weights(folder) for folder in folders]
    assert all({*end} == {"0.weight", "0.bias", "2.weight", "2.bias"} for end in ends)
