"""A peer process: one gossip node, and its neighbours over ZeroMQ.

It listens at one ROUTER socket, and speaks to every neighbour over DEALER sockets that are
connected to that neighbour's: so whoever is listened to has proved its key.  Beats have one of
their own, so that on a slow line they do not wait behind a model.  The main thread moves
bytes and beats; the node, its gradients and its emulated times are in a thread of their own.

What all nodes share is the experiment and the list of nodes; no process is special.  A peer ends
when it has done its rounds and no neighbour needs it any more; in a run without rounds, when it has
told as many gradients of its own, going on to answer its neighbours until they have.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from logging import INFO, WARNING
from pathlib import Path
from types import FrameType
from typing import Any

import zmq
from threadpoolctl import threadpool_limits

from offbeat.runtime.base.errors import ConfigError, PeerError, Refused, StorageError
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, Seldom, identify, tell
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.hosted import Envelope, NodeLoop
from offbeat.runtime.node.effects import Compute
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import GossipNode
from offbeat.runtime.on_zeromq.alike import PeerAddress, lines
from offbeat.runtime.on_zeromq.peer_sockets import PeerSockets
from offbeat.runtime.on_zeromq.policies import FAREWELL_S, LEAVE_S, Keeping, PeerPolicy
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import peer as mesh
from offbeat.runtime.protocol.peer import PeerProtocol
from offbeat.runtime.protocol.wire import Kind, pack, parcels
from offbeat.runtime.run import checkpoint, folders
from offbeat.runtime.run.claim import Claim
from offbeat.runtime.transport import keys, sockets
from offbeat.runtime.transport.guard import needs
from offbeat.runtime.transport.metrics import Exporter
from offbeat.workers.tasks import device as devices
from offbeat.workers.tasks.external import ELSEWHERE
from offbeat.workers.work import OwnLoop


class PeerProcess:
    """One peer.

    A subclass may have the node's jobs computed ``elsewhere``; see ``NodeLoop``.

    Args:
        experiment: what all run.
        seats: all nodes.
        me: its number among them.
        bind: where it listens; "": at its seat's endpoint.
        keys_folder: with its own key and all neighbours', each under its node's name; or None.
        folder: its own, for records and checkpoints.
        suspect_after_s: see ``Liveness``.
        device: where a torch task computes.
        policy: whether it keeps the records itself, or does what a driver says, which does.
        descriptor: of a socket that listens already, or None.
        metrics: where they are served; see ``metrics.address``; "": nowhere.

    Raises:
        ConfigError, Fenced, Refused, StorageError.
    """

    elsewhere: Callable[[int, Compute], None] | None = None
    _exporter: Exporter | None

    def __init__(
        self,
        experiment: Experiment,
        seats: Sequence[PeerAddress],
        me: int,
        folder: Path,
        *,
        bind: str = "",
        keys_folder: Path | None = None,
        suspect_after_s: float = 1.0,
        device: str = "cpu",
        policy: type[PeerPolicy] = Keeping,
        descriptor: int | None = None,
        metrics: str = "",
    ) -> None:
        policy.check(experiment)
        if len(seats) != experiment.fleet.workers:
            raise ConfigError(
                f"the experiment has {experiment.fleet.workers} nodes, and {len(seats)} are listed"
            )
        if self.elsewhere is None and isinstance(experiment.work, OwnLoop):
            raise ConfigError(f"own-loop: {ELSEWHERE}")
        self.experiment, self.me, self.folder = experiment, me, folder
        self.seat, self._seats = seats[me], seats
        self.liveness = Liveness(suspect_after_s)
        if self.elsewhere is None:
            _prepare(experiment, device)
        bind = bind or self.seat.endpoint
        keys.check_bind(bind, keys_folder)
        self._become()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
        self._claim = Claim(folder, "peer")
        node = gossip_node(experiment, me)
        spoken = say.spoken(experiment.task.initial(experiment.seed))
        self.sockets = PeerSockets(
            seats, me, self.liveness, needs(spoken), len(node.neighbours), keys_folder
        )
        try:
            self.policy = policy(self)
            self._exact = (folder / EXACT).exists()
            self._state, self._notes = self._saved()
            self.mesh = self._protocol(node, spoken)
            run, incarnation = self.mesh.run, self.mesh.incarnation
            identify(run=run, node=self.seat.name, incarnation=incarnation)
            self.sockets.open([*self.mesh.neighbours], bind, policy.linger_ms, descriptor)
            if metrics:
                self._exporter = Exporter(metrics, "peer")
        except BaseException:
            self.close()
            raise
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def _become(self) -> None:
        """What it holds."""
        self.hosted: NodeLoop | None = None
        self.limit: float = 0  # rounds that its node may begin
        self.leaving = self._late = False
        self.parts: deque[tuple[bytes, list[Any]]] = deque()  # of reports on their way
        self.began_s = self._look_s = time.monotonic()
        self.mail: deque[Any] = deque()  # from the node's thread
        self._exporter = None
        self._seldom = Seldom()
        self._remind_s = self.began_s + FIRST_S
        self._handshakes = 0
        self._closed = False

    def _protocol(self, node: GossipNode, spoken: dict[str, Kind]) -> PeerProtocol:
        suspect_after_s = self.liveness.suspect_after_s
        text = f"{lines(self.experiment, self._seats)}\nsuspect_after_s = {suspect_after_s:g}"
        return PeerProtocol(
            hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            text,
            self.me,
            [seat.name for seat in self._seats],
            sorted(node.neighbours),
            spoken,
            self.liveness,
            incarnation=self._claim.incarnation,
            nonce=random.SystemRandom().randrange(1, mesh.PROCESS),
            saved=self._state is not None,
            joins=node.bears,
            now_s=time.monotonic(),
            resend_s=sockets.PIECE_S,
        )

    def _saved(self) -> tuple[dict[str, Any] | None, list[str]]:
        if not checkpoint.exist(self.folder / "checkpoint"):
            folders.set_aside(self.folder)
            return None, []
        state, notes = checkpoint.read(self.folder / "checkpoint")
        folders.check_same(self.folder, state, self.experiment, apart="evaluate.")
        return state, notes

    # -- The loop --------------------------------------------------------------------------------

    def run(self) -> str:
        """Take part until the run is over; answers why it ended: as ``Result.reason``.

        Raises:
            Fenced: a younger process has its name; Refused: a neighbour does not let it in;
            ConfigError: the others run another experiment; Diverged; StorageError.
        """
        before = {n: signal.signal(n, self._asked_to) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            with threadpool_limits(1):
                return self._work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.close()

    def _asked_to(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: leave after the event at hand; a second one ends at once."""
        if self.leaving:
            raise KeyboardInterrupt
        self.leaving = True

    def _work(self) -> str:
        name = self.seat.name
        tell(
            "listens", f"{name} listens at {self.sockets.endpoint}", endpoint=self.sockets.endpoint
        )
        if self._state is not None:
            step, skipped = self._state["step"], self._notes
            text = "; ".join([f"{name} has a checkpoint of round {step}", *skipped])
            tell("resumed", text, WARNING if skipped else INFO, step=step, skipped=skipped)
        tick_s = 0.0
        while True:
            now_s = time.monotonic()
            self.sockets.drain(self.mesh, now_s)
            if now_s >= tick_s or now_s >= self.mesh.due_s():
                self.mesh.tick(now_s)
                tick_s = now_s + self.liveness.tick_s
                self._look(now_s)
            if self.hosted is None and not self.leaving:
                self._begin(now_s)
            self._from_node(now_s)
            self._to_node()
            self._answer()
            self.send()
            if self.mesh.fate is not None:
                raise self.mesh.fate
            if (reason := self._reached(now_s)) is not None:
                return self._part(reason)
            self._wait(min(tick_s, self.mesh.due_s()) - time.monotonic())

    def _wait(self, seconds: float) -> None:
        if seconds > 0 and not self.mail:
            self.sockets.wait(seconds, self._wake)

    def send(self) -> None:
        """Send what the protocol has for others."""
        if self.mesh.incarnation != self._claim.incarnation:
            self._claim.take(self.mesh.incarnation)  # before anybody hears of it
            identify(incarnation=self.mesh.incarnation)
        posts, self.mesh.outbox = self.mesh.outbox, []
        for j, beats, frames in posts:
            if not self.sockets.post(j, beats, frames):
                self.mesh.counts["unreachable"] += 1  # the link sends it again
        while self.parts and self.sockets.route(*self.parts[0]):
            self.parts.popleft()

    # -- The node --------------------------------------------------------------------------------

    def _begin(self, now_s: float) -> None:
        """Have the node begin, if it can."""
        how = self.mesh.decide(now_s)
        if how is None:
            if now_s >= self._remind_s:
                self._remind_s = now_s + REMIND_S
                here = [n.name for n in self.mesh.here(now_s)]
                text = f"{self.seat.name} waits for its neighbours; here: {here or 'none'}"
                tell("waiting", text, WARNING, here=here)
            return
        if how == mesh.OVER:
            self._late = True
            return
        state = self._state if how == mesh.RESTORE else None
        self.hosted = hosted = NodeLoop(
            self.experiment,
            [self.me],
            self._carry,
            incarnation=self.mesh.incarnation,
            joining=how == mesh.JOIN,
            refuse=self._refuse,
            elsewhere=self.elsewhere,
            states=None if state is None else {self.me: state["node"]},
        )
        self.policy.begin(self._state)
        up = self.mesh.begin(how, now_s)
        standing_s = self._state["time_s"] if self._state is not None else 0.0
        apart = how == mesh.RESTORE and not self._exact  # from its neighbours, in time
        hosted.begin(standing_s, 0 if apart else self.limit)
        if how != mesh.JOIN:
            for j in up:
                hosted.tell("meet", j, mesh.incarnation(self.mesh.neighbours[j].theirs))
        if apart:
            for j in self.mesh.neighbours:
                hosted.tell("down", j)
                hosted.tell("forget", j)
            for j in up:
                hosted.tell("up", j)
            hosted.tell("extend", self.limit)
        elif how == mesh.RESTORE:
            for j in set(self.mesh.neighbours) - set(up):
                hosted.tell("down", j)
        (self.folder / EXACT).unlink(missing_ok=True)
        self.policy.begun()
        self.began_s = now_s
        text = f"{self.seat.name} begins ({how}) with {len(up)} of its neighbours"
        tell("begins", text, how=how, neighbours=[self._seats[j].name for j in up])

    def _carry(self, parcels: list[Envelope]) -> None:
        """From the node's thread: messages for others."""
        self.mail.append(parcels)
        os.eventfd_write(self._wake, 1)

    def _refuse(self, frm: int, error: PeerError) -> None:
        """From the node's thread: what ``frm`` sent cannot be right."""
        self.mail.append((frm, error))
        os.eventfd_write(self._wake, 1)

    def _from_node(self, now_s: float) -> None:
        while self.mail:
            item = self.mail.popleft()
            if isinstance(item, tuple):
                n = self.mesh.neighbours[item[0]]
                self.mesh.offence(n.address, n, item[1])
                continue
            for parcel in item:
                self.mesh.send(parcel, now_s)

    def _to_node(self) -> None:
        if self.hosted is None:
            return
        events, self.mesh.events = self.mesh.events, []
        for what, j in events:
            name = self._seats[j].name
            tell(what, f"{self.seat.name}: {name} is {what}", neighbour=name)
            if what == "down":  # what is on its way is of no use, and TCP may try for long
                self.sockets.reconnect(j, False)
            self.hosted.tell(what, j)
            self.policy.records.event({"event": what, "node": j}, self.hosted.now_s())
        if self.mesh.mail:
            mail, self.mesh.mail = self.mesh.mail, []
            self.hosted.deliver(mail)

    # -- Reports, records, checkpoints -----------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """What is not urgent: reports, notes, refused handshakes, the checkpoint that is due."""
        told, name = self._seldom, self.seat.name
        for note in self.mesh.notes:
            told.tell(note.event, f"{name}: {note.text}", note.level, **note.fields)
        self.mesh.notes.clear()
        for address, why in self.sockets.guard.ends():
            self.mesh.counts["cut"] = self.sockets.guard.ended
            text = f"{name}: a connection from {address} is ended: {why}"
            told.tell("cut", text, WARNING, address=address, why=why)
        told.remind()
        if now_s >= self._look_s:
            self._look_s = now_s + self.liveness.heartbeat_s
            self._knock(now_s)
            if self._exporter is not None:
                self._exporter.show(self.status())
            if self.sockets.gate is not None:
                for name in self.sockets.gate.revoked():
                    text = f"the key of {name} is not in the list any more"
                    tell("key_revoked", text, WARNING, member=name)
        if self.hosted is not None:
            self.policy.look(self.hosted, now_s)

    def _knock(self, now_s: float) -> None:
        """What sockets say of connections that are new, and of neighbours that refuse them."""
        for j, event in self.sockets.knock(now_s):
            if event is None:  # TCP loses nothing but with its connection
                self.mesh.lost(j, now_s)
                continue
            name = self._seats[j].name
            self.mesh.counts["handshakes_refused"] += 1
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self.hosted is None:
                raise Refused(
                    f"{name} does not let {self.seat.name} in: its key is not in the list "
                    f"there; at {name}, run offbeat keys authorize {self.seat.name} KEY"
                )
            self._handshakes += 1
            if self._handshakes == 1:
                why = (
                    "is its key right?"
                    if self.sockets.gate
                    else "does it run with keys? Here are none"
                )
                text = f"{self.seat.name}: the handshake with {name} fails; {why}"
                tell("key_refused", text, WARNING, count=1, neighbour=name)

    # -- Who asks --------------------------------------------------------------------------------

    def _answer(self) -> None:
        requests, self.mesh.requests = self.mesh.requests, []
        for address, node, kind, body in requests:
            if kind == "ask":  # who does not read the answer has to ask again
                status = say.Status(json.dumps(self.status()))
                self.sockets.route(address, self.packed("status", status))
            else:
                self.policy.watched(address, node, body)

    def packed(self, kind: str, body: Any, arrays: dict[str, Any] | None = None) -> list[Any]:
        """The frames of a message to who asked."""
        (parcel,) = parcels(kind, body, arrays)
        return pack(parcel, run=self.mesh.run, node=self.seat.name, incarnation=0)

    def status(self) -> dict[str, Any]:
        """How it goes, for ``offbeat status``."""
        now_s = time.monotonic()
        standings = ["gathering", "gathering", "running", "done", "left"]

        def state(n: mesh.Neighbour) -> str:
            if n.up:
                return "up"
            gathers = self.hosted is None and self.mesh.hears(n, now_s)
            return standings[n.standing] if gathers else "down"

        return {
            "node": self.seat.name,
            "state": standings[self.mesh.standing],
            "round": self.mesh.round,
            "incarnation": self.mesh.incarnation,
            "run": self.mesh.run,
            **self.policy.facts(),
            "bytes_in": self.sockets.bytes_in,
            "bytes_out": self.sockets.bytes_out,
            "counts": dict(self.mesh.counts),
            "neighbours": [
                {
                    "node": n.name,
                    "where": self._seats[n.number].endpoint,
                    "state": state(n),
                    "round": n.round,
                    "silent_s": min(now_s - n.heard_s, 1e9),
                    "waiting": n.link.pending,
                }
                for n in self.mesh.neighbours.values()
            ],
        }

    # -- Ends ------------------------------------------------------------------------------------

    def _reached(self, now_s: float) -> str | None:
        """Why the peer ends, if it does."""
        if self.leaving:
            return "interrupted"
        if self._late:
            return "it came too late"
        return None if self.hosted is None else self.policy.reached(self.hosted, now_s)

    def _part(self, reason: str) -> str:
        """Save, say goodbye."""
        now_s = time.monotonic()
        if self.hosted is not None:
            self.policy.end(self.hosted, reason)
        tell("ended", f"{self.seat.name} is done ({reason})", reason=reason)
        self.mesh.leave(say.DONE if reason == "steps" else say.LEFT, now_s)
        end_s = now_s + FAREWELL_S
        while time.monotonic() < end_s and (self.mesh.outbox or self.parts):
            self.send()
            time.sleep(0.01)
        return reason

    def write_text(self, name: str, text: str) -> None:
        """Write a file of its folder, all of it or nothing."""
        try:
            checkpoint.write_whole(self.folder / name, text.encode())
        except OSError as error:
            path = self.folder / name
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.hosted is not None:
            self.hosted.end(LEAVE_S)
        if hasattr(self, "policy"):
            self.policy.close()
        if self._exporter is not None:
            self._exporter.close()
        self.sockets.close()
        if hasattr(self, "_wake"):
            os.close(self._wake)
        self._claim.close()


EXACT = "exact"  # a file that says that all peers go on from one moment


def _prepare(experiment: Experiment, device: str) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    devices.placed(experiment.task, device)
