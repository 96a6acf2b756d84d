"""The server's side of the protocol: messages and time in, messages and events out.

It knows no socket.  ``runtime.on_zeromq.server`` moves its bytes over ZeroMQ, the tests over a
simulated network, and it is the same code that meets both.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from offbeat.runtime.base import errors, shapes
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.logs import Note
from offbeat.runtime.base.tensors import finite
from offbeat.runtime.compute.backend import Back, ComputeEvent, Failed, Gone, JobRequest, JobResult
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import Full, ReliableChannel
from offbeat.runtime.protocol.roster import (
    GRAVE,
    MOST_OFFENCES,
    MOST_STRIKES,
    JobBook,
    Member,
    NotNow,
    Roster,
)
from offbeat.runtime.protocol.slot import MemberSlot, Outbox

SERVER = "server"  # the name under which it speaks
MOST_SHOWN = 400  # workers in a status
HARMLESS = (errors.OldIncarnation, errors.StaleJob, errors.NotFinite)  # honest ones do, too


class ServerProtocol(Outbox):
    """Server of one run.

    Args:
        run: its name; messages of other runs are refused.
        experiment: what workers are told to compute.
        kinds: what is spoken.
        slots: workers of the run.
        incarnation: of this server; above those of its predecessors on this run.
        liveness: times.
        package: the version of this package; workers with another are refused.
        resend_s: see ``ReliableChannel``; short where a standing connection can lose messages.
    """

    def __init__(
        self,
        run: str,
        experiment: str,
        kinds: Mapping[str, wire.Kind],
        slots: int,
        incarnation: int,
        liveness: Liveness,
        package: str,
        resend_s: float | None = None,
    ) -> None:
        super().__init__(run, SERVER, incarnation)
        self.liveness = liveness
        self._experiment, self._kinds, self._package = experiment, kinds, package
        self._manifest, self._resend_s = say.manifest(kinds), resend_s or liveness.resend_s
        self._reader, self._pool = wire.Reader(run, kinds), wire.Pool()
        self._keeping = any(name.startswith(say.KEPT) for name in kinds["work"].arrays)
        self.roster, self.jobs = Roster(slots, liveness), JobBook()
        self.seats: dict[str, MemberSlot] = {}
        self._slots: list[MemberSlot | None] = [None] * slots  # who is ready
        self._orders: dict[int, JobRequest] = {}  # by serial
        self.events: list[ComputeEvent] = [
            Gone(slot, "nobody has joined yet") for slot in range(slots)
        ]
        self.cuts: list[tuple[bytes, str]] = []  # addresses to be cut off, and why
        self.notes: list[Note] = []  # for the log
        self.counts: Counter[str] = Counter()
        self._opinions: dict[int, str] = {}  # serial -> whose result is to be checked
        self._newest = 0  # step of the newest order
        self.dim: int | None = None  # of the model of loops, where workers are such
        self.shapes = ""  # of its parameters; see ``runtime.base.shapes``
        self._rates_s = 0.0  # when rates were measured
        self._told_s, self._told = -math.inf, say.Status("")  # status
        self.bytes_in = self.bytes_out = 0  # of whole messages
        self._spent_s, self._staleness = 0.0, 0  # of all results

    # -- What the run asks for -------------------------------------------------------------------

    def submit(self, order: JobRequest, now_s: float) -> None:
        """See ``ComputeBackend``; an order for a worker that is not here is forgotten."""
        seat = self._slots[order.worker]
        if seat is None:
            return
        self._newest = max(self._newest, order.step)
        self._orders[order.serial] = order
        self._opinions.pop(order.serial, None)  # it is computed from the beginning
        self._give(seat, order, now_s)

    def _give(self, seat: MemberSlot, order: JobRequest, now_s: float) -> None:
        job = self.jobs.assign(order.serial, seat.member)
        arrays: dict[str, NDArray] = {}
        if order.kept:
            arrays = {say.KEPT + name: row for name, row in order.kept.items()}
        if seat.last is not order.x:
            arrays["x"], seat.last = order.x, order.x
            seat.nbytes += order.x.nbytes
        body = say.JobMessage(job, order.shard, order.draw, order.steps, order.step)
        self._tell(seat, "work", body, now_s, arrays)

    def cancel(self, serial: int, now_s: float) -> None:
        self._orders.pop(serial, None)
        self._opinions.pop(serial, None)
        if (taken := self.jobs.cancel(serial)) is None:
            return
        job, member = taken
        seat = self.seats[member.node]
        self._tell(seat, "cancel", say.Cancel(job), now_s)

    def over(self, why: str, done: bool, now_s: float) -> None:
        """Tell every member that there is nothing more to do."""
        for seat in list(self.seats.values()):  # one that takes nothing is let go
            self._tell(seat, "over", say.Over(why, done), now_s)

    def pending(self) -> int:
        """Messages that members have not acknowledged."""
        return sum(seat.link.pending for seat in self.seats.values())

    def status(self, now_s: float) -> dict[str, Any]:
        """How the run is."""
        seats = sorted(self.seats.values(), key=lambda seat: seat.member.slot)
        rows = [s.row(suspected=self.roster.suspects(s.member, now_s)) for s in seats[:MOST_SHOWN]]
        results, links = self.jobs.counts["accepted"], [seat.link for seat in seats]
        totals = {"resends": sum(link.resends for link in links)}
        totals |= {"duplicates": sum(link.duplicates for link in links)}
        return totals | {
            **{"run": self.run, "incarnation": self.incarnation, "slots": self.roster.slots},
            **{"jobs": results, "out": len(self.jobs.outstanding), "step": self._newest},
            **{"spent_s": [self._spent_s, results], "staleness": [self._staleness, results]},
            **{"bytes_in": self.bytes_in, "bytes_out": self.bytes_out},
            **{"workers": rows, "counts": dict(self.counts)},
        }

    # -- What comes in ---------------------------------------------------------------------------

    def receive(
        self, address: bytes, node: str | None, frames: Sequence[wire.Buffer], now_s: float
    ) -> int:
        """A message from ``address``; ``node`` is who it is from, where a key says so.

        What is wrong with it is counted under the error's name, and costs who sent it, nobody else.
        Answers how much it speaks against its connection: 0 where it was of use.
        """
        try:
            message = self._reader.read(frames)
            self._take(address, node, message, now_s)
        except PeerError as error:
            self._offence(address, node, error, now_s)
            return 1 if isinstance(error, (*HARMLESS, errors.WrongRun)) else GRAVE
        return 0

    def _take(self, address: bytes, node: str | None, message: wire.Received, now_s: float) -> None:
        head = message.head
        if node == "":
            raise errors.WrongNode(f"the key of who says that it is {head.node} is not in the list")
        if node is not None and head.node != node:
            if head.kind == "hello":  # a mistake, more likely than a lie
                self._misnamed(address, node, head, message.body)
                return
            raise errors.WrongNode(f"{node} says that it is {head.node}")
        if head.kind == "hello":
            self._hello(address, head, message.body, now_s)
            return
        if head.kind == "ask":
            if why := self.roster.quarantined.get(node or ""):
                raise errors.WrongNode(why)
            if now_s >= self._told_s:  # who asks all the time takes nobody else's
                self._told_s = now_s + self.liveness.tick_s
                self._told = say.Status(json.dumps(self.status(now_s)))
            self._post(address, "status", self._told, 0)
            return
        if head.run != self.run:
            raise errors.BadHeader(f"a {head.kind} of a stranger")
        if head.to != self.incarnation:
            self._again(address, head)
            raise errors.OldIncarnation(f"{head.node} speaks to server incarnation {head.to}")
        try:
            member = self.roster.find(head.node, head.incarnation)
        except errors.OldIncarnation:
            self._again(address, head)
            raise
        self.roster.heard(member, now_s)
        seat = self.seats[head.node]
        if head.kind == "pulse" and head.sequence == 0:
            if head.acknowledged:  # of the connection that messages come over
                seat.at(address, now_s)
                seat.link.acknowledge(head.acknowledged, now_s)
                self._flush(seat, now_s)
            return
        seat.at(address, now_s)
        seat.link.acknowledge(head.acknowledged, now_s)
        if head.sequence == 0:
            raise errors.BadHeader(f"a {head.kind} outside of the order")
        for passed in seat.link.receive(head.sequence, message, now_s):
            self._pass_on(seat, passed, now_s)
            if self.seats.get(head.node) is not seat:  # it is gone
                return
        if seat.link.urgent:
            self._flush(seat, now_s)

    def _pass_on(self, seat: MemberSlot, message: wire.Received, now_s: float) -> None:
        """A message in its order; an error in one does not keep the next from being heard."""
        try:
            whole = seat.assembly.take(message)
        except PeerError as error:  # where its next message begins, nobody knows
            self._shut_out(seat, f"{seat.member.node} is shut out: {error.name}: {error}")
            self.counts[error.name] += 1
            return
        if whole is None:
            return
        try:
            self._hear(seat, whole, now_s)
        except PeerError as error:
            self._offence(seat.address, seat.member.node, error, now_s)

    def _hello(self, address: bytes, head: wire.Header, hello: say.Hello, now_s: float) -> None:
        if hello.package != self._package:
            why = f"it runs offbeat {hello.package}, the server {self._package}"
            self._refuse(head.node, why)
            self._post(address, "refusal", say.Refusal(hello.nonce, why, -1.0), 0)
            return
        try:
            member = self.roster.hello(head.node, hello.nonce, now_s)
        except NotNow as refusal:
            retry_s = -1.0 if refusal.retry_s is None else refusal.retry_s
            if retry_s < 0:
                self._refuse(head.node, refusal.why)
            answer = say.Refusal(hello.nonce, refusal.why, retry_s, refusal.replaced)
            self._post(address, "refusal", answer, 0)
            return
        if head.node not in self.seats:
            link: ReliableChannel = ReliableChannel(
                resend_s=self._resend_s, ack_s=self.liveness.tick_s
            )
            seat = self.seats[head.node] = MemberSlot(
                member, address, link, wire.Assembly(self._kinds, self._pool)
            )
            seat.where = hello.where
            self.counts["joined"] += 1
        self.seats[head.node].at(address, now_s)
        welcome = say.Welcome(
            hello.nonce,
            member.incarnation,
            member.slot,
            self.liveness.suspect_after_s,
            self._experiment,
            self._manifest,
        )
        self._post(address, "welcome", welcome, 0)

    def _misnamed(self, address: bytes, node: str, head: wire.Header, hello: say.Hello) -> None:
        why = f"its key is listed as {node}, and it says that it is {head.node}; give it one name"
        self.counts[errors.WrongNode.name] += 1
        self._refuse(node, why)
        self._post(address, "refusal", say.Refusal(hello.nonce, why, -1.0), 0)

    def _refuse(self, node: str, why: str) -> None:
        self.notes.append(
            Note("refused", f"{node} was refused: {why}", {"member": node, "why": why})
        )

    def _again(self, address: bytes, head: wire.Header) -> None:
        """Tell who speaks that it is not known: after a restart, a partition, a long sleep."""
        if self.roster.replaced(head.node, head.incarnation) and head.to == self.incarnation:
            why = f"another process joined as {head.node}"
            self._post(address, "refusal", say.Refusal(0, why, -1.0, True), head.incarnation)
        else:
            self._post(address, "again", say.Again(head.to), head.incarnation)

    def _hear(self, seat: MemberSlot, message: wire.Received, now_s: float) -> None:
        """A message in its order, whole."""
        kind, body, member = message.head.kind, message.body, seat.member
        if kind == "result":
            self._result(seat, message, now_s)
        elif kind == "ready":
            if why := self._unlike(body):
                refusal = say.Refusal(member.nonce, why, -1.0)
                self._post(seat.address, "refusal", refusal, member.incarnation)
                self._lose(member, why)
            elif not member.ready:
                member.ready = True
                self._slots[member.slot] = seat
                self.events.append(Back(member.slot))
                fields = {"member": member.node, "worker": member.slot, "where": seat.where}
                text = f"{member.node} ({seat.where}) is worker {member.slot}"
                self.notes.append(Note("joined", text, fields))
        elif kind == "failure":
            serial = self.jobs.accept(member, body.job)
            self._orders.pop(serial, None)
            self.counts["failures"] += 1
            fields = {"member": member.node, "job": body.job, "why": body.why}
            self.notes.append(Note("raised", f"{member.node}, job {body.job}: {body.why}", fields))
            self.events.append(Failed(serial, body.why))
        elif kind == "leave":
            link = seat.link
            self._post(seat.address, "pulse", say.Pulse(), member.incarnation, link.acknowledged)
            self._lose(member, body.why, "left")
        elif kind != "pulse":
            raise errors.BadHeader(f"a worker does not say {kind}")

    def _unlike(self, ready: say.Ready) -> str:
        if ready.manifest != self._manifest:
            return f"its task has {ready.manifest}, the server's {self._manifest}"
        if self.dim is None:
            return "it says how a loop's model is made; here is none" if ready.shapes else ""
        if why := shapes.unlike(ready.shapes, self.shapes, self.dim):
            return why
        self.shapes = ready.shapes  # the first loop says what a model is
        return ""

    def _result(self, seat: MemberSlot, message: wire.Received, now_s: float) -> None:
        body, member = message.body, seat.member
        serial = self.jobs.accept(member, body.job)
        kept: Any = {}
        for one in message.head.arrays:
            seat.nbytes += one.nbytes
            if one.name == "payload":
                nbytes = one.nbytes
            else:
                kept[one.name[len(say.KEPT) :]] = message.arrays[one.name]
        payload: Any = message.arrays["payload"]
        sound = (body.loss is None or math.isfinite(body.loss)) and finite(payload)
        loss = body.loss if sound else np.nan
        answer = JobResult(serial, loss, payload, kept, body.spent_s, nbytes)
        order = self._orders.pop(serial)
        seat.jobs += 1
        seat.loss = np.nan if body.loss is None else body.loss
        seat.staleness = self._newest - order.step
        self._staleness += seat.staleness
        self._spent_s += body.spent_s
        if sound:
            member.strikes = 0
            self._settle(serial, now_s)
            self.events.append(answer)
            return
        self.counts["not_finite"] += 1
        self._doubt(seat, order, answer, now_s)

    # -- Results that are not finite -------------------------------------------------------------

    def _doubt(self, seat: MemberSlot, order: JobRequest, answer: JobResult, now_s: float) -> None:
        """Have another member compute what is not finite: its machine, or the run, is at fault."""
        if answer.serial in self._opinions:  # two members agree
            del self._opinions[answer.serial]
            self.events.append(answer)
            return
        others = [
            s
            for s in self._slots
            if s is not None and s is not seat and not self.roster.suspects(s.member, now_s)
        ]
        if self._keeping or not others:  # nobody else could
            self.events.append(answer)
            return
        self._opinions[answer.serial] = seat.member.node
        self._orders[answer.serial] = order
        other = min(others, key=lambda s: (len(s.member.jobs), s.member.slot))
        self._give(other, order, now_s)

    def _settle(self, serial: int, now_s: float) -> None:
        """A finite result where another member's was not: that is its fault."""
        doubted = self._opinions.pop(serial, None)
        seat = self.seats.get(doubted) if doubted else None
        if seat is None:
            return
        member = seat.member
        member.strikes += 1
        if member.strikes >= MOST_STRIKES:
            why = f"{member.node} is shut out: {MOST_STRIKES} results in a row were not finite"
            self._shut_out(seat, why)

    # -- Members that go -------------------------------------------------------------------------

    def _offence(self, address: bytes, node: str | None, error: PeerError, now_s: float) -> None:
        """Count what is wrong; who keeps doing it, or was never let in, is cut off."""
        self.counts[error.name] += 1
        seat = self._at(address, node)
        if isinstance(error, HARMLESS):
            if seat is not None:
                self._flush(seat, now_s)
            return
        text = f"{node or 'a peer'}: {error.name}: {error}"
        fields = {"member": node or None, "reason": error.name, "why": str(error)}
        self.notes.append(Note("rejected", text, fields))
        if isinstance(error, errors.WrongRun):
            self._post(address, "again", say.Again(), 0)
        elif isinstance(error, errors.WrongVersion):
            self._post(address, "refusal", say.Refusal(0, str(error), -1.0), 0)
        elif seat is None:
            self.cuts.append((address, error.name))
        if seat is None:
            return
        seat.member.offences += 1
        self._flush(seat, now_s)
        if seat.member.offences >= MOST_OFFENCES or isinstance(error, errors.WrongNode):
            why = f"{seat.member.node} is shut out: {seat.member.offences} wrong messages ({error})"
            self._shut_out(seat, why)

    def _at(self, address: bytes, node: str | None) -> MemberSlot | None:
        if node is not None:
            return self.seats.get(node)
        return next((seat for seat in self.seats.values() if seat.address == address), None)

    def _shut_out(self, seat: MemberSlot, why: str) -> None:
        self.roster.quarantine(seat.member, why)
        self._dismiss(seat, why)

    def _dismiss(self, seat: MemberSlot, why: str) -> None:
        refusal = say.Refusal(seat.member.nonce, why, -1.0)
        self._post(seat.address, "refusal", refusal, seat.member.incarnation)
        self.cuts.append((seat.address, why))
        self._lose(seat.member, why)

    def revoke(self, node: str) -> None:
        """The key of ``node`` is not listed any more: until one is, it is nobody."""
        if (seat := self.seats.get(node)) is not None:
            self._dismiss(seat, f"the key of {node} is not in the run's list any more")

    def _lose(self, member: Member, why: str, event: str = "gone") -> None:
        """``member`` is not here any more: its jobs are the run's again."""
        self.roster.drop(member)
        del self.seats[member.node]
        serials = self.jobs.release(member)
        self.counts["jobs_released"] += len(serials)
        self.counts["gone"] += 1
        mine = self._slots[member.slot]
        was_ready = mine is not None and mine.member is member
        for serial in serials:
            del self._orders[serial]
            if (doubted := self._opinions.pop(serial, None)) is not None:
                said = f"it was not finite at {doubted}, and {member.node}, asked then, is gone"
                self.events.append(Failed(serial, said))  # whose it was computes it again
        if was_ready:
            self._slots[member.slot] = None
            self.events.append(Gone(member.slot, why))
            text = f"{member.node} (worker {member.slot}) is gone: {why}"
            fields = {"member": member.node, "worker": member.slot, "jobs": len(serials)}
            self.notes.append(Note(event, text, {**fields, "why": why}))

    # -- Time ------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let time pass: send again what was not acknowledged, declare dead who is silent."""
        for member in self.roster.silent(now_s):
            why = f"it was silent for {now_s - member.heard_s:.1f} s"
            self._lose(member, why)
        for seat in self.seats.values():
            self._flush(seat, now_s)
        if now_s >= self._rates_s:
            self._rates_s = now_s + 1.0
            for seat in self.seats.values():
                seat.measure(now_s)

    def _tell(
        self,
        seat: MemberSlot,
        kind: str,
        body: Struct,
        now_s: float,
        arrays: Mapping[str, NDArray] | None = None,
    ) -> None:
        """Send something in its order; a member that takes nothing is let go."""
        try:
            for parcel in wire.parcels(kind, body, arrays):
                seat.link.send(parcel)
        except Full as error:
            self._lose(seat.member, f"it does not take what it is sent: {error}")
            return
        self._flush(seat, now_s)

    def _flush(self, seat: MemberSlot, now_s: float) -> None:
        member, link = seat.member, seat.link
        for sequence, parcel in link.out(now_s):
            frames = self._packed(parcel, member.incarnation, link.acknowledged, sequence)
            self.outbox.append((seat.address, frames))
        if link.owes(now_s):
            self._post(seat.address, "pulse", say.Pulse(), member.incarnation, link.acknowledged)
