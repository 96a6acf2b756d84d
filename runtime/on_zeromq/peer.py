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
import math
import os
import random
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from logging import INFO, WARNING
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import zmq
from threadpoolctl import threadpool_limits

from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ComputeError, ConfigError, PeerError, Refused, StorageError
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, Note, Seldom, identify, tell
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.hosted import Envelope, NodeLoop, NodeReport
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import Compute
from offbeat.runtime.on_zeromq.alike import PeerAddress, check, lines
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import peer as mesh
from offbeat.runtime.protocol.peer import PeerProtocol
from offbeat.runtime.protocol.wire import PIECE_BYTES, pack, parcels
from offbeat.runtime.run import checkpoint, folders
from offbeat.runtime.run.claim import Claim
from offbeat.runtime.run.records import Records
from offbeat.runtime.transport import keys, sockets
from offbeat.runtime.transport.guard import Guard, needs
from offbeat.runtime.transport.metrics import Exporter
from offbeat.workers.tasks import device as devices
from offbeat.workers.tasks.contract import guarded
from offbeat.workers.tasks.external import ELSEWHERE
from offbeat.workers.work import OwnLoop

AT_ONCE = 256  # messages that are read before anything else is looked at
LEAVE_S = 10.0  # for the node's state, once the process is asked to end
FAREWELL_S = 0.5  # for the last words to be on their way
RECONNECT_MS = 100, 1000
KNOCK_S = 2.0  # after a neighbour has refused this peer's key, before it knocks again
MOST_UNASKED = 2**16  # messages of a neighbour where none are awaited, at a look
MOST_WATCHERS = 16  # whose reports are on their way at a time


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
        watched: whether it does what a watcher says, which also keeps the records.
        descriptor: of a socket that listens already, or None.
        metrics: where they are served; see ``metrics.address``; "": nowhere.

    Raises:
        ConfigError, Fenced, Refused, StorageError.
    """

    elsewhere: Callable[[int, Compute], None] | None = None

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
        watched: bool = False,
        descriptor: int | None = None,
        metrics: str = "",
    ) -> None:
        if not watched:
            check(experiment)
        if len(seats) != experiment.fleet.workers:
            raise ConfigError(
                f"the experiment has {experiment.fleet.workers} nodes, and {len(seats)} are listed"
            )
        self.experiment, self.me, self.folder, self._watched = experiment, me, folder, watched
        self.seat, self._seats, self._device = seats[me], seats, device
        if self.elsewhere is None and isinstance(experiment.work, OwnLoop):
            raise ConfigError(f"own-loop: {ELSEWHERE}")
        self.liveness = Liveness(suspect_after_s)
        text = f"{lines(experiment, seats)}\nsuspect_after_s = {suspect_after_s:g}"
        if self.elsewhere is None:
            _prepare(experiment, device)
        bind = bind or self.seat.endpoint
        keys.check_bind(bind, keys_folder)
        node = gossip_node(experiment, me)
        x = experiment.task.initial(experiment.seed)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
        self._claim = Claim(folder, "peer")
        self._context = zmq.Context()
        self._gate: keys.Gate | None = None
        self._side = ThreadPoolExecutor(1)  # evaluates and saves
        self._hosted: NodeLoop | None = None
        self._exporter: Exporter | None = None
        spoken = mesh.spoken(x)
        self._guard = Guard(
            self._context,
            needs(spoken),
            len(node.neighbours),
            self.liveness.heartbeat_s,
            keyed=keys_folder is not None,
        )
        self._seldom = Seldom()
        self._bytes_in = self._bytes_out = 0  # of whole messages
        self._spent = 0.0, 0  # seconds, jobs
        try:
            self._identity = {} if watched else experiment.identity()
            self._exact = (folder / EXACT).exists()
            self._state, self._notes = self._saved()
            self.mesh = PeerProtocol(
                hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
                text,
                me,
                [seat.name for seat in seats],
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
            run, incarnation = self.mesh.run, self.mesh.incarnation
            identify(run=run, node=self.seat.name, incarnation=incarnation)
            self._open(bind, keys_folder, descriptor)
            if metrics:
                self._exporter = Exporter(metrics, "peer")
        except BaseException:
            self.close()
            raise
        self.records = Records(
            experiment.fleet, None if watched else folder, experiment.record.trace
        )
        self._mail: deque[Any] = deque()  # from the node's thread
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._replies: dict[bytes, tuple[str, int, bytes]] = {}  # watcher -> its last answer
        self._parts: deque[tuple[bytes, list[Any]]] = deque()  # of reports on their way
        self._report = NodeReport()
        self._leaving = self._late = False
        self._limit: float = 0 if watched else experiment.stop.steps or math.inf
        self._saving: Future[None] | None = None
        record = experiment.record
        self._saves = checkpoint.Attempts(record.max_failed_saves, record.save_every_s)
        self._evaluating: Future[dict[str, Any]] | None = None
        self._newest: tuple[int, int, float, Any] | None = None  # model that is to be, next
        self._began_s = time.monotonic()
        self._save_s = self._look_s = self._began_s
        self._remind_s = self._began_s + FIRST_S
        self._last: dict[str, Any] = {}  # metrics
        self._handshakes = 0
        self._knocks: dict[int, float] = {}  # neighbour -> when to knock again

    def _saved(self) -> tuple[dict[str, Any] | None, list[str]]:
        if not checkpoint.exist(self.folder / "checkpoint"):
            folders.set_aside(self.folder)
            return None, []
        state, notes = checkpoint.read(self.folder / "checkpoint")
        folders.check_same(self.folder, state, self.experiment, apart="evaluate.")
        return state, notes

    def _open(self, bind: str, keys_folder: Path | None, descriptor: int | None) -> None:
        context = self._context
        own = None
        self._router = sockets.limited(context, zmq.ROUTER, self.liveness)
        self._router.router_handover = 1
        sockets.patient(self._router)
        if keys_folder is not None:
            own = keys.identity(keys_folder, self.seat.name)
            self._gate = keys.Gate(context, keys_folder)
            keys.as_server(self._router, own)
        self._dealers: dict[tuple[int, bool], zmq.Socket] = {}  # whether for beats
        for j in self.mesh.neighbours:
            seat = self._seats[j]
            for beats in (False, True):
                dealer = sockets.limited(context, zmq.DEALER, self.liveness)
                if not beats:
                    sockets.patient(dealer)
                dealer.reconnect_ivl, dealer.reconnect_ivl_max = RECONNECT_MS
                dealer.linger = 0 if self._watched else round(1000 * FAREWELL_S)
                if own is not None and keys_folder is not None:
                    keys.as_client(dealer, own, keys.public(keys_folder, seat.name))
                self._dealers[j, beats] = dealer
                seen = sockets.FAILED if beats else zmq.EVENT_HANDSHAKE_SUCCEEDED
                self._guard.watch(dealer, seen, (j, beats))
                sockets.connected(dealer, seat.endpoint)
        self._guard.watch(self._router, 0)
        if descriptor is not None:
            self._router.setsockopt(zmq.USE_FD, descriptor)
        self.endpoint = sockets.bound(self._router, bind)
        self._guard.start()
        if self._gate is not None and own is not None:
            self._gate.self_test(keys.knock(self.endpoint), own.public)

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
        if self._leaving:
            raise KeyboardInterrupt
        self._leaving = True

    def _work(self) -> str:
        name = self.seat.name
        tell("listens", f"{name} listens at {self.endpoint}", endpoint=self.endpoint)
        if self._state is not None:
            step, skipped = self._state["step"], self._notes
            text = "; ".join([f"{name} has a checkpoint of round {step}", *skipped])
            tell("resumed", text, WARNING if skipped else INFO, step=step, skipped=skipped)
        tick_s = 0.0
        while True:
            now_s = time.monotonic()
            self._drain(now_s)
            if now_s >= tick_s or now_s >= self.mesh.due_s():
                self.mesh.tick(now_s)
                tick_s = now_s + self.liveness.tick_s
                self._look(now_s)
            if self._hosted is None and not self._leaving:
                self._begin(now_s)
            self._from_node(now_s)
            self._to_node()
            self._answer()
            self._send()
            if self.mesh.fate is not None:
                raise self.mesh.fate
            if (reason := self._reached(now_s)) is not None:
                return self._part(reason)
            self._wait(min(tick_s, self.mesh.due_s()) - time.monotonic())

    def _wait(self, seconds: float) -> None:
        if seconds <= 0 or self._mail:
            return
        if int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return  # the descriptor tells of what is new since the socket was asked last
        ready, _, _ = select.select([self._router.fileno(), self._wake], [], [], seconds)
        if self._wake in ready:
            os.eventfd_read(self._wake)

    def _drain(self, now_s: float) -> None:
        for _ in range(AT_ONCE):
            if (message := sockets.receive(self._router)) is None:
                self._guard.drained()
                return
            whom, *frames = message
            address, nbytes = whom.bytes, sockets.size(frames)
            self._bytes_in += nbytes
            one = self._guard.came(self._router, address, frames, nbytes)
            if one is not None and one.cut:
                continue  # what else it had said
            node = None if self._gate is None else self._gate.who(whom)
            buffers = [frame.buffer for frame in frames]
            blame = self.mesh.receive(address, node, buffers, now_s)
            if one is not None and (blame or one.wrong or not one.heard):
                self._guard.judge(one, node, blame)
            if self.mesh.cuts:
                self._guard.cut(self.mesh.cuts)

    def _send(self) -> None:
        if self.mesh.incarnation != self._claim.incarnation:
            self._claim.take(self.mesh.incarnation)  # before anybody hears of it
            identify(incarnation=self.mesh.incarnation)
        posts, self.mesh.outbox = self.mesh.outbox, []
        for j, beats, frames in posts:
            try:
                self._dealers[j, beats].send_multipart(frames, zmq.NOBLOCK, copy=False)
                self._bytes_out += sockets.size(frames)
            except zmq.Again:
                self.mesh.counts["unreachable"] += 1  # the link sends it again
        while self._parts and self._route(*self._parts[0]):
            self._parts.popleft()

    def _route(self, address: bytes, frames: list[Any]) -> bool:
        """Answer who asked, if he is still there; answers False where he takes nothing now."""
        try:
            self._router.send_multipart([address, *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        return True

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
        self._hosted = hosted = NodeLoop(
            self.experiment,
            [self.me],
            self._carry,
            incarnation=self.mesh.incarnation,
            joining=how == mesh.JOIN,
            refuse=self._refuse,
            elsewhere=self.elsewhere,
            states=None if state is None else {self.me: state["node"]},
        )
        if not self._watched:
            if self._state is not None:
                self.records.restore(self._state["records"])
            else:
                self.records.begin()
        up = self.mesh.begin(how, now_s)
        standing_s = self._state["time_s"] if self._state is not None else 0.0
        apart = how == mesh.RESTORE and not self._exact  # from its neighbours, in time
        hosted.begin(standing_s, 0 if apart else self._limit)
        if how != mesh.JOIN:
            for j in up:
                hosted.tell("meet", j, mesh.incarnation(self.mesh.neighbours[j].theirs))
        if apart:
            for j in self.mesh.neighbours:
                hosted.tell("down", j)
                hosted.tell("forget", j)
            for j in up:
                hosted.tell("up", j)
            hosted.tell("extend", self._limit)
        elif how == mesh.RESTORE:
            for j in set(self.mesh.neighbours) - set(up):
                hosted.tell("down", j)
        (self.folder / EXACT).unlink(missing_ok=True)
        if not self._watched:
            self._text("experiment.toml", self.experiment.toml())
        self._began_s = self._save_s = now_s
        text = f"{self.seat.name} begins ({how}) with {len(up)} of its neighbours"
        tell("begins", text, how=how, neighbours=[self._seats[j].name for j in up])

    def _carry(self, parcels: list[Envelope]) -> None:
        """From the node's thread: messages for others."""
        self._mail.append(parcels)
        os.eventfd_write(self._wake, 1)

    def _refuse(self, frm: int, error: PeerError) -> None:
        """From the node's thread: what ``frm`` sent cannot be right."""
        self._mail.append((frm, error))
        os.eventfd_write(self._wake, 1)

    def _from_node(self, now_s: float) -> None:
        while self._mail:
            item = self._mail.popleft()
            if isinstance(item, tuple):
                n = self.mesh.neighbours[item[0]]
                self.mesh.offence(n.address, n, item[1])
                continue
            for parcel in item:
                self.mesh.send(parcel, now_s)

    def _to_node(self) -> None:
        if self._hosted is None:
            return
        events, self.mesh.events = self.mesh.events, []
        for what, j in events:
            name = self._seats[j].name
            tell(what, f"{self.seat.name}: {name} is {what}", neighbour=name)
            if what == "down":  # what is on its way is of no use, and TCP may try for long
                with suppress(zmq.ZMQError):
                    self._dealers[j, False].disconnect(self._seats[j].endpoint)
                sockets.connected(self._dealers[j, False], self._seats[j].endpoint)
            self._hosted.tell(what, j)
            self.records.event({"event": what, "node": j}, self._hosted.now_s())
        if self.mesh.mail:
            mail, self.mesh.mail = self.mesh.mail, []
            self._hosted.deliver(mail)

    # -- Reports, records, checkpoints -----------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """What is not urgent: reports, notes, refused handshakes, the checkpoint that is due."""
        told, name = self._seldom, self.seat.name
        for note in self.mesh.notes:
            told.tell(note.event, f"{name}: {note.text}", note.level, **note.fields)
        self.mesh.notes.clear()
        for address, why in self._guard.ends():
            self.mesh.counts["cut"] = self._guard.ended
            text = f"{name}: a connection from {address} is ended: {why}"
            told.tell("cut", text, WARNING, address=address, why=why)
        told.remind()
        if now_s >= self._look_s:
            self._look_s = now_s + self.liveness.heartbeat_s
            self._knock(now_s)
            if self._exporter is not None:
                self._exporter.show(self.status())
            if self._gate is not None:
                for name in self._gate.revoked():
                    text = f"the key of {name} is not in the list any more"
                    tell("key_revoked", text, WARNING, member=name)
        if self._hosted is None or self._watched:
            return
        self._keep(self._hosted.report(0.0))
        if now_s - self._save_s >= self._saves.wait_s and not self._saving:
            self._save_s = now_s
            self._hosted.ask(0, "state")

    def _keep(self, told: NodeReport) -> None:
        """Write down what happened."""
        if told.error is not None:
            kind, said = told.error
            raise (kind or ComputeError)(said)
        self._report = told
        self.mesh.round = told.rounds.get(self.me, 0)
        self.records.rows += told.rows
        spent_s, jobs = self._spent
        self._spent = spent_s + sum(row[6] - row[5] for row in told.rows), jobs + len(told.rows)
        for loss in told.losses:
            self.experiment.task.report(loss)  # type: ignore[attr-defined]
        if told.inputs and self.experiment.record.trace:
            self.records.note({"inputs": told.inputs})
        if self._saving is not None and self._saving.done():
            saved, self._saving = self._saving, None
            with self._saves.bear():
                saved.result()
        if 0 in told.answers:
            try:
                self._saving = self._side.submit(self._write, self._whole(told.answers[0]))
            except StorageError as error:
                self._saving = Future()
                self._saving.set_exception(error)
        if self._evaluating is not None and self._evaluating.done():
            self._last = self._evaluating.result()
            self.records.add(self._last)
            self._evaluating = None
        if told.models:
            self._newest = told.models[-1]  # those before it are too many for this machine
        if self._newest is not None and self._evaluating is None:
            (k, _, time_s, x), self._newest = self._newest, None
            self._evaluating = self._side.submit(self._evaluate, k, time_s, x)

    def _evaluate(self, k: int, time_s: float, x: Any) -> dict[str, Any]:
        counts = self._report.counts.get(self.me, {})
        row = {"time_s": time_s, "step": k, "gradients": k * self.experiment.work.steps}
        return row | guarded(self.experiment.task).evaluate(x) | {"bytes": counts.get("bytes", 0)}

    def _whole(self, answer: Any) -> dict[str, Any]:
        assert self._hosted is not None
        return {
            "node": answer[self.me],
            "step": self.mesh.round,
            "gradients": self.mesh.round * self.experiment.work.steps,
            "time_s": self._hosted.now_s(),
            "records": self.records.state(),
            "experiment": self._identity,
        }

    def _write(self, state: dict[str, Any]) -> None:
        node = gossip_node(self.experiment, self.me)
        node.limit = 0  # it is only looked at
        node.restore(state["node"]["node"])
        state["x"] = self.experiment.task.initial(0) if node.joining else node.model
        try:
            checkpoint.write(self.folder / "checkpoint", state["records"]["flushed"], state)
            step = state["step"]
            tell("saved", f"{self.seat.name} saved a checkpoint of round {step}", step=step)
        except OSError as error:
            raise StorageError(
                f"{self.folder / 'checkpoint'}: cannot be written ({error.strerror}); the last "
                "checkpoint is intact: make room or mend the rights, then start the peer again"
            ) from None

    def _knock(self, now_s: float) -> None:
        """What sockets say of connections that are new, and of neighbours that refuse them."""
        for j in [j for j, when_s in self._knocks.items() if now_s >= when_s]:
            del self._knocks[j]
            for beats in (False, True):
                with suppress(zmq.ZMQError):  # where ZeroMQ has given it up altogether
                    self._dealers[j, beats].disconnect(self._seats[j].endpoint)
                sockets.connected(self._dealers[j, beats], self._seats[j].endpoint)
        for dealer in self._dealers.values():
            # A socket that only sends has to be asked: what it was disconnected from stays
            # connected until the end of what could be read is seen.
            for _ in range(MOST_UNASKED):
                if sockets.receive(dealer) is None:
                    break
        for (j, beats), event, _ in self._guard.heard():
            if not beats:  # TCP loses nothing but with its connection
                self.mesh.lost(j, now_s)
                continue
            name = self._seats[j].name
            self.mesh.counts["handshakes_refused"] += 1
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._hosted is None:
                raise Refused(
                    f"{name} does not let {self.seat.name} in: its key is not in the list "
                    f"there; at {name}, run offbeat keys authorize {self.seat.name} KEY"
                )
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # after which ZeroMQ does not
                self._knocks.setdefault(j, now_s + KNOCK_S)
            self._handshakes += 1
            if self._handshakes == 1:
                why = "is its key right?" if self._gate else "does it run with keys? Here are none"
                text = f"{self.seat.name}: the handshake with {name} fails; {why}"
                tell("key_refused", text, WARNING, count=1, neighbour=name)

    # -- Who asks --------------------------------------------------------------------------------

    def _answer(self) -> None:
        requests, self.mesh.requests = self.mesh.requests, []
        for address, node, kind, body in requests:
            if kind == "ask":  # who does not read the answer has to ask again
                status = say.Status(json.dumps(self.status()))
                self._route(address, self._packed("status", status))
            elif not self._watched:
                why = f"{node} would watch this peer, which nobody does"
                fields = {"member": node, "reason": "unknown_kind", "why": why}
                self.mesh.notes.append(Note("rejected", why, fields))
            else:
                self._watch(address, node, body)

    def _watch(self, address: bytes, node: str, body: mesh.Watch) -> None:
        last = self._replies.get(address)
        if last is None or last[1] != body.question:
            for what, *args in json.loads(body.commands):
                if what == "extend":
                    self._limit = args[0]
                    if self._hosted is not None:
                        self._hosted.tell("extend", args[0])
                elif what == "ask" and self._hosted is not None:
                    self._hosted.ask(*args)
            if len(self._replies) >= MOST_WATCHERS:
                self._replies.clear()
            last = node, body.question, trees.dumps(trees.dump(self._told()))
            self._replies[address] = last
        data = np.frombuffer(last[2], np.uint8)
        for at in range(0, len(data), PIECE_BYTES):
            part = data[at : at + PIECE_BYTES]
            told = mesh.Told(body.question, at, at + len(part) == len(data))
            self._parts.append((address, self._packed("told", told, {"part": part})))

    def _told(self) -> dict[str, Any]:
        """What happened since the last report."""
        told = NodeReport() if self._hosted is None else self._hosted.report(0.0)
        self.mesh.round = told.rounds.get(self.me, self.mesh.round)
        fields = dict(vars(told))
        error = fields.pop("error")
        fields["error"] = None if error is None else [getattr(error[0], "__name__", ""), error[1]]
        fields["rows"] = np.array(told.rows, float).reshape(-1, 7)
        return fields | {"incarnation": self.mesh.incarnation, "began": self._hosted is not None}

    def _packed(self, kind: str, body: Any, arrays: dict[str, Any] | None = None) -> list[Any]:
        (parcel,) = parcels(kind, body, arrays)
        return pack(parcel, run=self.mesh.run, node=self.seat.name, incarnation=0)

    def status(self) -> dict[str, Any]:
        """How it goes, for ``offbeat status``."""
        now_s = time.monotonic()
        counts = self._report.counts.get(self.me, {})
        standings = ["gathering", "gathering", "running", "done", "left"]

        def state(n: mesh.Neighbour) -> str:
            if n.up:
                return "up"
            gathers = self._hosted is None and self.mesh.hears(n, now_s)
            return standings[n.standing] if gathers else "down"

        loss = self._last.get("loss", math.nan)
        return {
            "node": self.seat.name,
            "state": standings[self.mesh.standing],
            "round": self.mesh.round,
            "incarnation": self.mesh.incarnation,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no other numbers
            "bytes": counts.get("bytes", 0),
            "run": self.mesh.run,
            "jobs": self._spent[1],
            "spent_s": list(self._spent),
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
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
        stop = self.experiment.stop
        if self._leaving:
            return "interrupted"
        if self._late:
            return "it came too late"
        if self._hosted is None or self._watched:
            return None
        if stop.wall_s is not None and now_s - self._began_s >= stop.wall_s:
            return "wall time"
        if stop.seconds is not None and self._hosted.now_s() >= stop.seconds:
            return "seconds"
        if self.mesh.standing == mesh.RUNNING and self._done():
            self.mesh.leave(mesh.DONE, now_s)
        busy = self._mail or self._evaluating is not None  # the last round's model is looked at
        if self.mesh.standing == mesh.DONE and self.mesh.finished(now_s) and not busy:
            return "steps"
        return None

    def _done(self) -> bool:
        """Whether the node has done all its rounds."""
        return self._report.rests and self.mesh.round >= self._limit

    def _part(self, reason: str) -> str:
        """Save, say goodbye."""
        now_s = time.monotonic()
        if self._hosted is not None and not self._watched:
            self._last_state()
            self._summary(reason)
        tell("ended", f"{self.seat.name} is done ({reason})", reason=reason)
        self.mesh.leave(mesh.DONE if reason == "steps" else mesh.LEFT, now_s)
        end_s = now_s + FAREWELL_S
        while time.monotonic() < end_s and (self.mesh.outbox or self._parts):
            self._send()
            time.sleep(0.01)
        return reason

    def _last_state(self) -> None:
        """Write the last checkpoint."""
        assert self._hosted is not None
        if self._saving is not None:
            self._saving.exception()  # whatever came of it: the state is saved once more
        self._saving = None
        self._hosted.ask(1, "state")
        end_s = time.monotonic() + LEAVE_S
        while time.monotonic() < end_s:
            told = self._hosted.report(0.1)
            told.answers.pop(0, None)  # of a save that was due: this one is newer
            self._keep(told)
            if 1 in told.answers:
                self._write(self._whole(told.answers[1]))
                return
            self.mesh.tick(time.monotonic())
            self._send()
        why = "its job takes too long; the checkpoint is an older one"
        text = f"{self.seat.name}: {why}"
        tell("save_failed", text, WARNING, failed=1, most=1, why=why)

    def _summary(self, reason: str) -> None:
        said = {"reason": reason, "round": self.mesh.round, **self._last}
        said |= {"counts": {**self._report.counts.get(self.me, {}), **self.mesh.counts}}
        self._text("summary.json", json.dumps(said, indent=1) + "\n")

    def _text(self, name: str, text: str) -> None:
        try:
            checkpoint.write_whole(self.folder / name, text.encode())
        except OSError as error:
            path = self.folder / name
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        if self._context.closed:
            return
        if self._hosted is not None:
            self._hosted.end(LEAVE_S)
        self._side.shutdown()
        if hasattr(self, "records"):
            self.records.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._gate is not None:
            self._gate.close()
        self._guard.close()
        self._context.destroy()
        if hasattr(self, "_wake"):
            os.close(self._wake)
        self._claim.close()


EXACT = "exact"  # a file that says that all peers go on from one moment


def _prepare(experiment: Experiment, device: str) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    devices.placed(experiment.task, device)
