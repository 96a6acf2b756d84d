"""The examples of loops: real processes against a real server, and a trainer's callback."""

import importlib.util
import json
import re
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

EXAMPLES = Path(__file__).parents[3] / "examples"


def started(*words):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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
    words = ("-m", "offbeat.runtime.cli", "serve", EXAMPLES / "served" / "own_loop.toml")
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
    assert told[-1] < 0.5 < 2.0 < told[0] < 3.0
    last = offbeat.weights(out)
    assert {name: part.shape for name, part in last.items()} == {
        "0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)
    }  # fmt: skip


def callback():
    spec = importlib.util.spec_from_file_location("cb", EXAMPLES / "trainer_callback.py")
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
