"""What ZeroMQ itself does with the limits that are set."""

import signal
import subprocess
import sys

import pytest
import zmq

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.transport import sockets

BUSY = """
import os, subprocess, sys, time, zmq
from offbeat.runtime.transport import sockets
from offbeat.runtime.experiment.engines import Liveness

context = zmq.Context()
server = sockets.limited(context, zmq.ROUTER, Liveness())
endpoint = sockets.bound(server, "tcp://127.0.0.1:*")
talker = subprocess.Popen([sys.executable, "-c", sys.argv[1], endpoint], stdout=subprocess.PIPE)
assert talker.stdout.readline()  # all is said; nothing of it is read yet
talker.kill()
talker.wait()
time.sleep(2.0)
count = 0
while server.poll(500):
    server.recv_multipart()
    count += 1
print(count, flush=True)
os._exit(0)
"""
TALKS = """
import sys, time, zmq
from offbeat.runtime.transport import sockets
from offbeat.runtime.experiment.engines import Liveness

socket = sockets.limited(zmq.Context(), zmq.DEALER, Liveness())
socket.connect(sys.argv[1])
for _ in range(400):
    assert socket.poll(10_000, zmq.POLLOUT)
    socket.send(b"pulse")
    time.sleep(0.0005)
print("said", flush=True)
time.sleep(60.0)
"""


def test_who_talks_to_a_busy_server_and_dies_does_not_take_it_along():
    """While a model is evaluated nobody reads; that must not stop libzmq from reading."""
    busy = subprocess.run(
        [sys.executable, "-c", BUSY, TALKS], capture_output=True, text=True, timeout=120
    )
    assert busy.returncode != -signal.SIGABRT, busy.stderr
    assert busy.returncode == 0, busy.stderr
    assert int(busy.stdout) > 300


@pytest.mark.parametrize("use", [sockets.bound, sockets.connected])
def test_a_port_that_is_none_is_not_taken_for_another(use):
    """ZeroMQ would take what is left of it modulo 65536."""
    with (
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
        pytest.raises(ConfigError, match="71071: ports end with 65535"),
    ):
        use(socket, "tcp://127.0.0.1:71071")


def test_nobody_takes_a_path_that_somebody_listens_at(tmp_path):
    """ZeroMQ itself would, and the first would hear nothing any more."""
    endpoint = f"ipc://{tmp_path}/run"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as first:
        assert sockets.bound(first, endpoint) == endpoint
        with (
            context.socket(zmq.ROUTER) as second,
            pytest.raises(ConfigError, match=r"cannot listen there [(]another process does"),
        ):
            sockets.bound(second, endpoint)
        with context.socket(zmq.DEALER) as dealer:
            sockets.connected(dealer, endpoint)
            dealer.send(b"here")
            assert first.poll(10_000)
    (tmp_path / "run").touch()  # as one that was killed leaves it
    with zmq.Context() as context, context.socket(zmq.ROUTER) as third:
        assert sockets.bound(third, endpoint) == endpoint


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.DEALER])
def test_libzmq_itself_never_stops_reading(kind):
    with zmq.Context() as context, sockets.limited(context, kind, Liveness()) as socket:
        assert socket.rcvhwm == 0
        assert socket.sndhwm == sockets.QUEUED
