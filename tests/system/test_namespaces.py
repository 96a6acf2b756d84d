"""Network faults between hosts: servers and workers, and peers, in namespaces of their own, with
keys.  Each test proves that the fault happened: nftables count what they drop, tbf what it held up.
"""

import socket
import time
from contextlib import ExitStack

import psutil
import pytest
from namespaces import PORT, Net, needed
from sites import LIMIT_S, Site, done, here, sound

pytestmark = needed
ONE_STEP = "local-steps(sgd(lr=0.01), steps=1)"


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def net(stack):
    return stack.enter_context(Net(3))


class Wide(Site):
    """A server on host 0, and a worker on each of the others."""

    def __init__(self, folder, stack, net, **options):
        self.net = net
        super().__init__(folder, stack, secure=True, address=net.endpoint(0), **options)
        self.server = self.serve()
        self.workers = []
        for host in range(1, len(net)):
            self.key(f"w{host}")
            with self.net[host].entered():
                self.workers.append(self.join(f"w{host}"))

    def serve(self, *words):
        with self.net[0].entered():
            return super().serve(*words)

    def ask(self):
        with self.net[0].entered():  # from the server's own host, which no fault is in the way of
            return super().ask()

    def until(self, condition, process=None, limit_s=LIMIT_S):
        return super().until(condition, process or self.server, limit_s)

    def all_here(self):
        return self.until(here(len(self.workers)))

    def goes_on(self, jobs=20):
        """So many more results come in."""
        before = self.ask()["jobs"]
        return self.until(lambda status: status["jobs"] >= before + jobs)

    def goes_on_for_all(self, jobs=5):
        """So many more results of every worker come in."""
        before = {row["node"]: row["jobs"] for row in self.all_here()["workers"]}
        return self.until(
            lambda status: (
                len(status["workers"]) == len(self.workers)
                and all(row["jobs"] >= before[row["node"]] + jobs for row in status["workers"])
            )
        )

    def ends(self):
        """End the run: it is sound, and all workers lived to hear of it."""
        assert all(worker.poll() is None for worker in self.workers)
        return self.stopped(self.server)


def state(status, node):
    """Of a worker: None where it is not there."""
    return {row["node"]: row["state"] for row in status["workers"]}.get(node)


@pytest.mark.parametrize("percent", [pytest.param(2, marks=pytest.mark.soak), 20])
def test_packets_are_lost(tmp_path, stack, net, percent):
    for way in ("in", "out"):
        net[0].fault(way, f"numgen random mod 100 < {percent}")
    site = Wide(tmp_path, stack, net, steps=150)
    out = done(site.server)
    assert net[0].hits > 0, out
    for worker in site.workers:
        done(worker)  # it heard that the run is over
    assert sound(site)["step"] == 150


def test_a_server_and_a_worker_are_parted_and_meet_again(tmp_path, stack, net):
    site = Wide(tmp_path, stack, net)
    site.all_here()
    net.cut([0], [1])
    site.until(lambda status: state(status, "w1") is None)
    site.goes_on()
    assert net[0].hits + net[1].hits > 0
    net.heal()
    status = site.all_here()
    assert status["counts"]["gone"] == 1
    assert status["counts"]["joined"] == 3
    site.ends()


@pytest.mark.soak
@pytest.mark.parametrize("way", ["in", "out"])
def test_a_worker_is_heard_or_hears_alone(tmp_path, stack, net, way):
    """Without acknowledgements a TCP connection carries nothing for long, either way."""
    site = Wide(tmp_path, stack, net)
    site.all_here()
    net[1].fault(way)
    site.until(lambda status: state(status, "w1") is None)
    site.goes_on()
    assert net[1].hits > 0
    net.heal()
    status = site.all_here()
    assert status["counts"]["gone"] == 1
    assert status["counts"]["joined"] == 3
    site.ends()


def test_connections_are_reset(tmp_path, stack, net):
    site = Wide(tmp_path, stack, net)
    for _ in range(3):
        site.all_here()
        for worker in (1, 2):
            before = net[worker].hits
            net[worker].fault("out", "tcp dport 5555", "reject with tcp reset")
            site.until(lambda status: net[worker].hits >= before + 2)  # noqa: B023
            net.heal()
        site.goes_on_for_all()
    site.ends()


@pytest.mark.soak
def test_a_link_comes_and_goes_every_second(tmp_path, stack, net):
    site = Wide(tmp_path, stack, net)
    site.all_here()
    server = psutil.Process(site.server.pid)
    for flap in range(30):
        net.cut([0], [1])
        time.sleep(1.0)
        net.heal()
        time.sleep(1.0)
        if flap == 4:
            opened = server.num_fds()
    assert net[0].hits + net[1].hits >= 30
    status = site.all_here()
    assert status["counts"].get("gone", 0) <= 30
    site.until(lambda status: server.num_fds() <= opened + 4)
    site.ends()


@pytest.mark.soak
def test_a_long_partition_heals_at_once(tmp_path, stack, net):
    """What tries to connect meanwhile does not wait as long again."""
    site = Wide(tmp_path, stack, net, seconds=0.02)
    site.all_here()
    net.cut([0], [1])
    site.until(lambda status: state(status, "w1") is None)
    time.sleep(40.0)
    assert net[0].hits + net[1].hits > 0
    net.heal()
    healed_s = time.monotonic()
    site.all_here()
    assert time.monotonic() - healed_s < 10.0
    site.ends()


@pytest.mark.soak
@pytest.mark.parametrize(("rate", "dim"), [("1mbit", 2**16), ("8mbit", 250_000)])
def test_a_narrow_line_kills_nobody(tmp_path, stack, net, rate, dim):
    """Models of 0.5 and 2 MB, each of which takes seconds."""
    for host in (1, 2):
        net[host].limit(rate)
    task = f"quadratic({dim}, noise=0.3, workers=3)"
    site = Wide(tmp_path, stack, net, task=task, work=ONE_STEP, every=10_000)
    status = site.all_here()
    assert min(net[1].held_up, net[2].held_up) > 100
    assert status["counts"].get("gone", 0) == 0
    assert status["resends"] == 0  # nothing was repeated that was on its way
    site.ends()


@pytest.mark.soak
def test_a_worker_that_reads_slowly_is_in_nobodys_way(tmp_path, stack, net):
    task = f"quadratic({2**16}, noise=0.3, workers=3)"
    site = Wide(tmp_path, stack, net, task=task, work=ONE_STEP, every=10_000)
    site.all_here()
    memory = psutil.Process(site.server.pid).memory_info
    before, jobs = memory().rss, site.goes_on()["jobs"]
    net[1].limit("1mbit")
    status = site.until(lambda status: status["jobs"] > jobs + 200)
    assert net[1].held_up > 100
    assert status["counts"].get("gone", 0) == 0
    assert memory().rss < before + 100 * 2**20
    site.ends()


@pytest.mark.soak
def test_five_hundred_silent_connections_from_another_host(tmp_path, stack, net):
    site = Wide(tmp_path, stack, net)
    site.all_here()
    with net[1].entered():
        silent = [socket.create_connection((net[0].address, PORT)) for _ in range(500)]
    for one in silent:
        stack.callback(one.close)
    end_s = time.monotonic() + 10.0
    for one in silent:  # each is ended by the server
        one.settimeout(max(0.01, end_s - time.monotonic()))
        while one.recv(4096):
            pass
    assert site.goes_on()["counts"].get("gone", 0) == 0
    site.ends()
