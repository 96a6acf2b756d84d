"""The sockets of one peer: a ROUTER at which it listens, two DEALERS to each neighbour."""

import os
import select
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.on_zeromq.alike import PeerAddress
from offbeat.runtime.protocol.peer import PeerProtocol
from offbeat.runtime.transport import keys, sockets
from offbeat.runtime.transport.guard import Guard

AT_ONCE = 256  # messages that are read before anything else is looked at
RECONNECT_MS = 100, 1000
KNOCK_S = 2.0  # after a neighbour has refused this peer's key, before it knocks again
MOST_UNASKED = 2**16  # messages of a neighbour where none are awaited, at a look


class PeerSockets:
    """See the module.

    Args:
        seats, me: all nodes, and which of them this is.
        liveness: times.
        most_bytes: that a connection may have unread; see ``guard.needs``.
        neighbours: how many may connect.
        keys_folder: see ``PeerProcess``.
    """

    def __init__(
        self,
        seats: Sequence[PeerAddress],
        me: int,
        liveness: Liveness,
        most_bytes: int,
        neighbours: int,
        keys_folder: Path | None,
    ) -> None:
        self._seats, self._me, self._liveness, self._keys = seats, me, liveness, keys_folder
        self._context = zmq.Context()
        keyed = keys_folder is not None
        self.guard = Guard(self._context, most_bytes, neighbours, liveness.heartbeat_s, keyed=keyed)
        self.gate: keys.Gate | None = None
        self.bytes_in = self.bytes_out = 0  # of whole messages
        self._dealers: dict[tuple[int, bool], zmq.Socket] = {}  # whether for beats
        self._knocks: dict[int, float] = {}  # neighbour -> when to knock again

    def open(
        self, neighbours: Sequence[int], bind: str, linger_ms: int, descriptor: int | None
    ) -> None:
        """Listen, and speak to ``neighbours``; words outlive the process by ``linger_ms``."""
        own, context = None, self._context
        self._router = sockets.limited(context, zmq.ROUTER, self._liveness)
        self._router.router_handover = 1
        sockets.patient(self._router)
        if self._keys is not None:
            own = keys.identity(self._keys, self._seats[self._me].name)
            self.gate = keys.Gate(context, self._keys)
            keys.as_server(self._router, own)
        for j in neighbours:
            for beats in (False, True):
                dealer = sockets.limited(context, zmq.DEALER, self._liveness)
                if not beats:
                    sockets.patient(dealer)
                dealer.reconnect_ivl, dealer.reconnect_ivl_max = RECONNECT_MS
                dealer.linger = linger_ms
                if own is not None and self._keys is not None:
                    keys.as_client(dealer, own, keys.public(self._keys, self._seats[j].name))
                self._dealers[j, beats] = dealer
                seen = sockets.FAILED if beats else zmq.EVENT_HANDSHAKE_SUCCEEDED
                self.guard.watch(dealer, seen, (j, beats))
                sockets.connected(dealer, self._seats[j].endpoint)
        self.guard.watch(self._router, 0)
        if descriptor is not None:
            self._router.setsockopt(zmq.USE_FD, descriptor)
        self.endpoint = sockets.bound(self._router, bind)
        self.guard.start()
        if self.gate is not None and own is not None:
            self.gate.self_test(keys.knock(self.endpoint), own.public)

    def wait(self, seconds: float, wake: int) -> None:
        """Wait for mail, or for ``wake``, a descriptor of events."""
        if int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return  # the descriptor tells of what is new since the socket was asked last
        ready, _, _ = select.select([self._router.fileno(), wake], [], [], seconds)
        if wake in ready:
            os.eventfd_read(wake)

    def drain(self, protocol: PeerProtocol, now_s: float) -> None:
        """Give ``protocol`` what has come."""
        for _ in range(AT_ONCE):
            if (message := sockets.receive(self._router)) is None:
                self.guard.drained()
                return
            whom, *frames = message
            address, nbytes = whom.bytes, sockets.size(frames)
            self.bytes_in += nbytes
            connection = self.guard.came(self._router, address, frames, nbytes)
            if connection is not None and connection.cut:
                continue  # what else it had said
            node = None if self.gate is None else self.gate.who(whom)
            buffers = [frame.buffer for frame in frames]
            blame = protocol.receive(address, node, buffers, now_s)
            if connection is not None and (blame or connection.wrong or not connection.heard):
                self.guard.judge(connection, node, blame)
            if protocol.cuts:
                self.guard.cut(protocol.cuts)

    def post(self, j: int, beats: bool, frames: list[Any]) -> bool:
        """Send to a neighbour; answers False where it takes nothing now."""
        try:
            self._dealers[j, beats].send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self.bytes_out += sockets.size(frames)
        return True

    def route(self, address: bytes, frames: list[Any]) -> bool:
        """Answer who asked, if he is still there; answers False where he takes nothing now."""
        try:
            self._router.send_multipart([address, *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        return True

    def reconnect(self, j: int, beats: bool) -> None:
        """Connect anew to a neighbour."""
        with suppress(zmq.ZMQError):  # where ZeroMQ has given it up altogether
            self._dealers[j, beats].disconnect(self._seats[j].endpoint)
        sockets.connected(self._dealers[j, beats], self._seats[j].endpoint)

    def knock(self, now_s: float) -> Iterator[tuple[int, int | None]]:
        """Neighbours whose connection is new (None), or that refuse this peer, and how."""
        for j in [j for j, when_s in self._knocks.items() if now_s >= when_s]:
            del self._knocks[j]
            for beats in (False, True):
                self.reconnect(j, beats)
        for dealer in self._dealers.values():
            # A socket that only sends has to be asked: what it was disconnected from stays
            # connected until the end of what could be read is seen.
            for _ in range(MOST_UNASKED):
                if sockets.receive(dealer) is None:
                    break
        for (j, beats), event, _ in self.guard.heard():
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # after which ZeroMQ does not
                self._knocks.setdefault(j, now_s + KNOCK_S)
            yield j, event if beats else None

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        if self.gate is not None:
            self.gate.close()
        self.guard.close()
        self._context.destroy()
