"""Hosts on a switch, for tests: each a network namespace of this machine, with faults to order.

A namespace lives as long as this process holds it open, or another one runs in it: whatever happens
to a test, nothing is left behind.  Needs root, ``ip``, ``tc`` and ``nft``.
"""

import ctypes
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
OURS = "/proc/thread-self/ns/net"
PORT = 5555
TABLE = """
table inet faults {
    counter hit {}
    chain in { type filter hook input priority 0; }
    chain out { type filter hook output priority 0; }
}
"""
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(code):
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _enter(namespace):
    _checked(_libc.setns(namespace, CLONE_NEWNET))


def lacking():
    """Why there can be no hosts here, or ""."""
    if missing := [name for name in ("ip", "tc", "nft") if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)} (Debian: apt install iproute2 nftables)"
    try:
        with Net(2) as net:
            net[0].fault("in", "numgen random mod 100 < 1")
            net[0].limit("1mbit")
    except OSError as error:
        return f"no network namespaces: {error.strerror} (root may make them)"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


class Namespace:
    """A network namespace; whatever is started or opened in ``entered`` belongs to it."""

    def __init__(self):
        before = os.open(OURS, os.O_RDONLY)
        try:
            _checked(_libc.unshare(CLONE_NEWNET))
            self.descriptor = os.open(OURS, os.O_RDONLY)
            _enter(before)
        finally:
            os.close(before)
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @contextmanager
    def entered(self):
        """Of this thread alone."""
        before = os.open(OURS, os.O_RDONLY)
        _enter(self.descriptor)
        try:
            yield
        finally:
            _enter(before)
            os.close(before)

    def run(self, *words, text=None):
        with self.entered():
            return subprocess.run(
                words, input=text, check=True, capture_output=True, text=True
            ).stdout


class Host(Namespace):
    """A host, ``eth0`` of which leads to port ``p<number>`` of a switch."""

    def __init__(self, number, switch):
        super().__init__()
        self.address, self._port, self._switch = f"10.99.0.{number + 1}", f"p{number}", switch
        switch.run(
            *("ip", "link", "add", self._port, "type", "veth"),
            *("peer", "name", "eth0", "netns", self.path),
        )
        switch.run("ip", "link", "set", self._port, "master", "bridge", "up")
        for words in ("addr add {}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run("ip", *words.format(self.address).split())
        self.run("nft", "-f", "-", text=TABLE)

    def fault(self, way, match="", verdict="drop"):
        """What goes "in" or "out" by ``eth0`` and matches is counted, and dropped or rejected."""
        door = "iifname" if way == "in" else "oifname"
        rule = f"add rule inet faults {way} {door} eth0 {match} counter name hit {verdict}"
        self.run("nft", rule)

    def heal(self):
        """No faults any more."""
        self.run("nft", "flush table inet faults")

    @property
    def hits(self):
        """Packets that met with a fault so far."""
        (counter,) = json.loads(self.run("nft", "-j", "list counter inet faults hit"))["nftables"][
            1:
        ]
        return counter["counter"]["packets"]

    def limit(self, rate):
        """Let ``rate`` through, each way."""
        for place, device in ((self, "eth0"), (self._switch, self._port)):
            words = f"tc qdisc replace dev {device} root tbf rate {rate} burst 32kbit latency 400ms"
            place.run(*words.split())

    @property
    def held_up(self):
        """Packets that had to wait, or were dropped, since they were too many for the limit."""
        held = 0
        for place, device in ((self, "eth0"), (self._switch, self._port)):
            (row,) = json.loads(place.run("tc", "-s", "-j", "qdisc", "show", "dev", device))
            held += row["overlimits"] + row["drops"]
        return held


class Net:
    """So many hosts that reach each other; as a context, which lets go of them."""

    def __init__(self, count):
        self._switch = Namespace()
        self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
        self._switch.run("ip", "link", "set", "bridge", "up")
        self._hosts = [Host(number, self._switch) for number in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for one in (*self._hosts, self._switch):
            os.close(one.descriptor)

    def __len__(self):
        return len(self._hosts)

    def __getitem__(self, number):
        return self._hosts[number]

    def endpoint(self, number):
        return f"tcp://{self[number].address}:{PORT}"

    def cut(self, here, there):
        """Nothing passes between these hosts and those, either way, until both heal."""
        for one, others in ((here, there), (there, here)):
            for number in one:
                addresses = ", ".join(self[other].address for other in others)
                self[number].fault("in", f"ip saddr {{ {addresses} }}")
                self[number].fault("out", f"ip daddr {{ {addresses} }}")

    def heal(self):
        for host in self._hosts:
            host.heal()


WHY = lacking()
needed = pytest.mark.skipif(bool(WHY), reason=WHY)
