"""A worker's side of the protocol: messages and time in, messages and orders out.

It knows no socket; see ``runtime.protocol.server``.  It says hello until it is welcomed, and again
whenever the server does not know it (any more): after a restart of either, a partition, a long
sleep.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from numpy.typing import NDArray

from offbeat.runtime.base.errors import (
    BadArray,
    ConfigError,
    Fenced,
    OffbeatError,
    PeerError,
    Refused,
)
from offbeat.runtime.compute.backend import JobRequest, JobResult
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol.channel import ReliableChannel
from offbeat.runtime.protocol.roster import MOST_OFFENCES
from offbeat.runtime.protocol.wire import (
    Assembly,
    Buffer,
    Kind,
    Pool,
    Reader,
    Received,
    pack,
    parcels,
)

RETRY_MOST_S = 5.0  # between two greetings


class WorkerProtocol:
    """One worker process.

    Args:
        node: its name; its key's, where there are keys.
        nonce: a random number of this process.
        package: the version of this package.
        where: the process runs.
        now_s: the time.
        resend_s: see ``ReliableChannel``; short where messages get lost without a ``lost``.
    """

    def __init__(
        self,
        node: str,
        nonce: int,
        package: str,
        where: str,
        now_s: float,
        resend_s: float | None = None,
    ) -> None:
        self._resend_s = resend_s
        self.node, self.nonce, self._hello = node, nonce, say.Hello(nonce, package, where)
        self.run = ""
        self.incarnation = self.server = 0  # its own, as the server gave it, and the server's
        self.liveness = Liveness()
        self.state = "calling"  # then "building", "working", and "over" or, with a fate, "ended"
        self.welcome: say.Welcome | None = None  # to be built and answered with ``ready``
        self.orders: deque[JobRequest] = deque()  # to be computed, oldest first; serial is the job
        self._taken: list[JobRequest] = []  # being computed
        self.fate: OffbeatError | None = None
        self.why = ""  # it is over
        self.outbox: list[list[Any]] = []
        self.pulse: list[Any] | None = None  # frames that say that it is alive; for any thread
        self.counts: Counter[str] = Counter()
        self._offences = 0  # messages of the server that could not be read
        self.last_said = ""  # why it waits
        self._kinds: Mapping[str, Kind] = say.GREETING
        self._reader = Reader("", self._kinds)
        self._link: ReliableChannel = ReliableChannel(resend_s=1.0)
        self.pool = Pool()  # for models
        self._assembly = Assembly(self._kinds, self.pool)
        self._model: NDArray | None = None
        self._hello_s, self._retry_s = now_s, self.liveness.heartbeat_s
        self._pulse_s = now_s

    # -- What comes in ---------------------------------------------------------------------------

    def receive(self, frames: Sequence[Buffer], now_s: float) -> None:
        """A message from the server's address."""
        try:
            self._take(self._reader.read(frames), now_s)
        except PeerError as error:
            self.counts[error.name] += 1
            self._offences += 1
            if self._offences >= MOST_OFFENCES:
                self._end(PeerError(f"the server's messages cannot be read: {error}"))

    def _take(self, message: Received, now_s: float) -> None:
        head, body = message.head, message.body
        replaced = head.run == self.run and head.incarnation < self.server
        if replaced or head.to not in (0, self.incarnation):
            return  # of a server that was replaced, or to a process that was this one
        if head.kind == "welcome":
            if body.nonce == self.nonce:
                self._welcomed(message, now_s)
        elif head.kind == "refusal":
            if body.nonce == self.nonce or (body.replaced and head.to == self.incarnation):
                self._refused(body, now_s)
        elif head.kind == "again" or head.incarnation != self.server:
            late = head.kind == "again" and body.server not in (0, self.server)
            if self.state in ("building", "working") and not late:
                self._call(now_s)
        elif self.state in ("building", "working"):
            self._link.acknowledge(head.acknowledged, now_s)
            if head.sequence:
                for passed in self._link.receive(head.sequence, message, now_s):
                    if (whole := self._assembly.take(passed)) is not None:
                        self._hear(whole)
            if self._link.urgent:
                self._flush(now_s)

    def _welcomed(self, message: Received, now_s: float) -> None:
        head, body = message.head, message.body
        if head.run == self.run:
            if (head.incarnation, body.incarnation) <= (self.server, self.incarnation):
                return  # another answer to the same greeting, or to an older one
        elif self.state != "calling":
            return  # of a run that this one did not ask
        self.run, self.server, self.incarnation = head.run, head.incarnation, body.incarnation
        self.liveness = Liveness(body.suspect_after_s)
        self._reader = Reader(self.run, self._kinds)
        self._reset()
        self._retry_s = self.liveness.heartbeat_s
        self.welcome, self.state = body, "building"
        self.pulse = self._unordered("pulse", say.Pulse(), 0)
        self._pulsate()

    def _reset(self) -> None:
        resend_s = self._resend_s or self.liveness.resend_s
        self._link = ReliableChannel(resend_s=resend_s, ack_s=self.liveness.tick_s)
        self._assembly = Assembly(self._kinds, self.pool)
        self._model = None
        self._forget()

    def lost(self, now_s: float) -> None:
        """The connection is a new one: what was on its way may be lost."""
        if self.state in ("building", "working"):
            self._link.lost(now_s)
            self._flush(now_s)

    def _refused(self, refusal: say.Refusal, now_s: float) -> None:
        self.last_said = refusal.why
        if refusal.replaced:
            self._end(Fenced(f"{refusal.why}; this one ends"))
        elif refusal.retry_s < 0:
            self._end(Refused(f"the server refuses this worker: {refusal.why}"))
        else:
            self.state, self.pulse = "calling", None
            self._hello_s = now_s + refusal.retry_s

    def _forget(self) -> None:
        """What was to be computed does not count any more."""
        self.orders.clear()
        self._taken.clear()

    def _end(self, fate: OffbeatError) -> None:
        self.state, self.fate, self.pulse = "ended", fate, None
        self._forget()

    def _call(self, now_s: float) -> None:
        """Say hello again: what was being done does not count any more."""
        self.state, self.pulse, self.welcome = "calling", None, None
        self._forget()
        self.counts["rejoins"] += 1
        self._hello_s = now_s

    def _hear(self, message: Received) -> None:
        kind, body = message.head.kind, message.body
        if kind == "work":
            x = message.arrays.pop("x", None)
            if x is None and (x := self._model) is None:
                raise BadArray("the first work has no model")
            self._model = x
            kept: Any = None
            if message.arrays:
                kept = {name[len(say.KEPT) :]: row for name, row in message.arrays.items()}
            self.orders.append(
                JobRequest(body.job, 0, body.shard, body.draw, body.steps, body.step, x, kept)
            )
        elif kind == "cancel":
            for order in self.orders:
                if order.serial == body.job:
                    self.orders.remove(order)
                    break
        elif kind == "over":
            self.why = body.why
            self.state, self.pulse = "over" if body.done else "calling", None
            self._forget()

    # -- What the worker does --------------------------------------------------------------------

    def ready(self, kinds: Mapping[str, Kind], now_s: float, shapes: str = "") -> None:
        """The task of ``welcome`` is built, and its messages look like ``kinds``.

        ``shapes`` are those of a loop's model; see ``runtime.base.shapes``.

        Raises:
            ConfigError: they do not look as the server says.
        """
        assert self.welcome is not None
        mine, theirs = say.manifest(kinds), self.welcome.manifest
        self._kinds = kinds
        self._reader = Reader(self.run, kinds)
        self._assembly = Assembly(kinds, self.pool)
        self.welcome, self.state = None, "working"
        self._say("ready", say.Ready(mine, shapes), None, now_s)
        if mine != theirs:
            raise ConfigError(
                f"this worker's task differs from the server's: {mine} here, {theirs} there; "
                "give both the same data and the same version of offbeat"
            )

    def take(self) -> JobRequest | None:
        """The next order to compute, if there is one."""
        if not self.orders:
            return None
        self._taken.append(self.orders.popleft())
        return self._taken[-1]

    def wants(self, order: JobRequest) -> bool:
        """Whether the answer to ``order`` would still count."""
        return any(taken is order for taken in self._taken)

    def _done(self, order: JobRequest) -> bool:
        """Whether ``order`` still counts: jobs of another incarnation have the same numbers."""
        for place, taken in enumerate(self._taken):
            if taken is order:
                del self._taken[place]
                return True
        self.counts["in_vain"] += 1
        return False

    def answer(self, order: JobRequest, answer: JobResult, now_s: float) -> None:
        """Send what came of ``order``."""
        if not self._done(order):
            return
        arrays: dict[str, Any] = {"payload": answer.payload}
        for name, row in answer.kept.items():
            arrays[say.KEPT + name] = row
        body = say.ResultMessage(answer.serial, answer.loss, answer.spent_s)
        self._say("result", body, arrays, now_s)

    def failed(self, order: JobRequest, why: str, now_s: float) -> None:
        """The code of the task raised in ``order``."""
        if self._done(order):
            failure = say.Failure(order.serial, why[-say.MOST_TEXT // 8 :])
            self._say("failure", failure, None, now_s)

    def leave(self, why: str, now_s: float) -> None:
        """Hand back what is not computed, and go."""
        self._forget()
        if self.state in ("building", "working"):
            self._say("leave", say.Leave(why), None, now_s)

    @property
    def pending(self) -> int:
        """Messages that the server has not acknowledged."""
        return self._link.pending if self.state in ("building", "working") else 0

    @property
    def clogged(self) -> bool:
        """Whether something waits until the server has acknowledged what was sent before."""
        return self._link.queued > 0 and self.state in ("building", "working")

    # -- Time and what goes out ------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let time pass: greet, send again, say that it is alive."""
        if self.state == "calling" and now_s >= self._hello_s:
            self.outbox.append(self._unordered("hello", self._hello, 0))
            self._hello_s = now_s + self._retry_s
            self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
        elif self.state in ("building", "working"):
            self._flush(now_s)
            if now_s >= self._pulse_s:
                self._pulse_s = now_s + self.liveness.heartbeat_s
                self._pulsate()

    def due_s(self) -> float:
        """When ``tick`` has something to do, if nothing comes before."""
        if self.state == "calling":
            return self._hello_s
        return min(self._pulse_s, self._link.due_s())

    def _pulsate(self) -> None:
        """Say that it is alive, and where: what acknowledges nothing could be of any connection."""
        if not self._link.acknowledged and not self._link.pending:
            self._link.send(parcels("pulse", say.Pulse())[0])
        self.outbox.append(self._unordered("pulse", say.Pulse(), self._link.acknowledged))

    def _say(
        self, kind: str, body: Struct, arrays: Mapping[str, NDArray] | None, now_s: float
    ) -> None:
        for parcel in parcels(kind, body, arrays):
            self._link.send(parcel)
        self._flush(now_s)

    def _flush(self, now_s: float) -> None:
        link = self._link
        for sequence, parcel in link.out(now_s):
            self.outbox.append(
                pack(
                    parcel,
                    run=self.run,
                    node=self.node,
                    incarnation=self.incarnation,
                    to=self.server,
                    sequence=sequence,
                    acknowledged=link.acknowledged,
                )
            )
        if link.owes(now_s):
            self._pulsate()

    def _unordered(self, kind: str, body: Struct, acknowledged: int) -> list[Any]:
        (parcel,) = parcels(kind, body)
        greeting = kind == "hello"
        return pack(
            parcel,
            run=self.run,
            node=self.node,
            incarnation=0 if greeting else self.incarnation,
            to=0 if greeting else self.server,
            acknowledged=acknowledged,
        )
