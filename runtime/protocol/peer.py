"""One peer's side of the protocol: messages and time in, messages and events out.

It knows no socket.  ``runtime.on_zeromq.peer`` moves its bytes over ZeroMQ.

Sessions.  Each peer numbers its end of every link: first its incarnation, then a number drawn by
its process, then how often the link was given up.  A message carries the sender's session and the
one it knows of the addressee; only where both are the current ones it belongs to the link, whose
messages come once and in order (``runtime.protocol.channel``).  A higher session of the other end
replaces its older ones.

Beats.  Every peer tells every neighbour every ``heartbeat_s``: which session of it it knows, and
whether it hears it.  A neighbour is up where both hear each other, and down where it is silent,
has gone, or gives the link up.  Who hears that a younger process bears its name ends; who hears of
an older one of its own incarnation before it has begun takes the next.

Beginning.  A peer waits for its neighbours, and begins with them.  Where some run already, and do
not count on it from their start, it takes their models and joins them.

Ending.  A peer that is done stays until its neighbours are.  For one that is gone it stays a while:
who comes back then learns from it that the run is over, and what came of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from offbeat.runtime.base.errors import (
    BadArray,
    BadHeader,
    ConfigError,
    Fenced,
    OffbeatError,
    OldIncarnation,
    PeerError,
    WrongNode,
    WrongRun,
)
from offbeat.runtime.base.logs import Note
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.gossip.hosted import Envelope
from offbeat.runtime.node.channels import Item
from offbeat.runtime.protocol.channel import Full, ReliableChannel
from offbeat.runtime.protocol.messages import (
    DONE,
    GATHERING,
    LEFT,
    RUNNING,
    SAVED,
    Beat,
    Config,
    Said,
)
from offbeat.runtime.protocol.roster import GRAVE, MOST_OFFENCES
from offbeat.runtime.protocol.slot import PROCESS, RESETS, Neighbour, incarnation, process
from offbeat.runtime.protocol.wire import (
    Assembly,
    Buffer,
    Header,
    Kind,
    Reader,
    Received,
    pack,
    parcels,
)

MOST_INCARNATIONS = 2**16
MOST_SAID = 500  # characters of what differs
HARMLESS = (OldIncarnation, WrongRun)  # what honest nodes cause, too
WAIT_S = 600.0  # for neighbours that were never heard, before a run begins without them
DIFFER_S = 3.0  # for a neighbour of the same run to be heard, where another's run differs
LATE_S = 20.0  # that a peer which is done stays for a neighbour that is being started again
START, RESTORE, JOIN, OVER = "start", "restore", "join", "over"


class Request(NamedTuple):
    """What somebody who is no peer asks; answers go to its address."""

    address: bytes
    node: str
    kind: str
    body: Any


class PeerProtocol:
    """One peer among its neighbours.

    Args:
        run: what all its peers call it; messages of other runs are refused.
        text: what the run depends on, as lines that can be compared.
        me: its number.
        names: of all nodes.
        neighbours: their numbers.
        kinds: see ``spoken``.
        liveness: times.
        incarnation: how often it was started before.
        nonce: of its process, below ``PROCESS``.
        saved: whether it has a checkpoint to go on from.
        joins: whether a node can join others that run.
        now_s: the time.
        resend_s: see ``ReliableChannel``; short where messages get lost without a ``lost``.
    """

    def __init__(
        self,
        run: str,
        text: str,
        me: int,
        names: Sequence[str],
        neighbours: Sequence[int],
        kinds: Mapping[str, Kind],
        liveness: Liveness,
        *,
        incarnation: int,
        nonce: int,
        saved: bool,
        joins: bool,
        now_s: float,
        resend_s: float | None = None,
    ) -> None:
        self.run, self._text, self.me, self.name = run, text, me, names[me]
        self.liveness, self._kinds, self._joins = liveness, kinds, joins
        self._nonce = nonce
        self._resend_s = resend_s or liveness.resend_s
        self._reader = Reader(run, kinds)
        self.standing = SAVED if saved else GATHERING
        self.round = self._beats = 0
        self.neighbours = {
            j: Neighbour(j, names[j], 0, Assembly(kinds)) for j in sorted(neighbours)
        }
        self._by_name = {n.name: n for n in self.neighbours.values()}
        self._began_s = self._looked_s = now_s
        self._left_s = now_s  # when it was done
        self._differs_s: float | None = None  # since when another run was heard of
        self._difference = ""
        self.outbox: list[tuple[int, bool, list[Any]]] = []  # neighbour, is it a beat?, frames
        self.events: list[tuple[str, int]] = []  # "down" or "up" and who, for the node
        self.mail: list[Envelope] = []  # for the node
        self.requests: list[Request] = []
        self.cuts: list[tuple[bytes, str]] = []  # addresses to be cut off, and why
        self.notes: list[Note] = []  # for the log
        self.counts: Counter[str] = Counter()
        self.fate: OffbeatError | None = None
        self._become(incarnation)

    @property
    def begun(self) -> bool:
        """Whether the node exists."""
        return self.standing >= RUNNING

    def _become(self, incarnation: int) -> None:
        if incarnation >= MOST_INCARNATIONS:
            raise ConfigError(f"{self.name} was started {incarnation} times; give it a new name")
        self.incarnation = incarnation
        for n in self.neighbours.values():
            n.mine = (incarnation * PROCESS + self._nonce) * RESETS
            self._renew(n)

    def _renew(self, n: Neighbour) -> None:
        """A new link to ``n``."""
        n.link = ReliableChannel(resend_s=self._resend_s, ack_s=self.liveness.tick_s)
        n.assembly = Assembly(self._kinds)
        n.knows = False
        n.beat_s = -np.inf
        self.mail = [parcel for parcel in self.mail if parcel.frm != n.number]

    # -- What the node does ----------------------------------------------------------------------

    def here(self, now_s: float) -> list[Neighbour]:
        """The neighbours that hear this peer, and are heard."""
        return [n for n in self.neighbours.values() if self._mutual(n, now_s)]

    def decide(self, now_s: float) -> str | None:
        """How the node is to begin, if it is not ``OVER`` already; None: not yet."""
        here = self.here(now_s)
        running = [n for n in here if n.standing in (RUNNING, DONE)]
        counted_on = any(n.counts for n in running)
        if running and not counted_on:
            if not self._joins and all(n.standing == DONE for n in running):
                return OVER
            if not self._joins:
                raise ConfigError(
                    f"{running[0].name} is in the middle of the run, and this method cannot take "
                    "a node back; stop all peers and start them again"
                )
            return JOIN
        waits = [n for n in self.neighbours.values() if n not in here]
        if waits and (now_s - self._began_s < WAIT_S or not here):
            return None
        if self.standing == SAVED:
            return RESTORE
        if any(n.standing == SAVED for n in here) and not counted_on:
            return None
        return START

    def begin(self, how: str, now_s: float) -> list[int]:
        """The node begins; answers the neighbours that are up.

        To a node that starts all links are open, so it must hear of those that are down.
        """
        alike, self.standing = self.standing, RUNNING
        for n in self.neighbours.values():
            begins = n.standing == alike or (n.standing in (RUNNING, DONE) and n.counts)
            n.up = how != JOIN and begins and self._mutual(n, now_s)
            n.since = n.theirs if n.up else 0
            n.beat_s = -np.inf
            if how == START and not n.up:
                self.events.append(("down", n.number))
        if how == JOIN:
            self.mail.clear()
        return [n.number for n in self.neighbours.values() if n.up]

    def send(self, parcel: Envelope, now_s: float) -> None:
        """Have a node's message on its way; to one that is down nothing is sent."""
        n = self.neighbours[parcel.to]
        if not n.up:
            self.counts["unsent"] += 1
            return
        if parcel.again and n.link.pending:
            return  # else a slow line would carry nothing but repetitions
        arrays = {str(k): item for k, item in enumerate(parcel.items) if item is not None}
        body = Said(parcel.kind, parcel.number, parcel.serial, len(parcel.items))
        try:
            for part in parcels("said", body, arrays):
                n.link.send(part)
        except Full:
            self.notes.append(
                Note("cut", f"{n.name} takes nothing any more", {"address": n.name, "why": "full"})
            )
            self._down(n)
            return
        self._flush(n, now_s)

    def leave(self, standing: int, now_s: float) -> None:
        """Tell all neighbours that this peer is done, or has left."""
        self.standing, self._left_s = standing, now_s
        for n in self.neighbours.values():
            self._beat(n, now_s)

    def finished(self, now_s: float) -> bool:
        """Whether nobody waits for this peer any more, once it is done."""
        late_s = self._left_s + LATE_S
        return all(
            n.standing in (DONE, LEFT) or (now_s >= late_s and not self.hears(n, now_s))
            for n in self.neighbours.values()
        ) and not any(
            n.link.pending and self.hears(n, now_s) and n.standing != LEFT
            for n in self.neighbours.values()
        )

    # -- What comes in ---------------------------------------------------------------------------

    def receive(
        self, address: bytes, node: str | None, frames: Sequence[Buffer], now_s: float
    ) -> int:
        """A message; ``node`` is who it is from, where a key says so.

        Answers how much it speaks against its connection: 0 where it was of use.
        """
        try:
            self._take(address, node, self._reader.read(frames), now_s)
        except PeerError as error:
            n = self._by_name.get(node or "") or self.at(address)
            self.offence(address, n, error)
            return 1 if isinstance(error, HARMLESS) else GRAVE
        return 0

    def offence(self, address: bytes, n: Neighbour | None, error: PeerError) -> None:
        """Something that cannot be right; who keeps saying such things is cut off."""
        self.counts[error.name] += 1
        if isinstance(error, HARMLESS):
            return
        who = n.name if n else "somebody"
        fields = {"member": n and n.name, "reason": error.name, "why": str(error)}
        if n is None or n.offences % MOST_OFFENCES == 0:  # it may say so with every beat
            self.notes.append(Note("rejected", f"{who}: {error.name}: {error}", fields))
        if n is None:
            self.cuts.append((address, error.name))
            return
        n.offences += 1
        if n.offences % MOST_OFFENCES == 0:
            self.cuts.append((address, error.name))
            self._down(n)

    def at(self, address: bytes) -> Neighbour | None:
        """The neighbour that speaks from ``address``."""
        return next((n for n in self.neighbours.values() if n.address == address), None)

    def _take(self, address: bytes, node: str | None, message: Received, now_s: float) -> None:
        head = message.head
        if node == "":
            self.cuts.append((address, f"the key of {head.node} is not in the list any more"))
            raise OldIncarnation(f"{head.node} may not take part any more")
        if node is not None and head.node != node:
            raise WrongNode(f"{node} says that it is {head.node}")
        if head.kind in ("ask", "watch"):
            self.requests.append(Request(address, head.node, head.kind, message.body))
            return
        n = self._by_name.get(head.node)
        if n is None:
            raise WrongNode(f"{head.node} is no neighbour of {self.name}")
        if head.kind == "config":
            self._other(n, head, message.body, now_s)
            return
        if head.run != self.run:
            if now_s >= n.config_s:
                n.config_s = now_s + self.liveness.heartbeat_s
                self._post(n, parcels("config", Config(self._text))[0], 0)
            raise WrongRun(f"{n.name} runs another experiment, {head.run}")
        n.address = address
        if head.incarnation < n.theirs:
            n.beat_s = -np.inf  # it is to know
            raise OldIncarnation(f"{n.name} speaks as session {head.incarnation}")
        if head.incarnation > n.theirs:
            self._replaced(n, head.incarnation)
        if head.kind == "beat":
            self._heard(n, message.body, head, now_s)
            return
        if head.kind not in ("said", "piece") or not head.sequence:
            raise BadHeader(f"a peer does not say {head.kind} like this")
        if head.to != n.mine:
            raise OldIncarnation(f"{n.name} speaks to session {head.to}")
        if n.standing == LEFT:
            raise OldIncarnation(f"{n.name} has left")
        n.heard_s, n.excused = now_s, False
        n.knows, n.standing = True, max(n.standing, RUNNING)
        n.counts = n.counts or not self.begun  # else it would send nothing yet
        self._see(n, now_s)
        n.link.acknowledge(head.acknowledged, now_s)
        for passed in n.link.receive(head.sequence, message, now_s):
            try:
                whole = n.assembly.take(passed)
                if whole is not None:
                    self._pass_on(n, whole)
            except PeerError as error:
                self.offence(address, n, error)
        self._flush(n, now_s)

    def _pass_on(self, n: Neighbour, message: Received) -> None:
        said, head = message.body, message.head
        extra = [name for name in message.arrays if int(name) >= said.items]
        if extra:
            raise BadArray(f"{said.what} has {said.items} items, and one called {extra[0]}")
        codecs = {one.name: one.codec for one in head.arrays}
        items: list[Item] = []
        for place in range(said.items):
            array = message.arrays.get(str(place))
            coded = array is not None and codecs[str(place)] == "coded"
            items.append(array.tobytes() if coded and array is not None else array)
        born = incarnation(head.incarnation)
        self.mail.append(
            Envelope(self.me, n.number, born, said.serial, said.what, said.number, tuple(items))
        )

    def _replaced(self, n: Neighbour, session: int) -> None:
        """``n`` has given the link up, or is another process."""
        if process(session) != process(n.theirs):
            n.before, n.since, n.beats = n.theirs, 0, 0
        n.theirs = session
        n.standing = GATHERING
        if n.up:
            self._down(n)
        else:
            self._renew(n)

    def _heard(self, n: Neighbour, beat: Beat, head: Header, now_s: float) -> None:
        if beat.number <= n.beats:
            raise OldIncarnation(f"{n.name} said more since")
        n.beats = beat.number
        for rival in (beat.known, beat.before):
            if rival and process(rival) != process(n.mine):
                self._rival(n, incarnation(rival))
        if head.to == n.mine and head.acknowledged:
            n.link.acknowledge(head.acknowledged, now_s)
        n.standing, n.counts, n.round = beat.standing, beat.counts, beat.round
        n.heard_s, n.excused = now_s if beat.standing != LEFT else -np.inf, False
        n.knows = beat.hears and beat.known == n.mine
        if n.up and not n.knows and beat.known == n.mine:
            self._down(n)  # it hears this peer no more
        self._see(n, now_s)

    def _rival(self, n: Neighbour, theirs: int) -> None:
        """``n`` knows another process of this name."""
        if not self.begun:
            if theirs >= self.incarnation:
                self._become(theirs + 1)
        elif theirs > self.incarnation:
            self.fate = Fenced(f"{n.name} knows a younger process as {self.name}; this one ends")

    def _other(self, n: Neighbour, head: Header, config: Config, now_s: float) -> None:
        """``n`` runs something else."""
        if head.run == self.run:
            return
        mine, theirs = self._text.splitlines(), config.text.splitlines()
        here = [line for line in mine if line not in theirs]
        there = [line for line in theirs if line not in mine]
        said = f"here {', '.join(here) or 'nothing'}; there {', '.join(there) or 'nothing'}"
        self._difference = f"{n.name} runs another experiment: {said[:MOST_SAID]}"
        if self._differs_s is None:
            self._differs_s = now_s
            self.notes.append(Note("differs", self._difference, {"why": said[:MOST_SAID]}))

    # -- Time and what goes out ------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let time pass."""
        looked_s, self._looked_s = self._looked_s, now_s
        if (away_s := now_s - looked_s) > 2 * self.liveness.heartbeat_s:
            for n in self.neighbours.values():  # this side was away: nobody's fault, once
                if not n.excused:
                    n.heard_s = max(n.heard_s, min(now_s, n.heard_s + away_s))
                    n.excused = True
        for n in self.neighbours.values():
            self._see(n, now_s)
            self._flush(n, now_s)
            if now_s >= n.beat_s:
                self._beat(n, now_s)
        alone = not any(self.hears(n, now_s) for n in self.neighbours.values())
        differs_s = np.inf if self._differs_s is None else self._differs_s
        if alone and not self.begun and now_s - differs_s > DIFFER_S:
            self.fate = ConfigError(self._difference)

    def lost(self, number: int, now_s: float) -> None:
        """The connection to a neighbour is a new one: what was on its way may be lost."""
        n = self.neighbours[number]
        n.link.lost(now_s)
        self._flush(n, now_s)

    def due_s(self) -> float:
        """When ``tick`` has something to do, if nothing comes before."""
        most_s = self._looked_s + self.liveness.heartbeat_s
        return min([most_s, *(min(n.beat_s, n.link.due_s()) for n in self.neighbours.values())])

    def hears(self, n: Neighbour, now_s: float) -> bool:
        """Whether ``n`` was heard lately."""
        return now_s - n.heard_s <= self.liveness.down_after_s

    def _mutual(self, n: Neighbour, now_s: float) -> bool:
        return n.knows and self.hears(n, now_s)

    def _see(self, n: Neighbour, now_s: float) -> None:
        """Whether ``n`` has come up or gone down."""
        if not self.begun:
            return
        if n.up and not self.hears(n, now_s):
            if n.standing != DONE:
                self._down(n)
        elif not n.up and self._mutual(n, now_s) and n.standing in (RUNNING, DONE):
            n.up = True
            self.events.append(("up", n.number))

    def _down(self, n: Neighbour) -> None:
        if n.up and self.begun and self.standing < DONE:  # then nothing can change any more
            self.events.append(("down", n.number))
            self.counts["down"] += 1
        n.up, n.since = False, 0
        n.mine += 1
        self._renew(n)

    def _beat(self, n: Neighbour, now_s: float) -> None:
        often = not (self.begun and n.knows)  # somebody waits
        n.beat_s = now_s + (self.liveness.tick_s if often else self.liveness.heartbeat_s)
        self._beats += 1
        body = Beat(
            self._beats,
            n.theirs,
            n.before,
            self.hears(n, now_s),
            self.standing,
            bool(n.since) and process(n.since) == process(n.theirs),
            self.round,
        )
        (parcel,) = parcels("beat", body)
        n.link.owes(np.inf)  # the beat says it
        self._post(n, parcel, 0)

    def _flush(self, n: Neighbour, now_s: float) -> None:
        for sequence, parcel in n.link.out(now_s):
            self._post(n, parcel, sequence)
        if n.link.owes(now_s):
            self._beat(n, now_s)

    def _post(self, n: Neighbour, parcel: Any, sequence: int) -> None:
        frames = pack(
            parcel,
            run=self.run,
            node=self.name,
            incarnation=n.mine,
            to=n.theirs,
            sequence=sequence,
            acknowledged=n.link.acknowledged,
        )
        self.outbox.append((n.number, parcel.kind == "beat", frames))
