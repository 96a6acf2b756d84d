"""Gossip between hosts: ``offbeat peer`` in namespaces of their own, with keys, and what befalls
the network.  Each test proves that the fault happened.
"""

import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
import tomli_w
from namespaces import PORT, Net, needed
from peering import LIMIT_S, SUSPECT_S, Ring, keyring, sound, table

import offbeat
from offbeat.runtime.commands.network import asking

pytestmark = needed


class Wide(Ring):
    """A ring with every peer on a host of its own."""

    def __init__(self, table, folder, suspect_after_s=SUSPECT_S):
        self.stack = ExitStack()
        self.net = self.stack.enter_context(Net(4))
        super().__init__(table, folder)
        self.seats = [(name, self.net.endpoint(i)) for i, name in enumerate(self.names)]
        keyring(folder / "keys", self.names)
        hosts = [
            {"name": name, "address": self.net[i].address} for i, name in enumerate(self.names)
        ]
        (folder / "hosts.toml").write_text(tomli_w.dumps({"port": PORT, "hosts": hosts}))
        (folder / "run.toml").write_text(tomli_w.dumps(table))
        self._suspect_after_s, self._asks = suspect_after_s, {}

    def __exit__(self, *error):
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.stack.close()

    def start(self):
        for i, name in enumerate(self.names):
            words = [
                *(
                    "peer",
                    str(self.folder / "run.toml"),
                    "--hosts",
                    str(self.folder / "hosts.toml"),
                ),
                *("--node", name, "--keys", str(self.folder / "keys" / name)),
                *("--out", str(self.folder / name)),
                *("--suspect-after-s", str(self._suspect_after_s)),
            ]
            with self.net[i].entered(), (self.folder / f"{name}.log").open("w") as said:
                self.processes[i] = subprocess.Popen(
                    [sys.executable, "-m", "offbeat.runtime.commands.cli", *words],
                    stdout=said,
                    stderr=said,
                )
        return self

    def join(self, limit_s=LIMIT_S):
        until_s = time.monotonic() + limit_s
        return [p.wait(until_s - time.monotonic()) for p in self.processes.values()]

    def ask(self, i):
        """From its own host, as one of its neighbours."""
        if i not in self._asks:
            name, other = self.names[i - 1], self.names[i]
            with self.net[i].entered():  # as do the threads of its sockets
                of = asking(self.seats[i][1], self.folder / "keys" / name, name, other)
                self._asks[i] = self.stack.enter_context(of)
        return self._asks[i]()

    def rounds(self):
        return [self.round(i) for i in range(4)]

    def begun(self, rounds=5):
        """All have done so many rounds."""
        self.await_(lambda: self.begins() and min(self.rounds()) >= rounds)

    def begins(self):
        return all((self.folder / name / "experiment.toml").exists() for name in self.names)

    def goes_on(self, rounds=10):
        """All do so many rounds more."""
        before = self.rounds()
        self.await_(
            lambda: all(b - a >= rounds for a, b in zip(before, self.rounds(), strict=True))
        )

    def hits(self):
        return sum(self.net[i].hits for i in range(4))

    def mean(self):
        return np.mean([self.state(i)["x"] for i in range(4)], axis=0)


def equal(ring, of):
    """Nobody was given up, and the models are those of the virtual clock."""
    assert not [row for i in range(4) for row in ring.events(i, "down")]
    np.testing.assert_allclose(ring.mean(), offbeat.run(**of).x, rtol=0, atol=1e-12)


@pytest.mark.soak
@pytest.mark.parametrize("percent", [2, 20])
def test_packets_are_lost(tmp_path, percent):
    of = table(40)
    with Wide(of, tmp_path, suspect_after_s=10.0) as ring:
        for i in range(4):
            ring.net[i].fault("in", f"numgen random mod 100 < {percent}")
        assert ring.start().join() == [0] * 4
        assert ring.hits() > 0
        equal(ring, of)


def test_the_graph_is_cut_in_two_and_heals(tmp_path):
    steps = 300
    with Wide(table(steps, seconds=0.02), tmp_path) as ring:
        ring.start().begun()
        ring.net.cut([0, 1], [2, 3])
        ring.await_(lambda: all(ring.events(i, "down") for i in range(4)))
        ring.goes_on()  # each half by itself
        assert ring.hits() > 0
        ring.net.heal()
        assert ring.join() == [0] * 4
        for i, other in enumerate([3, 2, 1, 0]):
            assert {row["node"] for row in ring.events(i, "down")} == {other}
            assert {row["node"] for row in ring.events(i, "up")} == {other}
        sound(ring, steps)
        assert spread(ring) < 1e-2


def spread(ring):
    """Of the models around their mean."""
    x = np.array([ring.state(i)["x"] for i in range(4)])
    return np.square(x - x.mean(axis=0)).sum() / 4


@pytest.mark.soak
@pytest.mark.parametrize("way", ["in", "out"])
def test_a_peer_is_heard_or_hears_alone(tmp_path, way):
    steps = 300
    with Wide(table(steps, seconds=0.02), tmp_path) as ring:
        ring.start().begun()
        ring.net[1].fault(way)
        ring.await_(lambda: all(ring.events(i, "down") for i in range(3)))
        ring.goes_on()
        assert ring.hits() > 0
        ring.net.heal()
        assert ring.join() == [0] * 4
        assert not ring.events(3, "down")
        assert all(ring.events(i, "up") for i in range(3))
        sound(ring, steps)


def test_connections_are_reset(tmp_path):
    of = table(100, seconds=0.02)
    with Wide(of, tmp_path, suspect_after_s=4.0) as ring:
        ring.start().begun()
        for i in range(4):
            before = ring.net[i].hits
            ring.net[i].fault("in", f"tcp dport {PORT}", "reject with tcp reset")
            ring.await_(lambda: ring.net[i].hits >= before + 2)  # noqa: B023
            ring.net.heal()
        assert ring.join() == [0] * 4
        equal(ring, of)


@pytest.mark.soak
def test_links_come_and_go_every_second(tmp_path):
    steps = 4000
    # Above 0.6 a cut of a second may pass unseen; below, a busy machine is taken for a cut.
    with Wide(table(steps, seconds=0.02), tmp_path, suspect_after_s=0.6) as ring:
        ring.start().begun()
        opened = [psutil.Process(p.pid).num_fds() for p in ring.processes.values()]
        for _ in range(30):
            ring.net.cut([0, 1], [2, 3])
            time.sleep(1.0)
            ring.net.heal()
            time.sleep(1.0)
        assert ring.hits() >= 30
        ring.goes_on()
        for most, p in zip(opened, ring.processes.values(), strict=True):
            ring.await_(lambda: psutil.Process(p.pid).num_fds() <= most + 4)  # noqa: B023
        assert all(p.poll() is None for p in ring.processes.values())  # who has ended has none
        for i in range(4):
            assert 0 < len(ring.events(i, "down")) <= 30
        assert ring.join(limit_s=180.0) == [0] * 4
        sound(ring, steps)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rate", "dim", "suspect_after_s"), [("1mbit", 2**16, 3.0), ("8mbit", 250_000, 1.0)]
)
def test_a_narrow_line_kills_nobody(tmp_path, rate, dim, suspect_after_s):
    """Models of 0.5 and 2 MB, of which a round takes many seconds."""
    of = table(3, "dsgd(lr=0.1)", task=f"quadratic({dim}, noise=0.1, workers=4)")
    with Wide(of, tmp_path, suspect_after_s) as ring:
        for i in range(4):
            ring.net[i].limit(rate)
        assert ring.start().join(limit_s=180.0) == [0] * 4
        assert min(ring.net[i].held_up for i in range(4)) > 100
        equal(ring, of)
