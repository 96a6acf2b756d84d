"""Peer processes for tests: forked from one that has loaded all they need."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from offbeat.runtime import api, checkpoint
from offbeat.runtime.errors import OffbeatError
from offbeat.runtime.experiment import from_table
from offbeat.runtime.net.cli import asking
from offbeat.runtime.net.peer import PeerProcess, Seat, alone
from offbeat.runtime.node import gossip_node

LIMIT_S = 60.0  # of anything that a test waits for
SUSPECT_S = 0.4
context = multiprocessing.get_context("forkserver")
# Not this module: a fork server does not look where tests are.
context.set_forkserver_preload(["offbeat.runtime.net.peer", "offbeat.runtime.net.cli"])


def made(table):
    (experiment,) = from_table(table)
    return alone(experiment)


def serve(table, seats, me, folder, options):
    try:
        PeerProcess(
            made(table),
            [Seat(*s) for s in seats],
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
