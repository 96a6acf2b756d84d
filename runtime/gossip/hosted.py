"""Gossip nodes of one process: what comes in is queued, and one thread does all the rest.

The thread takes the mail, computes, keeps the nodes' emulated times by holding back what is done
too soon (it goes on with other things meanwhile), and notes what there is to report.  While it
sleeps, a thread that brings mail may do its work: one thread at a time does, under ``_turns``.
"""

import heapq
import itertools
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from offbeat.runtime.base.errors import OffbeatError, PeerError
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.node.channels import Item
from offbeat.runtime.node.effects import Compute, Effect, Send
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.network import Uplink
from offbeat.runtime.node.node import GossipNode

AGAIN_S = 5.0  # real seconds without a new round after which messages are repeated
MOST_MAIL = 256  # parcels handled before the thread computes again
MOST_WAIT_S = 1.0  # of the thread for mail
# Of a thread that brings mail, before it leaves the rest to the own one: what is told the nodes
# meanwhile, and brought, waits behind it.
MOST_TURNS, MOST_TURNS_S = 4, 0.005

Input = list[Any]
"""What a node was given, for a replay: a name and what came with it."""


class Envelope(NamedTuple):
    """A message on its way; ``serial`` numbers what ``frm`` sent to ``to``."""

    to: int
    frm: int
    incarnation: int
    serial: int
    kind: str
    number: int
    items: tuple[Item, ...]
    again: bool = False  # of no use while what was sent before is still on its way


class NodeReport:
    """What happened since the last report; ``rounds`` and ``counts`` are totals."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []  # of the trace
        self.models: list[tuple[int, int, float, NDArray]] = []  # round, node, time, [d]
        self.losses: list[float] = []  # of loops, that nobody else can say
        self.inputs: dict[int, list[Input]] = {}
        self.answers: dict[int, Any] = {}  # to what was asked
        self.rounds: dict[int, int] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.now_s = 0.0
        self.limits = 0  # that were set since the process began
        self.rests = False  # whether all nodes do, at the last of them
        self.reached = 0  # rounds that any has begun
        self.error: tuple[type[OffbeatError] | None, str] | None = None


class NodeLoop:
    """Some nodes of an experiment.

    Args:
        experiment: of which they are.
        nodes: their numbers.
        carry: called with parcels for nodes elsewhere.
        incarnation, joining: see ``GossipNode``.
        states: what ``state`` answered for each, to go on from; None: the run begins.
        refuse: called with who sent what no node sends, and why; None: that ends the run.
        elsewhere: called with a node and its job, where they are not computed here; what comes of
            it goes to ``computed`` or ``failed``.
    """

    def __init__(
        self,
        experiment: Experiment,
        nodes: Sequence[int],
        carry: Callable[[list[Envelope]], None],
        *,
        incarnation: int = 0,
        joining: bool = False,
        states: Mapping[int, dict[str, Any]] | None = None,
        refuse: Callable[[int, PeerError], None] | None = None,
        elsewhere: Callable[[int, Compute], None] | None = None,
    ) -> None:
        self._carry, self._states, self._refuse = carry, states, refuse
        self._elsewhere = elsewhere
        self._given_s: dict[int, float] = {}  # node whose job is elsewhere -> since when
        self._incarnation, self._joining = incarnation, joining
        self.nodes: dict[int, GossipNode] = {
            i: gossip_node(experiment, i, incarnation=incarnation, joining=joining) for i in nodes
        }
        fleet = experiment.fleet
        self._clock = fleet.timing(experiment.seed, 0).clock
        self._measured, self._pace = fleet.law().measured, experiment.pace
        self._steps = experiment.work.steps
        self._every = experiment.evaluate.steps if not experiment.asynchronous else None
        self._tracing = experiment.record.trace
        self._reports = hasattr(experiment.task, "report")
        self._queue: deque[tuple[Any, ...]] = deque()  # handled in order, under ``_turns``
        self._rings = threading.Event()  # there is something in it for the thread
        self._out: list[Envelope] = []
        self._here: deque[Envelope] = deque()  # parcels between nodes of this process
        self._timers: list[tuple[float, int, tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._jobs: deque[tuple[int, Compute, float]] = deque()  # with when they were given
        self._uplinks = {i: Uplink(fleet, experiment.seed, i) for i in nodes}
        self._moved_s = dict.fromkeys(nodes, math.inf)  # when it last did a round, really
        self._report, self._lock = NodeReport(), threading.Condition()
        self._urgent, self._begun, self._ended = False, False, False
        self._rests = False
        self._turns = threading.Lock()
        self._until_s = -math.inf  # until when the thread sleeps, if it does
        self._limits = 0  # that were set
        self._zero_s = 0.0  # of the monotonic clock, when the run began
        self._thread = threading.Thread(target=self._work, daemon=True)

    # -- From other threads --------------------------------------------------------------------

    def begin(self, now_s: float, limit: float) -> None:
        """The run is at ``now_s`` seconds; nodes may begin rounds below ``limit``."""
        self._zero_s = time.monotonic() - now_s * self._pace
        for node in self.nodes.values():
            node.limit = limit
        self._thread.start()

    def _put(self, *event: Any) -> None:
        self._queue.append(event)
        self._rings.set()

    def deliver(self, parcels: Sequence[Envelope]) -> None:
        """Messages for nodes here have come."""
        self._put("mail", parcels)

    def bring(self, parcels: Sequence[Envelope]) -> None:
        """The same, from a thread with time to spare: it does what comes of them, if nobody else.

        To wake a thread for every message costs more than the message.
        """
        free = self._begun and not self._ended and self._turns.acquire(blocking=False)
        if not free:
            self.deliver(parcels)
            return
        self._queue.append(("mail", parcels))
        try:
            self._safely(self._some)
        finally:
            self._turns.release()

    def tell(self, what: str, *args: Any) -> None:
        """Have every node do ``what``: "down" or "up" with a node, "extend" with a limit."""
        self._put("tell", what, args)

    def ask(self, question: int, what: str) -> None:
        """Have the next report answer by ``question``: "state" or "model" of every node."""
        self._put("ask", question, what)

    def computed(self, i: int, number: int, losses: list[float], gradient: Any) -> None:
        """What came of node ``i``'s job, which was computed elsewhere."""
        self._put("came", i, number, losses, gradient)

    def failed(self, error: Exception) -> None:
        """What was to be computed elsewhere cannot be: that ends the run."""
        self._put("fail", error)

    def report(self, wait_s: float) -> NodeReport:
        """What happened, waiting so long unless there is something that cannot wait."""
        with self._lock:
            self._lock.wait_for(lambda: self._urgent, timeout=wait_s)
            told, self._report, self._urgent = self._report, NodeReport(), False
            told.rests, told.now_s, told.limits = self._rests, self.now_s(), self._limits
            told.reached = max(node.reached for node in self.nodes.values())
            for i, node in self.nodes.items():
                told.counts[i] = dict(node.counts)
                if not node.joining:
                    told.rounds[i] = node.round
            return told

    def end(self, most_s: float | None = None) -> None:
        """Stop, waiting so long at most for the job at hand."""
        self._put("end")
        if self._thread.is_alive():
            self._thread.join(most_s)

    # -- The thread ----------------------------------------------------------------------------

    def now_s(self) -> float:
        """Seconds of the run."""
        return (time.monotonic() - self._zero_s) / self._pace

    def _work(self) -> None:
        with self._turns:
            self._safely(self._all)

    def _all(self) -> None:
        with self._lock:
            self._begin()  # before any mail that is there already
        while not self._ended:
            self._turn()
            if self._idle and not self._ended:
                self._rest()

    def _some(self) -> None:
        """See ``bring``: by another thread, while the own one sleeps."""
        end_s = time.monotonic() + MOST_TURNS_S
        for _ in range(MOST_TURNS):
            self._turn()
            if self._idle:
                self._settle()
                break
            if time.monotonic() > end_s:
                break
        if not self._idle or self._ended or self._next_s() < self._until_s:
            self._rings.set()

    def _safely(self, work: Callable[..., None], *given: Any) -> None:
        """What goes wrong ends the run, and is reported."""
        try:
            work(*given)
        except Exception as error:
            kind = type(error) if isinstance(error, OffbeatError) else None
            with self._lock:
                said = str(error) if kind else traceback.format_exc()
                self._report.error, self._urgent, self._ended = (kind, said), True, True
                self._lock.notify_all()

    def _turn(self) -> None:
        """Take the mail, do what is due, compute one gradient."""
        now_s = self.now_s()
        while self._timers and self._timers[0][0] <= now_s:
            self._handle(heapq.heappop(self._timers)[2])
        for _ in range(MOST_MAIL):
            if self._here:
                self._handle(("mail", [self._here.popleft()]))
                continue
            if not self._queue:
                break
            self._handle(self._queue.popleft())
        self._flush()
        if self._jobs and not self._ended:
            self._compute(*self._jobs.popleft())

    @property
    def _idle(self) -> bool:
        """Whether there is nothing to do now."""
        return not (self._jobs or self._here or self._out or self._queue)

    def _next_s(self) -> float:
        return self._timers[0][0] if self._timers else math.inf

    def _settle(self) -> None:
        """Note whether all nodes rest."""
        if not self._rests and all(node.quiet for node in self.nodes.values()):
            with self._lock:
                self._rests = self._urgent = True
                self._lock.notify_all()

    def _rest(self) -> None:
        """Sleep until there is something to do; others may handle mail meanwhile."""
        self._settle()
        now_s = self.now_s()
        self._until_s = min(self._next_s(), now_s + MOST_WAIT_S / self._pace)
        wait_s = max(0.0, (self._until_s - now_s) * self._pace)
        self._turns.release()
        rang = self._rings.wait(wait_s)
        self._turns.acquire()
        self._rings.clear()
        self._until_s = -math.inf
        if not (rang or self._queue):
            self._repeat()

    def _repeat(self) -> None:
        """Nodes that stand still repeat what may not have arrived; others may wait for it."""
        now_s = time.monotonic()
        with self._lock:
            for i, node in self.nodes.items():
                if now_s - self._moved_s[i] > AGAIN_S and i not in self._given_s:
                    self._moved_s[i] = now_s
                    if effects := node.again():
                        self._note(i, "again")
                        self._do(i, effects, again=True)

    def _handle(self, event: tuple[Any, ...]) -> None:
        if self._ended:
            return
        kind, *what = event
        self._rests = False
        handlers: dict[str, Callable[..., None]] = {
            "mail": self._mail,
            "post": self._post_now,
            "done": self._done,
            "tell": self._tell,
            "ask": self._answer,
            "end": self._end,
            "came": self._came,
            "fail": self._fail,
        }
        with self._lock:  # a report is of a moment between two events
            handlers[kind](*what)

    def _begin(self) -> None:
        for i, node in self.nodes.items():
            self._moved_s[i] = time.monotonic()
            if self._states is None:
                self._note(i, "start", self._incarnation, self._joining, node.limit)
                self._do(i, node.start())
            else:
                state = self._states[i]
                self._uplinks[i].restore({**state["uplink"], "free_s": 0.0})
                self._note(i, "restore", node.limit)
                self._do(i, node.restore(state["node"]))
        self._states, self._begun = None, True

    def _end(self) -> None:
        self._ended = True

    def _mail(self, parcels: Sequence[Envelope]) -> None:
        for parcel in parcels:
            self._arrive(parcel)

    def _arrive(self, p: Envelope) -> None:
        node = self.nodes[p.to]
        try:
            effects = node.receive(p.frm, p.kind, p.number, p.items, p.incarnation)
        except PeerError as error:
            if self._refuse is None:
                raise
            self._refuse(p.frm, error)
            return
        self._note(p.to, "mail", p.frm, p.incarnation, p.serial)
        self._do(p.to, effects)

    def _tell(self, what: str, args: tuple[Any, ...]) -> None:
        self._limits += what == "extend"
        for i, node in self.nodes.items():
            if what == "extend" or args[0] in node.neighbours:
                self._note(i, what, *args)
                self._moved_s[i] = time.monotonic()
                self._do(i, getattr(node, what)(*args))

    def _answer(self, question: int, what: str) -> None:
        if what == "model":
            now_s = self.now_s()
            found: Any = {i: (now_s, n.model) for i, n in self.nodes.items() if not n.joining}
        else:
            found = {
                i: {"node": node.state(), "uplink": self._uplinks[i].state()}
                for i, node in self.nodes.items()
            }
        self._report.answers[question] = found
        self._urgent = True
        self._lock.notify_all()

    def _note(self, i: int, *what: Any) -> None:
        if self._tracing:
            self._report.inputs.setdefault(i, []).append(list(what))

    # -- Effects -------------------------------------------------------------------------------

    def _do(self, i: int, effects: Sequence[Effect], again: bool = False) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._post(i, effect, again)
            elif isinstance(effect, Compute):
                self._jobs.append((i, effect, self.now_s()))
            elif self._every is not None and effect.round % self._every == 0:
                self._report.models.append((effect.round, i, self.now_s(), effect.model))

    def _post(self, i: int, send: Send, again: bool) -> None:
        """Have a message on its way, or hold it for as long as an emulated link takes."""
        uplink, now_s, incarnation = self._uplinks[i], self.now_s(), self.nodes[i].incarnation
        serial, items = uplink.serial(send.to), send.items
        delay_s = uplink.delay_s(now_s, send.to, send.nbytes, serial)
        parcel = Envelope(send.to, i, incarnation, serial, send.kind, send.number, items, again)
        if delay_s:
            self._later(now_s + delay_s, "post", parcel)
        else:
            self._post_now(parcel)

    def _post_now(self, parcel: Envelope) -> None:
        if parcel.to in self.nodes:
            self._here.append(parcel)
        else:
            self._out.append(parcel)

    def _flush(self) -> None:
        if self._out and not self._ended:  # whoever carries may be gone
            out, self._out = self._out, []
            self._carry(out)

    def _later(self, time_s: float, *event: Any) -> None:
        heapq.heappush(self._timers, (time_s, next(self._order), event))

    def _compute(self, i: int, job: Compute, given_s: float) -> None:
        if self._measured:
            given_s = self.now_s()
        if self._elsewhere is None:
            self._finish(i, job.number, *self.nodes[i].answer(job), given_s)
        else:
            self._given_s[i] = given_s
            self._elsewhere(i, job)

    def _came(self, i: int, number: int, losses: list[float], gradient: Any) -> None:
        if self._reports:
            self._report.losses += losses
        self._finish(i, number, losses, gradient, self._given_s.pop(i))

    def _fail(self, error: Exception) -> None:
        raise error

    def _finish(
        self, i: int, number: int, losses: list[float], gradient: Any, given_s: float
    ) -> None:
        """It is told now, or when its emulated time has passed."""
        due_s = -math.inf
        if not self._measured:
            due_s = self._clock.finish(i, number, given_s, self._steps)
        event = "done", i, number, losses, gradient, given_s
        if due_s > self.now_s():
            self._later(due_s, *event)
        else:
            self._handle(event)

    def _done(
        self, i: int, number: int, losses: list[float], gradient: Any, given_s: float
    ) -> None:
        node, now_s = self.nodes[i], self.now_s()
        self._moved_s[i] = time.monotonic()
        self._note(i, "done", number)
        step = node.round
        effects = node.computed(number, losses, gradient)
        self._report.rows.append((now_s, i, number, step, step, given_s, now_s))
        self._do(i, effects)
