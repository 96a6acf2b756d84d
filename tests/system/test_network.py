"""Servers and workers as real processes, and what befalls them; each test proves that it did."""

import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from processes import Told, metrics
from sites import COMPRESSED, LIMIT_S, PLAIN, Site, alive, done, finish, free_port, here, pid, sound

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.commands.network import asking
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.server import ServerProtocol
from offbeat.runtime.run import checkpoint
from offbeat.runtime.transport import keys


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def test_a_worker_is_killed_while_it_computes(tmp_path, stack):
    site = Site(tmp_path, stack, steps=2000)
    server = site.serve("--processes", "3")
    status = site.until(here(3), server)
    victim = pid(status["workers"][0])
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    status = site.until(lambda s: s["counts"].get("gone"), server)
    assert time.monotonic() - killed_s < 3.0
    assert status["counts"]["jobs_released"] == 1
    assert victim not in [pid(row) for row in status["workers"]]
    out = done(server)
    assert "local-0" in out
    assert sound(site)["step"] == 2000


HOOK = """
import os, signal, sys
from offbeat.runtime.protocol import wire
from offbeat.runtime.on_zeromq import worker
wire.INLINE_BYTES = 0
send = worker.Worker._send
def die(self):
    if self.spoke.outbox and any(len(frames) > 1 for frames in self.spoke.outbox):
        if "{how}" == "part":
            self._socket.send(bytes(self.spoke.outbox[-1][0]), worker.zmq.SNDMORE)
        else:
            send(self)
        print("dies", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    send(self)
worker.Worker._send = die
worker.Worker({address!r}, "victim").run()
"""


@pytest.mark.parametrize("how", ["part", pytest.param("whole", marks=pytest.mark.soak)])
def test_a_worker_dies_while_it_sends(tmp_path, stack, how):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2")
    site.until(here(2), server)
    victim = subprocess.Popen(
        [sys.executable, "-c", HOOK.format(how=how, address=site.address)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    stack.callback(finish, victim)
    assert victim.communicate(timeout=LIMIT_S)[0] == "dies\n"
    assert victim.returncode == -signal.SIGKILL
    status = site.until(lambda s: s["counts"].get("gone"), server)
    assert not {"bad_header", "bad_array", "too_large"} & status["counts"].keys()
    assert status["counts"]["jobs_released"] <= 1
    jobs = status["jobs"]
    site.until(lambda s: s["jobs"] > jobs + 50, server)
    site.stopped(server)


def test_a_worker_sleeps_for_longer_than_anyone_waits(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "3")
    status = site.until(here(3), server)
    sleeper = pid(status["workers"][1])
    os.kill(sleeper, signal.SIGSTOP)
    status = site.until(lambda s: len(s["workers"]) == 2, server)
    assert status["counts"]["gone"] == 1
    assert sleeper not in [pid(row) for row in status["workers"]]
    before = status["jobs"]  # nobody waits for who does not read
    site.until(lambda s: s["jobs"] > before + 50, server)
    os.kill(sleeper, signal.SIGCONT)
    status = site.until(here(3), server)
    assert sleeper in [pid(row) for row in status["workers"]]
    assert status["counts"]["old_incarnation"] >= 1
    assert "go on with: offbeat resume" in site.stopped(server)


@pytest.mark.parametrize("work", [PLAIN, COMPRESSED])
def test_the_server_is_killed_and_comes_back(tmp_path, stack, work):
    site = Site(tmp_path, stack, steps=2500, work=work)
    server = site.serve()
    workers = [site.join(f"w{i}") for i in range(2)]
    status = site.until(here(2), server)
    saved = len(list(site.out.glob("checkpoint/*.safetensors")))
    assert (status["incarnation"], saved > 0) == (1, True)
    step = site.until(lambda s: s["step"] > 200, server)["step"]
    server.kill()
    server.communicate()
    assert server.returncode == -signal.SIGKILL
    server = site.serve()
    status = site.until(here(2), server)
    assert status["incarnation"] == 2
    assert {row["node"] for row in status["workers"]} == {"w0", "w1"}
    assert all(worker.poll() is None for worker in workers)  # the same processes
    assert status["step"] > 0
    done(server)
    for worker in workers:
        done(worker)  # they were told that it is over
    state = sound(site)
    assert state["step"] == 2500 == state["gradients"] // 100
    assert step > 0


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2")
    status = site.until(here(2), server)
    workers = [pid(row) for row in status["workers"]]
    server.kill()
    server.communicate()
    end_s = time.monotonic() + 10.0
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_two_servers_on_one_folder(tmp_path, stack):
    site = Site(tmp_path, stack)
    first = site.serve()
    site.until(lambda s: True, first)
    other = site.start(
        "serve", str(site.file), "--out", str(site.out), "--bind", f"tcp://127.0.0.1:{free_port()}"
    )
    assert "another server runs it" in done(other, code=3)
    assert site.ask()["incarnation"] == 1
    taken = json.loads((site.out / "server.json").read_text()) | {"incarnation": 7}
    # From where locks do not reach, and at once, as a server does it.
    checkpoint.write_whole(site.out / "server.json", json.dumps(taken).encode())
    assert "another server has taken this run over" in done(first, code=3)


def test_nobody_comes(tmp_path, stack):
    site = Site(tmp_path, stack)
    out = done(site.serve("--max-idle-s", "1"), code=5)
    assert "no worker has been here for 1 s" in out
    assert f"offbeat join {site.address}" in out


def test_a_server_that_waits_for_workers_takes_no_time(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve()
    site.until(lambda s: True, server)
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    time.sleep(4.0)
    after = process.cpu_times()
    spent_s = after.user + after.system - before.user - before.system
    assert spent_s < 0.05 * 4.0
    assert site.ask()["workers"] == []


HUNGRY = """
import resource
from offbeat.runtime.compute.backend import Runner
from offbeat.runtime.on_zeromq import worker
compute, tried = Runner.compute, []
def hungry(self, orders):
    if not tried:
        tried.append(True)
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        try:
            bytearray(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return compute(self, orders)
Runner.compute = hungry
worker.Worker({address!r}, "hungry").run()
"""


def test_a_worker_runs_out_of_memory(tmp_path, stack):
    """The system refuses it what its job needs; it is told, and the job is done again."""
    site = Site(tmp_path, stack)
    server = site.serve("--log", "json")
    told = Told(server)
    code = HUNGRY.format(address=site.address)
    worker = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    stack.callback(finish, worker)
    status = site.until(here(1), server)
    raised = told.until("raised")
    assert raised["member"] == "hungry"
    assert "MemoryError" in raised["why"]
    assert status["counts"]["failures"] == 1
    assert status["counts"].get("gone", 0) == 0
    server.send_signal(signal.SIGTERM)
    told.end(130)
    sound(site)


def test_a_worker_gives_up_where_the_server_was_killed(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve()
    worker = site.start("join", site.address, "--name", "guest", "--max-wait-s", "2")
    site.until(here(1), server)
    server.kill()
    assert f"no server at {site.address} for 2 s" in done(worker, code=5, limit_s=20.0)


def test_without_standard_streams(tmp_path, stack):
    """As under a daemon that closes them: no socket may take their numbers."""
    site = Site(tmp_path, stack)

    def close():
        os.closerange(0, 3)

    server = subprocess.Popen(
        [sys.executable, "-m", "offbeat.runtime.commands.cli", "serve", str(site.file), "--out",
         str(site.out), "--bind", site.address, "--processes", "2"], preexec_fn=close,
    )  # fmt: skip
    stack.callback(finish, server)
    site.until(here(2), server)
    places = [os.readlink(f"/proc/{server.pid}/fd/{number}") for number in range(3)]
    assert places == [os.devnull] * 3
    server.send_signal(signal.SIGTERM)
    assert server.wait(LIMIT_S) == 130
    sound(site)


def test_a_worker_is_asked_to_leave(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2")
    site.until(here(2), server)
    guest = site.join("guest")
    site.until(here(3), server)
    guest.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    done(guest)
    assert time.monotonic() - asked_s < 5.0
    status = site.until(lambda s: s["counts"].get("gone"), server)
    assert len(status["workers"]) == 2


BUILDS = """
import time
from offbeat.runtime.on_zeromq import worker
worker.LEAVE_S = 0.2
def build(text, device):
    print("builds", flush=True)
    time.sleep(600)
worker.built = build
worker.Worker({address!r}, "slow").run()
"""


def test_a_worker_is_asked_to_leave_while_it_builds_its_task(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve()
    site.until(lambda s: True, server)
    code = BUILDS.format(address=site.address)
    slow = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stack.callback(finish, slow)
    assert slow.stdout.readline() == "builds\n"
    assert site.ask()["workers"][0]["state"] == "building"
    slow.send_signal(signal.SIGTERM)
    _, said = slow.communicate(timeout=30.0)
    assert (slow.returncode, "Traceback" in said) == (0, False), said
    assert site.until(lambda s: not s["workers"], server)["counts"]["gone"] == 1


def test_a_worker_that_computes_hears_later_that_the_run_is_over(tmp_path, stack):
    """The run ends in the midst of its first job, which takes longer than a goodbye to others."""
    site = Site(tmp_path, stack)
    site.file.write_text(site.file.read_text().replace("steps=100)", "steps=120000)"))
    server = site.serve("--set", "stop.seconds=0.5", "--set", "fleet=1 real")
    worker = site.join("only")
    done(server)
    done(worker, limit_s=5 * LIMIT_S)  # it makes its job to the end, however slow the machine is
    rows = [json.loads(line) for line in (site.out / "trace.jsonl").read_text().splitlines()]
    assert len([row for row in rows if isinstance(row, list)]) == 1  # the heads: no job was done


@pytest.mark.parametrize("compressor", [pytest.param(None, marks=pytest.mark.soak), "randk(0.3)"])
def test_the_virtual_clock_does_not_notice(tmp_path, stack, compressor):
    """A worker killed in mid-run: the same bits as in one process."""
    work = "local-steps(momentum, steps=100)"
    work = f"compressed({compressor}, {work})" if compressor else work
    options = {"stop": {"steps": 400}, "seed": 4, "work": work}
    parts = "quadratic(20, noise=0.3)", "shuffled(lr=0.01)", "3 lognormal(1.0)"
    plain = offbeat.run(*parts, **options)
    port = free_port()
    ask = stack.enter_context(asking(f"tcp://127.0.0.1:{port}", None, "test"))
    script = f"""
import offbeat, sys
offbeat.run(*{parts!r}, **{options!r}, folder={str(tmp_path / "run")!r}, clock="virtual",
            engine={{"name": "zmq", "bind": "tcp://127.0.0.1:{port}"}})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    stack.callback(finish, process)
    killed = False
    end_s = time.monotonic() + LIMIT_S
    while process.poll() is None:
        assert time.monotonic() < end_s
        try:
            status = ask()
        except offbeat.OffbeatError:
            continue
        if not killed and status["jobs"] > 50:
            os.kill(pid(status["workers"][0]), signal.SIGKILL)
            killed = True
    assert (killed, process.returncode) == (True, 0), process.communicate()
    np.testing.assert_array_equal(api.checkpointed(tmp_path / "run")["x"], plain.x)
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["restarts"] >= 1


def test_the_bytes_that_are_told_are_those_on_the_wire(monkeypatch):
    sizes, take = {}, ServerProtocol._take

    def taken(self, address, node, message, now_s):
        for update in message.head.arrays:  # of one that is sent again, one counts
            sizes[bytes(update.data)] = len(update.data)
        take(self, address, node, message, now_s)

    monkeypatch.setattr(ServerProtocol, "_take", taken)
    result = offbeat.run(
        "quadratic(1000, noise=0.3)", "pure(lr=0.01)", "3 real", engine="zmq",
        work="compressed(topk(10))", stop={"steps": 200}, evaluate={"steps": 200},
    )  # fmt: skip
    raw = 8 * 1000
    assert max(sizes.values()) < raw / 60
    assert 0 <= sum(sizes.values()) - result.final["bytes"] <= 3 * max(sizes.values())
    assert result.final["bytes"] < 200 * raw / 60


JUMPY = """
import itertools, sys, time
from offbeat.runtime.commands import cli
really, hours = time.time, itertools.cycle([0, 3600, -3600, 86400, -86400])
time.time = lambda: really() + next(hours)
cli.main()
"""


def faked():
    """How to shift the clock of a process with libfaketime; None: it is not here."""
    places = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return next(({"LD_PRELOAD": str(place)} for place in places), None)


@pytest.mark.parametrize("how", ["in the process", "libfaketime"])
def test_clocks_jump_and_differ(tmp_path, stack, how):
    """Wall clocks by hours, at both ends; nobody is suspected and nothing is lost."""
    site = Site(tmp_path, stack, steps=300)
    if how == "libfaketime":
        if (shift := faked()) is None:
            pytest.skip("libfaketime is not installed")
        program = [sys.executable, "-m", "offbeat.runtime.commands.cli"]
        shift |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        ends = {"server": shift | {"FAKETIME": "+1d"}, "worker": shift | {"FAKETIME": "-1h"}}
    else:
        program, ends = [sys.executable, "-c", JUMPY], {"server": {}, "worker": {}}
    words = {
        "server": ["serve", str(site.file), "--out", str(site.out), "--bind", site.address,
                   "--log", "json"],
        "worker": ["join", site.address, "--name", "w", "--log", "json"],
    }  # fmt: skip
    started = {}
    for end, env in ends.items():
        process = started[end] = subprocess.Popen(
            [*program, *words[end]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **env},
        )  # fmt: skip
        stack.callback(finish, process)
    told, heard = Told(started["server"]), Told(started["worker"])
    rows = told.end(0)
    assert heard.end(0)
    assert not {"gone", "rejected", "failed"} & {row["event"] for row in rows}
    wall = [datetime.fromisoformat(row["time"]).timestamp() for row in rows]
    assert max(abs(then - time.time()) for then in wall) > 3000  # the clock did jump
    assert sound(site)["step"] == 300


# -- What lies between them -----------------------------------------------------------------------


class Proxy:
    """Passes bytes on, late if it is told to; keeps what went to the server; ends connections."""

    def __init__(self, address, stack, delay_s=0.0):
        self.to, self.delay_s = int(address.rsplit(":", 1)[1]), delay_s
        self.door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.address = f"tcp://127.0.0.1:{self.door.getsockname()[1]}"
        self.pairs, self.recorded, self.cuts = [], [], 0
        stack.callback(self.cut)
        threading.Thread(target=self.open, daemon=True).start()

    def open(self):
        with suppress(OSError):
            while True:
                near, _ = self.door.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.to))
                except ConnectionRefusedError:
                    near.close()
                    continue
                said = bytearray()
                self.recorded.append(said)
                self.pairs.append((near, far))
                for source, drain, record in ((near, far, said), (far, near, None)):
                    threading.Thread(
                        target=self.pass_on, args=(source, drain, record), daemon=True
                    ).start()

    def pass_on(self, source, drain, record):
        with suppress(OSError):
            while data := source.recv(2**16):
                if record is not None:
                    record += data
                time.sleep(self.delay_s)
                drain.sendall(data)
        for end in (source, drain):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Reset every connection, in both directions."""
        pairs, self.pairs = self.pairs, []
        for end in (end for pair in pairs for end in pair):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.cuts += len(pairs)


@pytest.mark.soak
def test_connections_are_reset_again_and_again(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve()
    proxy = Proxy(site.address, stack)
    workers = [site.join(f"w{i}", proxy.address) for i in range(2)]
    site.until(here(2), server)
    for _ in range(8):
        jobs = site.ask()["jobs"]
        proxy.cut()
        status = site.until(lambda s: s["jobs"] > jobs + 20, server)  # noqa: B023
    assert proxy.cuts >= 16
    assert all(worker.poll() is None for worker in workers)
    assert status["resends"] + status["counts"].get("gone", 0) > 0  # something was lost, and mended
    site.stopped(server)


@pytest.mark.soak
def test_a_slow_network_kills_nobody(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve()
    site.join("far", Proxy(site.address, stack, delay_s=0.2).address)
    status = site.until(lambda s: s["workers"] and s["workers"][0]["jobs"] > 10, server)
    assert status["counts"].get("gone", 0) == 0


@pytest.mark.soak
def test_what_was_recorded_is_of_no_use(tmp_path, stack):
    site = Site(tmp_path, stack, secure=True)
    site.key("good")
    server = site.serve()
    proxy = Proxy(site.address, stack)
    worker = site.join("good", proxy.address)
    before = site.until(here(1), server)
    assert sum(map(len, proxy.recorded)) > 2000
    for said in [bytes(said) for said in proxy.recorded]:
        with socket.create_connection(("127.0.0.1", proxy.to)) as liar:
            with suppress(OSError):
                liar.sendall(said)
            liar.settimeout(10.0)
            with suppress(ConnectionResetError):
                while liar.recv(4096):
                    pass  # until it is hung up on
    after = site.until(lambda s: s["counts"].get("handshakes_refused", 0) > 0, server)
    assert after["counts"]["joined"] == before["counts"]["joined"] == 1
    assert worker.poll() is None


# -- Who is let in -------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path, stack):
    """A server with keys, and one worker that has the right one."""
    site = Site(tmp_path, stack, secure=True)
    site.key("good")
    server = site.serve()
    worker = site.join("good")
    site.until(here(1), server)
    return site, server, worker


def test_only_listed_keys_take_part(guarded):
    site, server, worker = guarded
    assert "handshakes_refused" not in site.ask()["counts"]
    for name in ("stranger", "mislead", "careless"):
        site.key(name, listed=name != "stranger")
    aside = site.folder / "aside"
    shutil.copytree(site.keys, aside)
    keys.authorize(aside, keys.SERVER, keys.show(site.keys, "stranger"))
    (site.keys / "careless.key_secret").chmod(0o644)
    refused = {
        "wants keys; give --keys": site.start("join", site.address, secure=None),
        "this node's key is not in the run's list": site.join("stranger"),
        "has another key than the one in": site.start(
            "join", site.address, "--name", "mislead", secure=aside
        ),
        "run: chmod 600": site.join("careless"),
    }
    for why, process in refused.items():
        assert why in done(process, code=2 if "chmod" in why else 4)
    status = site.until(lambda s: s["counts"].get("handshakes_refused", 0) >= 1, server)
    assert [row["node"] for row in status["workers"]] == ["good"]
    assert worker.poll() is None
    secret = keys.identity(site.keys, "good").secret
    for path in site.out.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes()


def test_a_node_is_who_its_key_says(guarded):
    """It sends what "good" would send, with a key of its own."""
    site, server, worker = guarded
    site.key("liar")
    time.sleep(0.5)  # the server reads its list anew every quarter of a second
    with zmq.Context() as context, context.socket(zmq.DEALER) as liar:
        liar.linger = 0
        keys.as_client(liar, keys.identity(site.keys, "liar"), keys.server_key(site.keys))
        liar.connect(site.address)
        (parcel,) = wire.parcels("hello", say.Hello(1, "0", "there"))
        liar.send_multipart(wire.pack(parcel, run="", node="good", incarnation=0))
        status = site.until(lambda s: s["counts"].get("wrong_node"), server)
    assert [row["node"] for row in status["workers"]] == ["good"]
    jobs = status["jobs"]
    site.until(lambda s: s["jobs"] > jobs + 20, server)
    assert worker.poll() is None


def test_a_key_is_revoked_and_authorized_again(guarded):
    site, server, worker = guarded
    (site.keys / "authorized" / "good.key").unlink()
    cut_s = time.monotonic()
    assert "not in the run's list" in done(worker, code=4)
    assert time.monotonic() - cut_s < 10.0  # a process that ends takes its time
    assert "this node's key is not in the run's list" in done(site.join("good"), code=4)
    assert site.ask()["workers"] == []
    keys.authorize(site.keys, "good", keys.show(site.keys, "good"))
    time.sleep(0.5)  # the server reads its list anew every quarter of a second
    worker = site.join("good")
    status = site.until(here(1), server)
    assert [row["node"] for row in status["workers"]] == ["good"]
    assert worker.poll() is None


UNGUARDED = """
import sys, threading
from offbeat.runtime.commands import cli
from offbeat.runtime.transport import keys
def end(gate):
    sys.stdin.readline()
    gate._thread.pipe.send(b"TERMINATE")
made = keys.Gate.__init__
def make(gate, *args):
    made(gate, *args)
    threading.Thread(target=end, args=(gate,), daemon=True).start()
keys.Gate.__init__ = make
cli.main()
"""


def test_the_thread_that_checks_keys_dies(tmp_path, stack):
    site = Site(tmp_path, stack, secure=True)
    words = ("serve", str(site.file), "--out", str(site.out), "--bind", site.address)
    server = subprocess.Popen(
        [sys.executable, "-c", UNGUARDED, *words, "--keys", str(site.keys)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    stack.callback(finish, server)
    site.until(lambda s: True, server)
    out, err = server.communicate("now\n", timeout=LIMIT_S)
    assert server.returncode == 4, out + err
    assert "the thread that checks keys has ended" in err


def test_garbage_costs_who_sends_it_its_connection(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2")
    status = site.until(here(2), server)
    with zmq.Context() as context:
        for number, frames in enumerate([[b"garbage"], [b"\xc1", b"x"], [b"\x91" * 50_000]]):
            with context.socket(zmq.DEALER) as sender:
                sender.linger = 0
                sender.reconnect_ivl = -1
                monitor = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                sender.connect(site.address)
                sender.send_multipart(frames)
                assert monitor.poll(5000), number
                sender.disable_monitor()
                monitor.close()
        with context.socket(zmq.DEALER) as sender:  # one frame above every limit
            sender.linger = 0
            monitor = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            sender.connect(site.address)
            sender.send(bytes(2**21))
            assert monitor.poll(5000)
            sender.disable_monitor()
            monitor.close()
    after = site.until(lambda s: s["counts"].get("bad_header", 0) >= 3, server)
    assert after["counts"]["bad_header"] == 3
    assert "too_large" not in after["counts"]  # nothing of that frame came so far
    assert after["counts"].get("gone", 0) == 0
    site.until(lambda s: s["jobs"] > status["jobs"] + 20, server)


@pytest.mark.soak
def test_five_hundred_silent_connections(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2")
    site.until(here(2), server)
    port = int(site.address.rsplit(":", 1)[1])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(500)]
    for one in silent:
        stack.callback(one.close)
    jobs = site.until(lambda s: True, server)["jobs"]
    end_s = time.monotonic() + 10.0
    for one in silent:  # each is ended by the server
        one.settimeout(max(0.01, end_s - time.monotonic()))
        while one.recv(4096):
            pass
    status = site.until(here(2), server)
    assert status["jobs"] > jobs
    assert status["counts"].get("gone", 0) == 0


# -- Operations ----------------------------------------------------------------------------------


def test_logs_and_metrics_tell_of_a_worker_that_is_killed(tmp_path, stack):
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2", "--log", "json", "--metrics", "0")
    told = Told(server)
    guest = site.start(
        "join", site.address, "--name", "guest", "--log", "json", "--metrics", "127.0.0.1:0"
    )
    heard = Told(guest)
    status = site.until(here(3), server)
    told.until("joined", 3)
    assert {row["member"] for row in told.of("joined")} == {"local-0", "local-1", "guest"}
    endpoint = told.of("metrics")[0]["endpoint"]
    assert endpoint.startswith("http://127.0.0.1:")
    own = heard.of("metrics")[0]["endpoint"]
    site.until(lambda s: metrics(own)["offbeat_updates_total"][()] > 0, guest)
    victim = next(row for row in status["workers"] if row["node"] == "local-0")
    os.kill(pid(victim), signal.SIGKILL)
    gone = told.until("gone")
    assert (gone["member"], gone["worker"]) == ("local-0", victim["worker"])
    assert (gone["run"], gone["node"], gone["incarnation"]) == (status["run"], "server", 1)
    told.until("joined", 4)  # it is begun again
    before = site.until(here(3), server)
    time.sleep(2 * 0.25)  # as often as metrics are renewed
    found, after = metrics(endpoint), site.ask()
    assert before["jobs"] <= found["offbeat_updates_total"][()] <= after["jobs"]
    assert found["offbeat_job_seconds_count"][()] == found["offbeat_updates_total"][()]
    assert found["offbeat_job_seconds_sum"][()] > 0
    assert before["bytes_in"] <= found["offbeat_bytes_total"]["in",] <= after["bytes_in"]
    assert found["offbeat_workers_here"][()] == 3
    assert found["offbeat_events_total"]["gone",] == after["counts"]["gone"] == 1
    assert found["offbeat_events_total"]["jobs_released",] == after["counts"]["jobs_released"]
    assert {name for (name,) in found["offbeat_worker_loss"]} == {"local-0", "local-1", "guest"}
    assert found["offbeat_run_info"]["server", status["run"], version("offbeat")] == 1
    guest.send_signal(signal.SIGTERM)
    assert {row["event"] for row in heard.end(0)} == {"metrics", "joined", "ended"}
    assert told.until("left")["member"] == "guest"
    server.send_signal(signal.SIGTERM)
    rows = told.end(130)
    assert {"listens", "metrics", "joined", "saved", "gone", "left", "ended"} <= {
        row["event"] for row in rows
    }
    server = site.serve("--processes", "1", "--log", "json")
    again = Told(server)
    assert again.until("resumed")["step"] == told.of("saved")[-1]["step"]
    assert again.until("joined")["incarnation"] == 2
    server.send_signal(signal.SIGTERM)
    again.end(130)


def test_a_full_disk_is_borne_until_there_is_room_again(tmp_path, stack):
    """A limit on file size stands in for a full disk; not a line of the trace is lost."""
    site = Site(tmp_path, stack)
    server = site.serve("--processes", "2", "--log", "json", "--max-failed-saves", "1000")
    told = Told(server)
    site.until(here(2), server)
    trace = site.out / "trace.jsonl"
    full = trace.stat().st_size + 20_000
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (full, hard))
    failed = told.until("save_failed", 3)
    assert (failed["failed"], failed["most"]) == (3, 1000)
    assert "cannot be written (File too large)" in failed["why"]
    assert trace.stat().st_size == full
    kept = checkpoint.read(site.out / "checkpoint")[0]["step"]
    site.until(lambda s: s["step"] > kept + 50, server)  # training goes on
    saves = len(told.of("saved"))
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert told.until("saved", saves + 1)["step"] > kept + 50
    server.send_signal(signal.SIGTERM)
    told.end(130)
    sound(site)
    server = site.serve("--processes", "2", "--log", "json", "--max-failed-saves", "2")
    told = Told(server)
    told.until("resumed")
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (full, hard))
    rows = told.end(6)
    assert [row["failed"] for row in told.of("save_failed")] == [1]
    assert (rows[-1]["event"], rows[-1]["exit_code"]) == ("failed", 6)
    assert "the last checkpoint is intact" in rows[-1]["message"]
