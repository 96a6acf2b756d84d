"""Peer processes for tests: forked from one that has loaded all they need."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
from simulated import put_in

from offbeat.runtime.api import api
from offbeat.runtime.base.errors import OffbeatError
from offbeat.runtime.commands.network import asking
from offbeat.runtime.experiment.experiment import from_table
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import OPEN
from offbeat.runtime.on_zeromq.alike import PeerAddress, alone
from offbeat.runtime.on_zeromq.peer import PeerProcess
from offbeat.runtime.run import checkpoint
from offbeat.runtime.transport import keys

LIMIT_S = 60.0  # of anything that a test waits for
SUSPECT_S = 0.4
context = multiprocessing.get_context("forkserver")
# Not this module: a fork server does not look where tests are.
context.set_forkserver_preload(
    ["offbeat.runtime.on_zeromq.peer", "offbeat.runtime.commands.network"]
)

MOTEF = "motef(lr=0.05, gamma=0.5, lam=0.5, compressor='topk(10)')"
TASK = "quadratic(20, noise=0.1)"


def table(steps, algorithm=MOTEF, topology="ring", seconds=0.002, **more):
    return {
        "task": TASK, "algorithm": algorithm, "topology": topology, "fleet": f"4 {seconds}",
        "stop": {"steps": steps}, "evaluate": {"steps": 20}, "seed": 3, **more,
    }  # fmt: skip


def keyring(folder, names):
    """A folder of keys for each name, in which all others are listed."""
    for name in names:
        keys.new(folder / name, name)
    for name in names:
        for other in names:
            keys.authorize(folder / name, other, keys.show(folder / other, other))


def made(table):
    (experiment,) = from_table(table)
    return alone(experiment)


def serve(table, seats, me, folder, options):
    try:
        PeerProcess(
            made(table),
            [PeerAddress(*s) for s in seats],
            me,
            Path(folder),
            **{"suspect_after_s": SUSPECT_S, **options},
        ).run()
    except OffbeatError as error:
        (Path(folder) / "error.txt").write_text(str(error))
        sys.exit(error.exit_code)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ring:
    """Four peers of an experiment; as a context, which ends them."""

    def __init__(self, table, folder, n=4, **options):
        self.table, self.folder, self.options = table, folder, options
        self.names = [f"n{i}" for i in range(n)]
        self.seats = [(name, f"tcp://127.0.0.1:{free_port()}") for name in self.names]
        self.processes = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            process.kill()
            process.join()

    def start(self, *which, table=None, **options):
        for i in which or range(len(self.names)):
            args = (table or self.table, self.seats, i, str(self.folder / self.names[i]))
            process = context.Process(target=serve, args=(*args, {**self.options, **options}))
            process.start()
            self.processes[i] = process
        return self

    def signal(self, i, number):
        os.kill(self.processes[i].pid, number)
        if number == signal.SIGKILL:
            self.processes[i].join()

    def join(self):
        """Exit codes."""
        until_s = time.monotonic() + LIMIT_S
        for process in self.processes.values():
            process.join(until_s - time.monotonic())
        return [process.exitcode for process in self.processes.values()]

    def await_(self, condition):
        until_s = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < until_s, "it did not happen in time"
            time.sleep(0.02)

    def ask(self, i):
        with asking(self.seats[i][1], None, "test") as ask:
            return ask()

    def round(self, i):
        return self.ask(i)["round"]

    def error(self, i):
        return (self.folder / self.names[i] / "error.txt").read_text()

    def state(self, i):
        return api.checkpointed(self.folder / self.names[i])

    def nodes(self):
        """All nodes as their last checkpoints have them."""
        nodes = {}
        for i in range(len(self.names)):
            nodes[i] = gossip_node(made(self.table), i)
            nodes[i].limit = 0
            nodes[i].restore(self.state(i)["node"]["node"])
        return nodes

    def events(self, i, what):
        lines = (self.folder / self.names[i] / "trace.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith('{"time_s"')]
        return [row for row in rows if row["event"] == what]

    def saved(self, i):
        return checkpoint.exist(self.folder / self.names[i] / "checkpoint")


def sound(ring, steps):
    """All did their rounds; copies are equal, and sums are what was put in (I3, I4)."""
    nodes = ring.nodes()
    assert {node.round for node in nodes.values()} == {steps}
    v = sum(node.node.v for node in nodes.values())
    np.testing.assert_allclose(v, sum(map(put_in, nodes.values())), atol=1e-9)
    compared = 0
    for i, node in nodes.items():
        for j, link in node.links.items():
            if link.state is OPEN and not link.anew and not nodes[j].links[i].anew:
                mine, theirs = node.node._ends["x"], nodes[j].node._ends["x"]
                np.testing.assert_array_equal(theirs.copies[i], mine.h)
                compared += 1
    assert compared == 8
