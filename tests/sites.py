"""A server and its workers as real processes, for tests."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.commands.network import asking
from offbeat.runtime.transport import keys

FILE = """
task = "{task}"
algorithm = "pure(lr=0.01)"
work = "{work}"
fleet = "3 {seconds}"
seed = 5
[stop]
steps = {steps}
[evaluate]
steps = {every}
[record]
save_every_s = 0.1
"""
PLAIN = "local-steps(sgd(lr=0.01), steps=100)"
COMPRESSED = "compressed(topk(3), local-steps(momentum(lr=0.001), steps=100))"
LIMIT_S = 90.0  # of anything that is waited for


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    """A server, its workers, and a way to ask how they are."""

    def __init__(
        self, folder, stack, steps=100_000, secure=False, address=None,
        task="quadratic(20, noise=0.3)", work=PLAIN, every=100,
        seconds="real",
    ):  # fmt: skip
        self.folder, self.stack, self.out = folder, stack, folder / "run"
        self.file = folder / "run.toml"
        self.file.write_text(
            FILE.format(task=task, work=work, steps=steps, every=every, seconds=seconds)
        )
        self.address = address or f"tcp://127.0.0.1:{free_port()}"
        self.keys = folder / "keys" if secure else None
        self.processes = []
        if secure:
            keys.new(self.keys, keys.SERVER)
            self.key("boss")
        self._ask = None

    def key(self, name, listed=True):
        keys.new(self.keys, name)
        if listed:
            keys.authorize(self.keys, name, keys.show(self.keys, name))

    def start(self, *words, secure="as the site"):
        folder = self.keys if secure == "as the site" else secure
        option = ("--keys", str(folder)) if folder else ()
        # A pipe only where ``Told`` reads it: whoever fills one that nobody reads stands still.
        said = self.folder / f"{len(self.processes)}.said"
        with said.open("w") as file:
            to = subprocess.PIPE if "--log" in words else file
            process = subprocess.Popen(
                [sys.executable, "-m", "offbeat.runtime.commands.cli", *words, *option],
                stdout=to, stderr=to, text=True,
            )  # fmt: skip
        process.said = said
        self.stack.callback(finish, process)
        self.processes.append(process)
        return process

    def serve(self, *words):
        return self.start(
            "serve", str(self.file), "--out", str(self.out), "--bind", self.address, *words
        )

    def join(self, name, address=None):
        return self.start("join", address or self.address, "--name", name)

    def ask(self):
        """The server's own account; None where nobody answers."""
        if self._ask is None:
            self._ask = self.stack.enter_context(asking(self.address, self.keys, "boss"))
        try:
            return self._ask()
        except offbeat.OffbeatError:
            return None

    def until(self, condition, process, limit_s=LIMIT_S):
        """The server's account, once it meets ``condition``."""
        end_s = time.monotonic() + limit_s
        while True:
            status = self.ask()
            if status is not None and condition(status):
                return status
            assert process.poll() is None, process.said.read_text()
            assert time.monotonic() < end_s, f"it did not happen in time: {status}"
            time.sleep(0.02)

    def stopped(self, server):
        """End the run, and check it."""
        server.send_signal(signal.SIGTERM)
        out = done(server, code=130)
        sound(self)
        return out


def finish(process):
    if process.poll() is None:
        process.kill()
    process.communicate()


def pid(row):
    return int(row["where"].split(":")[1])


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def here(count):
    def condition(status):
        rows = [row for row in status["workers"] if row["state"] == "here"]
        return len(rows) == count and all(row["jobs"] > 2 for row in rows)

    return condition


def done(process, code=0, limit_s=LIMIT_S):
    process.wait(limit_s)
    said = process.said.read_text()
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def sound(site):
    """A finished run: nothing was applied twice, and its replay ends with the same bits."""
    trace = api.read_trace(site.out / "trace.jsonl")
    jobs = [tuple(row) for row in trace[:, 1:3].astype(int).tolist()]
    assert len(set(jobs)) == len(jobs)
    replayed = offbeat.replay(site.out)
    np.testing.assert_array_equal(replayed.x, api.checkpointed(site.out)["x"])
    return api.checkpointed(site.out)
