"""ZeroMQ sockets with every limit set, and what their monitors tell."""

import errno
import fcntl
import os
import re
import socket as os_socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import WINDOW

QUEUED = 2 * WINDOW  # messages to a peer
MOST_FRAMES = wire.MOST_ARRAYS + 2  # header, arrays, and one that is too many
ZERO_COPY = 10  # ZMQ_ZERO_COPY_RECV, of a context
LINGER_MS = 1000
HANDSHAKE_MS = 3000
CONNECT_MS = 3000  # then again; the system's own patience doubles each time, up to minutes
PIECE_S = 60.0  # for a piece of a model to arrive: 140 kbit/s
RECONNECT_MS = 100, 5000
BACKLOG = 1024
# As numbers: to combine ZeroMQ's own flags takes as long as to send.
_NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
# Without the questions that zmq.Socket asks of every frame.
_send, _recv = zmq.backend.Socket.send, zmq.backend.Socket.recv
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def limited(context: zmq.Context, kind: int, liveness: Liveness) -> zmq.Socket:
    """A socket that no peer can hold or hang; what waits unread is for a ``Guard`` to bound.

    With a limit of its own on that, libzmq 4.3.5 can end the process.
    """
    context.set(ZERO_COPY, 0)  # else a message of 40 bytes may hold 8 kB
    made = context.socket(kind)
    made.linger = LINGER_MS
    made.maxmsgsize = max(wire.PIECE_BYTES, wire.MOST_HEADER) + 2**16
    made.sndhwm, made.rcvhwm = QUEUED, 0
    made.handshake_ivl = HANDSHAKE_MS
    made.heartbeat_ivl = round(500 * liveness.suspect_after_s)
    made.heartbeat_timeout = made.heartbeat_ttl = round(1000 * liveness.down_after_s)
    made.ipv6 = True
    if kind == zmq.ROUTER:
        made.router_mandatory = 1
        made.backlog = BACKLOG
    else:
        made.connect_timeout = CONNECT_MS
        made.immediate = 1  # what cannot be sent is sent again by the link, not kept by the socket
        made.reconnect_ivl, made.reconnect_ivl_max = RECONNECT_MS
    return made


def patient(socket: zmq.Socket) -> None:
    """Have ``socket`` wait for a piece of a model on a slow line, silent until the piece is whole.

    Who lives has to be seen elsewhere: from beats on a connection of their own.
    """
    socket.heartbeat_timeout = socket.heartbeat_ttl = round(1000 * PIECE_S)


def _check(endpoint: str) -> None:
    """Raise ConfigError where the port is none: ZeroMQ would take another."""
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and port.isdecimal() and int(port) >= 2**16:
        raise ConfigError(f"{endpoint}: ports end with {2**16 - 1}")


def unknown(endpoint: str) -> str:
    """What to say where the host in ``endpoint`` has a name that means nothing here; else "".

    >>> unknown("tcp://127.0.0.1:5555"), unknown("ipc:///tmp/run"), unknown("tcp://node..7:5555")
    ('', '', 'node..7 is not known here')
    """
    host = urlsplit(endpoint).hostname
    if not host:
        return ""
    try:
        os_socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return f"{host} is not known here"
    return ""


@contextmanager
def _alone(endpoint: str) -> Iterator[None]:
    """Keep an ``ipc`` path for who has it: ZeroMQ would take it away, and tell nobody.

    Raises:
        ConfigError: somebody listens there.
    """
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or path.startswith(("@", "*")):
        yield
        return
    with ExitStack() as held:
        with suppress(OSError):  # where it cannot be locked, the rest is all there is
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            held.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)  # of two that begin at once one is first
        with os_socket.socket(os_socket.AF_UNIX) as knock, suppress(OSError):
            knock.setblocking(False)
            if knock.connect_ex(path) in (0, errno.EAGAIN):
                raise ConfigError(f"{endpoint}: cannot listen there (another process does)")
        yield


def bound(socket: zmq.Socket, endpoint: str) -> str:
    """Bind; answers where, with the port that ``*`` became."""
    _check(endpoint)
    try:
        with _alone(endpoint):
            socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{endpoint}: cannot listen there ({error.strerror})") from None
    return re.sub(r"\[::ffff:([\d.]+)\]", r"\1", socket.getsockopt_string(zmq.LAST_ENDPOINT))


def connected(socket: zmq.Socket, endpoint: str) -> None:
    """Connect, from now on and again whenever the connection is lost."""
    _check(endpoint)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(
            f'{endpoint}: cannot connect ({error.strerror}); write it as "tcp://host:5555"'
        ) from None


def size(frames: list[Any]) -> int:
    """Bytes of a message, whose frames are of bytes."""
    return sum(map(len, frames))


def send(socket: zmq.Socket, frames: list[Any]) -> None:
    """Send a message, or raise zmq.Again where it cannot be had at once.

    Small frames are copied: to share their memory takes twice as long.
    """
    *most, last = frames
    for frame in most:
        _send(socket, frame, _MORE, len(frame) < zmq.COPY_THRESHOLD)
    _send(socket, last, _NOW, len(last) < zmq.COPY_THRESHOLD)


def sender(socket: zmq.Socket) -> bytes | None:
    """Whose message a ROUTER has next, to be had with ``receive``; None: there is none."""
    try:
        address: bytes = _recv(socket, _NOW)
    except zmq.Again:
        return None
    return address


def receive(socket: zmq.Socket, wait: bool = False) -> list[zmq.Frame] | None:
    """The frames of a message, or None where there is none (in time, where it may ``wait``)."""
    try:
        frame = _recv(socket, 0 if wait else _NOW, False)
    except zmq.Again:
        return None
    frames = [frame]
    while frame.more:
        frame = _recv(socket, _NOW, False)
        if len(frames) < MOST_FRAMES:  # what is beyond is dropped, and the rest refused
            frames.append(frame)
    return frames


def told(monitor: zmq.Socket) -> list[tuple[int, int]]:
    """What a socket's monitor has to tell: (event, its value)."""
    events = []
    while monitor.poll(0):
        found = recv_monitor_message(monitor)
        events.append((int(found["event"]), int(found["value"])))
    return events
