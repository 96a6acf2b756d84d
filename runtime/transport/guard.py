"""What comes over a process's connections, counted; who sends more than the run can need is cut.

libzmq reads whatever comes into memory, as it must: where a limit of its own is reached it may end
the process.  So the bound is ours.  For each connection the kernel counts the bytes that came, and
this process those that it was given as whole messages; the difference waits, also where a message
never ends.  A thread looks, since the run's own may be busy with a model.

Connections over which nothing was heard yet, before their handshake or after it, have a budget
(and ``sockets.HANDSHAKE_MS`` for the handshake), and so have those of one key: beyond it the oldest
goes.  Of ``ipc`` the kernel counts no bytes: who may write to that file is trusted so far.
"""

import os
import resource
import socket as os_socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import zmq

from offbeat.runtime.base.errors import Refused
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import WINDOW
from offbeat.runtime.protocol.roster import MOST_WRONG
from offbeat.runtime.transport import sockets

# Between two looks: mostly, and where something waits, or somebody is new.
LOOK_S, ALARMED_S = 0.1, 0.01
SHARE = 50  # the time between two looks is as many times what one computes
LATEST_S = 1.0  # but no longer
NOTICED = 2**16  # bytes that wait
AGAIN = 16  # messages that are sent again to who has been busy for hours
MOST_LARGE = 4  # arrays of a message that are as large as they may be
BESIDES = 2 * wire.MOST_HEADER  # bytes of a node's rare messages, as its greeting
# Bytes that may come in a heartbeat's time and are, or may wait as, no message; ZeroMQ's own come
# at the usual pace from who does not know the run's yet.
BEATS, USUAL_S = 256, Liveness().heartbeat_s
MOST_SILENT = 4096  # connections that nothing was heard over
MOST_OF_A_KEY = 16  # connections of one member
_RECEIVED = struct.Struct("=Q"), 128, 136  # tcpi_bytes_received: at which byte of TCP_INFO
_EVENT = struct.Struct("=HI")
_BEGUN = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED


def raise_limit() -> int:
    """Have as many open files as this process may; answers how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft if soft != resource.RLIM_INFINITY else 2**20


def needs(kinds: Mapping[str, wire.Kind]) -> int:
    """Bytes that an honest node may have on its way at most: a link's window of the largest."""
    largest = 0
    for kind in kinds.values():
        if kind.stranger:  # of which nobody has many on his way
            continue
        sizes = (int(wire.CODED_SLACK[0] * one.nbytes) for one in kind.arrays.values())
        arrays = sorted(sizes)[-MOST_LARGE:]
        pieces = wire.PIECE_BYTES if arrays and arrays[-1] > wire.PIECE_BYTES else 0
        largest = max(largest, pieces, sum(one for one in arrays if one <= wire.PIECE_BYTES))
    return (WINDOW + AGAIN) * (largest + wire.INLINE_BYTES)


class Connection:
    """One of them: what came over it, and what was heard.

    Args:
        number: of its descriptor, for as long as that is not another's.
        place: port, or path of ``ipc``, where the side that did not begin it listens.
        ours: whether this side began it.

    Raises:
        OSError: the descriptor is not, or no more, such a connection's.
    """

    def __init__(self, number: int, place: int | str | bytes, *, ours: bool) -> None:
        # A duplicate can be asked, and ended, when the number may be another's already.
        copy = os.dup(number)
        try:
            self.socket = os_socket.socket(fileno=copy)
        except OSError:  # it is no socket's any more
            os.close(copy)
            raise
        try:
            there = self.socket.getpeername() if ours else self.socket.getsockname()
            if place != (there if self.socket.family == os_socket.AF_UNIX else there[1]):
                raise OSError("the descriptor is another's")
            self.inode = os.fstat(copy).st_ino
        except OSError:
            self.socket.close()
            raise
        self.number, self.address, self.node = number, b"", ""
        self.cut = self.closed = False
        self.heard = ours
        self.wrong = 0  # messages, in a row
        self.received = self.read = self.unread = 0  # bytes: came, as whole messages, neither
        self.spoke_s = self._looked_s = time.monotonic()  # when a message was read last
        self._besides, self._spoke = 0.0, 0  # bytes that are no message's; of which it knows
        self.drains = 0  # when all it left will have been read

    def look(self, now_s: float, rate: float) -> None:
        """See what waits; ``rate``: bytes a second that are no messages, or small ones."""
        read = self.read
        if not self.closed:
            try:
                info = self.socket.getsockopt(
                    os_socket.IPPROTO_TCP, os_socket.TCP_INFO, _RECEIVED[2]
                )
                (self.received,) = _RECEIVED[0].unpack_from(info, _RECEIVED[1])
            except (OSError, struct.error):  # ipc, or a kernel that does not count
                self.received = read
            if read != self.read:
                return  # more was read meanwhile; the next look sees it
            most = self._besides + rate * (now_s - self._looked_s)
            self._besides, self._looked_s = min(most, self.received - read), now_s
            if read != self._spoke:
                self._spoke, self.spoke_s = read, now_s
        self.unread = max(0, round(self.received - read - self._besides))

    def gone(self) -> bool:
        """Whether libzmq has let go of it."""
        try:
            return os.fstat(self.number).st_ino != self.inode
        except OSError:
            return True

    def end(self) -> None:
        """Cut it."""
        self.cut = True
        with suppress(OSError):
            self.socket.shutdown(os_socket.SHUT_RDWR)

    @property
    def peer(self) -> str:
        """Where it is from."""
        with suppress(OSError, IndexError, TypeError):
            return str(self.socket.getpeername()[0]).removeprefix("::ffff:") or "ipc"
        return "somewhere"


class Guard:
    """All connections of a process's sockets.

    Args:
        context: theirs.
        needs: bytes that a node may have on its way; see ``needs``.
        nodes: that may.
        heartbeat_s: see ``Liveness``.
        keyed: whether messages are encrypted.
    """

    def __init__(
        self, context: zmq.Context, needs: int, nodes: int, heartbeat_s: float, *, keyed: bool
    ) -> None:
        self._context = context
        # Unread of a connection, and of all, also of those that are closed.
        self._most, self._total = needs + BESIDES, nodes * needs + 2 * BESIDES
        self._rate = BEATS / min(heartbeat_s, USUAL_S)
        self._sealed = 33 if keyed else 0  # bytes of a frame, beside its length and flags
        self._budget = max(16, min(MOST_SILENT, (raise_limit() - _open()) // 4))
        self._table: dict[tuple[zmq.Socket, int], Connection] = {}  # of those that are open
        self._inodes: set[int] = set()  # theirs
        self._left: dict[Connection, None] = {}  # closed, and not all was read of what they left
        self._before: dict[tuple[zmq.Socket, int], Connection] = {}  # the last, without a message
        self._by_address: dict[bytes, Connection] = {}
        self._silent: dict[Connection, None] = {}  # oldest first
        self._of: dict[str, dict[Connection, None]] = {}  # key's name -> its own; "": without one
        self._watched: dict[zmq.Socket, tuple[zmq.Socket, Any, int]] = {}  # by monitor
        self._places: dict[zmq.Socket, int | str | bytes] = {}
        self._told: deque[tuple[Any, int, int]] = deque()
        self._cuts: deque[tuple[str, str]] = deque(maxlen=WINDOW)
        self.ended = 0  # connections that were cut
        self._drains = 0  # how often nothing was left to be read
        self._waiting = 0  # bytes unread, of all
        self._alarm_s = 0.0  # until when somebody is new
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def watch(self, socket: zmq.Socket, events: int, key: Any = None) -> None:
        """Watch ``socket``, before it is bound or connected; ``events`` are those to be told."""
        where = f"inproc://guard-{id(socket)}"
        socket.monitor(where, events | _BEGUN)
        monitor = self._context.socket(zmq.PAIR)
        monitor.linger = monitor.rcvhwm = 0  # at a limit libzmq would wait for its reader
        monitor.connect(where)
        self._watched[monitor] = socket, key, events

    def start(self) -> None:
        """Begin to look, once all are bound or connected."""
        for socket, *_ in self._watched.values():
            self._places[socket] = _place(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for monitor, (socket, *_) in self._watched.items():
            socket.disable_monitor()
            monitor.close(0)
        for one in self._table.values():
            one.socket.close()
        self._table.clear()
        self._watched.clear()

    # -- What the run's thread tells -------------------------------------------------------------

    def came(
        self, socket: zmq.Socket, address: bytes, frames: Sequence[zmq.Frame], nbytes: int
    ) -> Connection | None:
        """Count a message ``frames`` of ``nbytes``; answers over which connection it came."""
        one = self._by_address.get(address)
        if one is None and (one := self._first(socket, address, frames[0])) is None:
            return None
        sealed = self._sealed
        one.read += nbytes + (2 + sealed) * len(frames)
        if nbytes + sealed > 255:  # the length of such a frame is written in eight bytes
            one.read += 7 * sum(len(frame) + sealed > 255 for frame in frames)
        return one if one.address else None

    def _first(self, socket: zmq.Socket, address: bytes, frame: zmq.Frame) -> Connection | None:
        """Over which connection ``frame`` came, as far as is known, the first of its address."""
        try:
            number: Any = frame.get(zmq.SRCFD)
        except zmq.ZMQError:
            return None
        with self._lock:
            one = self._opened(socket, number)  # of which the thread may not have heard yet
            before = self._before.get((socket, number))
            if before is not None and before.drains > self._drains:
                return one or before  # it may be what is left of one that had this number before
            if one is not None and not one.address:
                one.address = address
                self._by_address[address] = one
            return one

    def drained(self) -> None:
        """Nothing is left to be read."""
        self._drains += 1

    def judge(self, one: Connection, node: str | None, blame: int) -> None:
        """How wrong a message was; ``node``: whose, where a key says so."""
        if blame:
            one.wrong += blame
            if one.wrong >= MOST_WRONG:
                with self._lock:
                    self._end(one, "too many messages in a row that are of no use")
            return
        one.wrong = 0
        if not one.heard:
            with self._lock:
                self._known(one, node or "")

    def _known(self, one: Connection, node: str) -> None:
        one.heard, one.node = True, node
        self._silent.pop(one, None)
        if one.cut or one.closed:
            return
        mine = self._of.setdefault(node, {})
        mine[one] = None
        if len(mine) > (most := MOST_OF_A_KEY if node else self._budget):
            longest = min(mine, key=lambda other: other.spoke_s)
            self._end(longest, f"{node or 'who has no key'} has {most} others")

    def cut(self, cuts: list[tuple[bytes, str]]) -> None:
        """End the connections of ``cuts``: addresses, and why; the list is empty then."""
        with self._lock:
            for address, why in cuts:
                if (one := self._by_address.get(address)) is not None:
                    self._end(one, why)
        cuts.clear()

    def heard(self) -> Iterator[tuple[Any, int, int]]:
        """Events of sockets that were to be told: key of socket, event, its value."""
        while self._told:
            yield self._told.popleft()

    def ends(self) -> Iterator[tuple[str, str]]:
        """The last connections that were cut: whence, and why.

        Raises:
            Refused: nothing looks at connections any more.
        """
        if not self._thread.is_alive():
            raise Refused(
                "the thread that bounds what others may send has ended; start this process again, "
                "and it goes on where it was"
            )
        while self._cuts:
            yield self._cuts.popleft()

    # -- The thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for monitor in self._watched:
            poller.register(monitor, zmq.POLLIN)
        due_s = 0.0
        while not self._stop.is_set():
            left_s = min(due_s - time.monotonic(), LOOK_S)
            for monitor, _ in poller.poll(max(0, round(1000 * left_s))):
                self._hear(monitor)
            if time.monotonic() < due_s:
                continue
            before_s = time.thread_time()  # not of the clock, which also others use up
            with self._lock:
                self._look()
            took_s, now_s = time.thread_time() - before_s, time.monotonic()
            alarmed = now_s < self._alarm_s or self._waiting > NOTICED
            due_s = now_s + min(LATEST_S, max(ALARMED_S if alarmed else LOOK_S, SHARE * took_s))

    def _hear(self, monitor: zmq.Socket) -> None:
        socket, key, wanted = self._watched[monitor]
        for _ in range(MOST_SILENT):  # then it is time to look
            try:
                event, value = _EVENT.unpack(monitor.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            monitor.recv()  # its endpoint
            if event & _BEGUN:  # that one ended is seen: its number may be the next one's by now
                with self._lock:
                    self._opened(socket, value, ours=event == zmq.EVENT_CONNECTED)
            if event & wanted:
                self._told.append((key, event, value))

    def _opened(self, socket: zmq.Socket, number: int, *, ours: bool = False) -> Connection | None:
        """The connection that has ``number``, if one of the socket's has."""
        place = socket, number
        if (old := self._table.get(place)) is not None:
            if not old.gone():
                return old
            self._closed(place, old)
        try:
            one = Connection(number, self._places[socket], ours=ours)
        except OSError:  # it is closed already
            return None
        if one.inode in self._inodes:  # the number is one of the duplicates'
            one.socket.close()
            return None
        self._table[place] = one
        self._inodes.add(one.inode)
        if ours:
            return one
        self._silent[one] = None
        self._alarm_s = time.monotonic() + sockets.HANDSHAKE_MS / 1000
        if self._waiting > self._total:
            self._end(one, "too much waits unread to let more come in")
        elif len(self._silent) > self._budget:
            self._end(next(iter(self._silent)), f"{self._budget} others are as silent")
        return one

    def _closed(self, place: tuple[zmq.Socket, int], one: Connection) -> None:
        one.look(time.monotonic(), self._rate)
        one.closed, one.drains = True, self._drains + 2
        one.socket.close()
        self._inodes.discard(one.inode)
        del self._table[place]
        self._left[one] = None
        if not one.address:
            self._before[place] = one
        self._forget(one)

    def _forget(self, one: Connection) -> None:
        self._silent.pop(one, None)
        if (mine := self._of.get(one.node)) is not None:
            mine.pop(one, None)
            if not mine:
                del self._of[one.node]

    def _look(self) -> None:
        now_s = time.monotonic()
        for one in [*self._table.values(), *self._left]:
            one.look(now_s, self._rate)
        here = [one for one in self._table.values() if not one.cut]
        for one in here:
            if one.unread > self._most:
                self._end(one, f"{one.unread} bytes wait that nobody needs")
        self._waiting = sum(one.unread for one in [*self._table.values(), *self._left])
        if self._waiting > self._total and here:
            fair = sum(one.unread for one in here) / len(here)
            for one in here:
                if one.unread >= max(fair, NOTICED):
                    self._end(one, f"{self._waiting} bytes wait of all, {one.unread} of this one")
        for place, one in list(self._table.items()):
            if one.gone():
                self._closed(place, one)
        for one in [one for one in self._left if one.drains <= self._drains]:
            del self._left[one]  # all it left was read
            self._by_address.pop(one.address, None)

    def _end(self, one: Connection, why: str) -> None:
        if one.cut or one.closed:
            return
        self._cuts.append((one.peer, why))
        self.ended += 1
        one.end()
        self._forget(one)


def _open() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64


def _place(endpoint: str) -> int | str | bytes:
    path = endpoint.removeprefix("ipc://")
    if path == endpoint:
        return urlsplit(endpoint).port or 0
    return f"\0{path[1:]}".encode() if path.startswith("@") else path
