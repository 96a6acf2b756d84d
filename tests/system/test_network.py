"""Servers and workers as real processes, and what befalls them; each test proves that it did."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import zmq

import offbeat
from offbeat.runtime import api
from offbeat.runtime.net import keys, wire
from offbeat.runtime.net import messages as say
from offbeat.runtime.net.cli import asking

FILE = """
task = "quadratic(20, noise=0.3)"
algorithm = "pure(lr=0.01)"
work = "local-steps(sgd(lr=0.01), steps=100)"
fleet = "3 real"
seed = 5
[stop]
steps = {steps}
[evaluate]
steps = 100
[record]
save_every_s = 0.1
"""
LIMIT_S = 60.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    """A server, its workers, and a way to ask how they are."""

    def __init__(self, folder, stack, steps=100_000, secure=False):
        self.folder, self.stack, self.out = folder, stack, folder / "run"
        self.file = folder / "run.toml"
        self.file.write_text(FILE.format(steps=steps))
        self.address = f"tcp://127.0.0.1:{free_port()}"
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

    def start(self, *words):
        secure = ("--keys", str(self.keys)) if self.keys else ()
        process = subprocess.Popen(
            [sys.executable, "-m", "offbeat.runtime.cli", *words, *secure],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.stack.callback(finish, process)
        self.processes.append(process)
        return process

    def serve(self, *words):
        return self.start(
            "serve", str(self.file), "--out", str(self.out), "--bind", self.address, *words
        )

    def join(self, name):
        return self.start("join", self.address, "--name", name)

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
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end_s, f"it did not happen in time: {status}"
            time.sleep(0.02)


def finish(process):
    if process.poll() is None:
        process.kill()
    process.communicate()


def pid(row):
    return int(row["where"].split(":")[1])


def here(count):
    def condition(status):
        rows = [row for row in status["workers"] if row["state"] == "here"]
        return len(rows) == count and all(row["jobs"] > 2 for row in rows)

    return condition


def done(process, code=0, limit_s=LIMIT_S):
    out, err = process.communicate(timeout=limit_s)
    assert process.returncode == code, out + err
    assert "Traceback" not in out + err
    return out + err


def sound(site):
    """A finished run: nothing was applied twice, and its replay ends with the same bits."""
    trace = api.read_trace(site.out / "trace.jsonl")
    jobs = [tuple(row) for row in trace[:, 1:3].astype(int).tolist()]
    assert len(set(jobs)) == len(jobs)
    replayed = offbeat.replay(site.out)
    np.testing.assert_array_equal(replayed.x, api.checkpointed(site.out)["x"])
    return api.checkpointed(site.out)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def test_a_worker_is_killed_while_it_computes(tmp_path, stack):
    site = Site(tmp_path, stack, steps=1000)
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
    assert sound(site)["step"] == 1000


HOOK = """
import os, signal, sys
from offbeat.runtime.net import worker
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


@pytest.mark.parametrize("how", ["part", "whole"])
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
    server.send_signal(signal.SIGTERM)
    done(server, code=130)
    sound(site)


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
    server.send_signal(signal.SIGTERM)
    out = done(server, code=130)
    assert "go on with: offbeat resume" in out
    sound(site)


def test_the_server_is_killed_and_comes_back(tmp_path, stack):
    site = Site(tmp_path, stack, steps=1500)
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
    assert state["step"] == 1500 == state["gradients"] // 100
    assert step > 0


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
    (site.out / "server.json").write_text(json.dumps(taken))  # from where locks do not reach
    assert "another server has taken this run over" in done(first, code=3)


def test_nobody_comes(tmp_path, stack):
    site = Site(tmp_path, stack)
    out = done(site.serve("--max-idle-s", "1"), code=5)
    assert "no worker has been here for 1 s" in out
    assert f"offbeat join {site.address}" in out


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


def test_the_virtual_clock_does_not_notice(tmp_path, stack):
    """A worker killed in mid-run: the same bits as in one process."""
    options = {"stop": {"steps": 400}, "seed": 4, "work": "local-steps(momentum, steps=100)"}
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


def test_only_listed_keys_take_part(guarded, stack):
    site, server, worker = guarded
    before = site.ask()["counts"].get("handshakes_refused", 0)

    # Without keys: nothing of it arrives.
    plain = subprocess.Popen(
        [sys.executable, "-m", "offbeat.runtime.cli", "join", site.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "OFFBEAT_KEYS"},
    )  # fmt: skip
    stack.callback(finish, plain)
    assert "wants keys; give --keys" in done(plain, code=4)

    # A key that is not listed.
    site.key("stranger", listed=False)
    out = done(site.join("stranger"), code=4)
    assert "this node's key is not in the run's list" in out
    assert f"offbeat keys authorize stranger {keys.show(site.keys, 'stranger')}" in out

    # A server that is another one.
    site.key("mislead")
    aside = site.folder / "aside"
    shutil.copytree(site.keys, aside)
    keys.authorize(aside, keys.SERVER, keys.show(site.keys, "stranger"))
    mislead = subprocess.Popen(
        [sys.executable, "-m", "offbeat.runtime.cli", "join", site.address, "--name", "mislead",
         "--keys", str(aside)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stack.callback(finish, mislead)
    assert "has another key than the one in" in done(mislead, code=4)

    # A secret that others can read.
    (site.keys / "mislead.key_secret").chmod(0o644)
    assert "run: chmod 600" in done(site.join("mislead"), code=2)

    status = site.until(lambda s: s["counts"].get("handshakes_refused", 0) > before, server)
    assert [row["node"] for row in status["workers"]] == ["good"]
    assert worker.poll() is None
    secret = keys.identity(site.keys, "good").secret.decode()
    for path in site.out.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


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


def test_a_key_is_revoked(guarded):
    site, _, worker = guarded
    (site.keys / "authorized" / "good.key").unlink()
    cut_s = time.monotonic()
    out = done(worker, code=4)
    assert "not in the run's list any more" in out
    assert time.monotonic() - cut_s < 10.0  # a process that ends takes its time
    assert "this node's key is not in the run's list" in done(site.join("good"), code=4)


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
    assert after["counts"].get("gone", 0) == 0
    site.until(lambda s: s["jobs"] > status["jobs"] + 20, server)


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
