"""An asynchronous node: it computes without a pause, and exchanges over one link at a time.

A node that is done with its gradient offers an exchange to each neighbour whose link is free, and
goes on.  An exchange over {i, j} of weight w moves w (h_j - h_i) to i and the opposite to j,
whatever either is doing: what a node gets while it computes waits for its next ``mix``, and counts
at once in what it says.  So the sum over all nodes (and what is under way) is kept, of models and
of tracked gradients alike, at any speeds; AD-PSGD is the case of one neighbour and w = 1/2.

Exchanges of a link are numbered, and each takes three messages:

    offer(number, w, what i says)      i goes on with its work, and offers nothing more to j
    answer(number, what j says)        j has not moved yet; it will
    confirm(number)                    i has moved, and so does j

So what is offered or answered in vain has not happened, at either end.  Whatever is lost may be
sent again: a number that is known is answered as before, and an offer of the next number confirms
this one.  Nobody waits: who has an offer out, or has answered one, just does not use that link.
Where both ends offer at once, the offer of the lower node counts, and the other is dropped.  If the
link closes, the end that has answered takes it as not happened; it gives back what it had taken
over the link anyway, where sums must be kept.

Shares that are pushed are running totals: ``shares(number, totals)`` and ``got(number)``; what
cannot be sent meanwhile is kept.

A fleet's losses are a function of node, neighbour and round, so who sends knows of them: an
exchange of which either message would be lost does not happen, and its link stays free.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.node.channels import CodedVector, Item, LocalView, Spoken, read
from offbeat.runtime.node.effects import Effect, Send
from offbeat.runtime.node.network import NOTHING
from offbeat.runtime.node.node import OPEN, Edge, GossipNode
from offbeat.runtime.node.synchronous import GOT

OFFER, ANSWER, CONFIRM, SHARES = "offer", "answer", "confirm", "shares"
MOST_WEIGHT = 1.0


class Phase(Enum):
    """What is under way over a link, as this end knows it."""

    IDLE = 0
    OFFERED = 1
    ANSWERED = 2


IDLE, OFFERED, ANSWERED = Phase  # read often


class Exchange:
    """What one end knows of the exchanges over a link; ``number`` is of the one at hand."""

    __slots__ = ("mine", "number", "phase", "sent", "theirs", "weight")

    def __init__(self, number: int) -> None:
        self.number, self.phase = number, IDLE
        self.weight = 0.0
        self.mine: Spoken = {}  # what this end has said, as it is read
        self.theirs: Spoken = {}
        self.sent: Send | None = None  # the offer or answer, which may be lost


class PairNode:
    """What a method sees as ``Node``: vectors ``[d]``.

    Its channels: the value published last, what was got since the last ``mix`` (where anything
    was), and what went over each compressed link, out and back.
    """

    def __init__(
        self, x: NDArray, names: Sequence[str], code: Callable[[str, NDArray], CodedVector | None]
    ) -> None:
        self.x = x
        self._code = code
        self._values: dict[str, NDArray] = {}
        self._coded: dict[str, CodedVector | None] = {}  # the message of a value that is compressed
        self._got: dict[str, NDArray] = {}
        self._out: dict[str, dict[int, NDArray]] = {name: {} for name in names}
        self._back: dict[str, dict[int, NDArray]] = {name: {} for name in names}

    def __getattr__(self, field: str) -> Any:
        raise AttributeError(f"the node has no {field} yet")

    def mix(self, channel: str) -> Any:
        got = self._got.pop(channel, None)
        if got is None:
            return np.zeros_like(self._values[channel]) if channel in self._values else NOTHING
        return got

    def publish(self, channel: str, value: NDArray) -> NDArray:
        coded = self._coded[channel] = self._code(channel, value)
        self._values[channel] = value if coded is None else coded.value
        return self._values[channel]

    def average(self, channel: str) -> NDArray:
        return self._values[channel] + self.mix(channel)

    pushed, push = mix, publish

    def get(self, channel: str, moved: NDArray) -> None:
        """``moved`` has come."""
        got = self._got.get(channel)
        self._got[channel] = moved if got is None else got + moved

    def forget(self, j: int) -> None:
        """What went over the link to ``j``."""
        for table in (self._out, self._back):
            for links in table.values():
                links.pop(j, None)

    def fields(self) -> dict[str, Any]:
        """The method's state."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        held = {name: getattr(self, name) for name in ("_values", "_got", "_out", "_back")}
        frames = {name: coded and coded.frame for name, coded in self._coded.items()}
        parts = {"fields": self.fields(), "held": held, "frames": frames}
        return {name: trees.dump(part) for name, part in parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        fields, held, frames = (trees.load(None, state[n]) for n in ("fields", "held", "frames"))
        vars(self).update(fields | held)
        for name, frame in frames.items():
            self._coded[name] = frame and CodedVector(self._values[name], frame=frame)


class PairingNode(GossipNode):
    """See the module and ``GossipNode``."""

    node: PairNode

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun = False  # whether its first gradient, if it needs one, is told
        self.count = 0  # of compressed messages
        self.exchanges: dict[int, Exchange] = {}
        channels = self.method.channels
        self.flow: dict[str, dict[int, NDArray]] = {
            name: {} for name, channel in channels.items() if channel.conserved and self.bears
        }
        self.remembers = {
            name for name, channel in channels.items() if channel.memory and not self.method.exact
        }
        self.seen: dict[int, int] = {}  # node -> number of the last shares that came
        self._apart = self.joining

    def _make(self, x: NDArray, *, common: bool) -> None:
        self._apart |= not common
        self.node = PairNode(x, tuple(self.method.channels), self._code)

    # -- Work ----------------------------------------------------------------------------------

    def _begun(self) -> list[Effect]:
        self.begun = True
        exchange = self._exchange() if self._apart or self.method.pushes else []
        return exchange + self._step()

    def _computed(self, gradient: Any) -> list[Effect]:
        if self.begun:
            self.method.tell(self.node, gradient)
        else:
            self.method.begin(self.node, gradient)
            self.begun = True
        self.round += 1
        return [*self._exchange(), *self._step()]

    def _step(self) -> list[Effect]:
        if not self.begun or self.job is not None or self.round >= self.limit:
            return []
        return [self._compute(self.method.ask(self.node))]

    @property
    def quiet(self) -> bool:
        idle = all(exchange.phase is IDLE for exchange in self.exchanges.values())
        return self.begun and self.job is None and self.round >= self.limit and idle

    # -- Exchanges -----------------------------------------------------------------------------

    def _at(self, j: int) -> Exchange:
        if j not in self.exchanges:
            self.exchanges[j] = Exchange(0)
        return self.exchanges[j]

    def _exchange(self) -> list[Effect]:
        """Turn to the neighbours."""
        view = self._view(self.round)
        if self.method.pushes:
            return self._share(view)
        weights = view.takes
        if self.method.partners == "one" and weights:
            generator = rng(self.setting.seed, "partner", self.i, self.round)
            chances = np.abs(list(weights.values()))
            j = generator.choice(list(weights), p=chances / chances.sum())
            weights = {int(j): 0.5}
        effects: list[Effect] = []
        for j, weight in weights.items():
            at = self._at(j)
            if self._link(j).state is not OPEN or at.phase is not IDLE:
                continue
            mine, items = self._speak(j)
            offer = self._sent(Send(j, OFFER, at.number, items, mine, weight))
            if self._arrives(j) and self._arrives(j, back=True):
                at.phase, at.weight, at.mine, at.sent = OFFERED, weight, mine, offer
                effects.append(offer)
            else:
                self.counts["messages_lost"] += 1
        return effects

    def _arrives(self, j: int, back: bool = False) -> bool:
        """Whether what is sent to ``j`` after this round, or what comes ``back``, is not lost."""
        return self.network.arrives(self.round, *((j, self.i) if back else (self.i, j)))

    def _received(self, frm: int, kind: str, number: int, items: Sequence[Item]) -> list[Effect]:
        if kind not in ((SHARES, GOT) if self.method.pushes else (OFFER, ANSWER, CONFIRM)):
            raise PeerError(f'node {frm} sent "{kind}", which no asynchronous node sends')
        if self._link(frm).state is not OPEN or number < self._link(frm).since:
            return self._dropped("closed")
        weight = 0.0
        if kind == OFFER:
            weight, items = self._weight(frm, items), items[1:]
            self._overtaken(frm, self._at(frm), number)
        theirs = self._read(frm, items) if kind in (OFFER, ANSWER, SHARES) else {}
        return self.hear(frm, kind, number, weight, theirs)

    def hear(self, j: int, kind: str, number: int, weight: float, theirs: Spoken) -> list[Effect]:
        """What a message of ``j`` that is to be believed says: see ``Send``."""
        at = self._at(j)
        if kind == OFFER:
            return self._offered(j, at, number, weight, theirs)
        if kind == ANSWER:
            return self._answered(j, at, number, theirs)
        if kind == CONFIRM:
            return self._confirmed(j, at, number)
        if kind == SHARES:
            return self._shared(j, number, theirs)
        return self._taken(at, number)

    def _offered(
        self, j: int, at: Exchange, number: int, weight: float, theirs: Spoken
    ) -> list[Effect]:
        self._overtaken(j, at, number)
        if number != at.number:
            return self._dropped("stale")
        if at.phase is OFFERED and self.i < j:
            return self._dropped("crossed")
        if at.phase is not ANSWERED:
            at.phase, at.weight, at.theirs = ANSWERED, weight, theirs
            at.mine, items = self._speak(j)
            at.sent = Send(j, ANSWER, number, items, at.mine)
        assert at.sent is not None
        return [self._sent(at.sent)]

    def _overtaken(self, j: int, at: Exchange, number: int) -> None:
        """Offer ``number`` has come: of the next exchange, it says that ``j`` has moved."""
        if at.phase is ANSWERED and number == at.number + 1:
            self._move(j, at)

    def _answered(self, j: int, at: Exchange, number: int, theirs: Spoken) -> list[Effect]:
        if number == at.number - 1:  # it has not heard that this node has moved
            self._dropped("doubled")
        elif at.phase is not OFFERED or number != at.number:
            return self._dropped("stale")
        else:
            at.theirs = theirs
            self._move(j, at)
            self.counts["exchanges"] += 1
        return [Send(j, CONFIRM, number)]

    def _confirmed(self, j: int, at: Exchange, number: int) -> list[Effect]:
        if at.phase is not ANSWERED or number != at.number:
            return self._dropped("stale")
        self._move(j, at)
        return []

    def _move(self, j: int, at: Exchange) -> None:
        """The exchange at hand has happened; both ends find the same numbers."""
        node = self.node
        for name, mine in at.mine.items():
            theirs = at.theirs.get(name)
            if theirs is None:
                continue
            if name in self.remembers:
                node._out[name][j], node._back[name][j] = mine, theirs
            moved = at.weight * (theirs - mine)
            node.get(name, moved)
            if name in self.flow:
                self.flow[name][j] = self.flow[name].get(j, 0.0) + moved
        at.phase, at.number, at.mine, at.theirs, at.sent = IDLE, at.number + 1, {}, {}, None

    def _speak(self, j: int) -> tuple[Spoken, list[Any]]:
        """What this node says to ``j`` on each channel, as it is read and as it is sent."""
        node, spoken = self.node, {}
        items: list[Any] = []
        for name, channel in self.method.channels.items():
            if name not in node._values:
                items.append(None)
                continue
            got, item = node._got.get(name), node._coded[name]
            level = node._values[name] if got is None else node._values[name] + channel.gain * got
            if name in self.remembers:
                h = node._out[name].get(j)
                item = self._squeeze(name, level if h is None else level - h, j)
                spoken[name] = item.value if h is None else h + item.value
                items.append(item)
                continue
            if got is not None and item is not None:
                # With what it got it is no longer what its message holds.
                item = self._squeeze(name, level, j)
            spoken[name] = level if item is None else item.value
            items.append(level if item is None else item)
        return spoken, items

    def _weight(self, j: int, items: Sequence[Item]) -> float:
        weight = items[0] if items else None
        fits = isinstance(weight, np.ndarray) and weight.shape == (1,)
        if not fits or not abs(weight[0]) <= MOST_WEIGHT:  # type: ignore[index]
            raise PeerError(f"node {j} offers an exchange without a weight")
        return float(weight[0])  # type: ignore[index]

    def _read(self, j: int, items: Sequence[Item]) -> Spoken:
        names, values = self.method.channels, self.node._values
        sizes = [len(values.get(name, self.node.x)) for name in names]
        reads = read(items, sizes, self.node.x.dtype)
        spoken = dict(zip(names, (one.value for one in reads), strict=True))
        for name in self.remembers:
            if spoken[name] is not None and j in self.node._back[name]:
                spoken[name] = self.node._back[name][j] + spoken[name]
        return {name: value for name, value in spoken.items() if value is not None}

    def _code(self, name: str, value: NDArray) -> CodedVector | None:
        """The message of a value that is published, where it is compressed without memory."""
        if self.method.exact or name in self.remembers:
            return None
        return self._squeeze(name, value, self.i)

    def _squeeze(self, name: str, x: NDArray, j: int) -> CodedVector:
        compressor, generator = self.method.compressor, None
        if compressor.draws:
            at = self.i * self.n + j
            generator = rng(self.setting.seed, f"compress {name}", at, self.count)
        self.count += 1
        message = compressor.compress(x, generator)
        return CodedVector(message.dense(), message)

    def _sent(self, send: Send) -> Send:
        self.counts["messages"] += 1
        self.counts["bytes"] += send.nbytes
        return send

    # -- Shares --------------------------------------------------------------------------------

    def _share(self, view: LocalView) -> list[Effect]:
        """Keep this node's share of all it has and send the others."""
        node, own = self.node, view.own
        free = {}
        for j, share in view.shares.items():
            if self._link(j).state is OPEN and self._at(j).phase is IDLE:
                free[j] = share
            else:  # kept: else all that a node has would soon be under way
                own += share
        for name, value in node._values.items():
            node.get(name, own * value)
            out = node._out[name]
            for j, share in free.items():
                out[j] = share * value if j not in out else share * value + out[j]
        effects: list[Effect] = []
        for j in free:
            at, totals = self._at(j), {name: node._out[name][j] for name in node._values}
            shares = self._sent(Send(j, SHARES, at.number, list(totals.values()), totals))
            if self._arrives(j):
                at.phase, at.sent = OFFERED, shares
                effects.append(shares)
            else:  # the next make up for it
                self.counts["messages_lost"] += 1
        return effects

    def _shared(self, j: int, number: int, totals: Spoken) -> list[Effect]:
        node = self.node
        if totals.keys() != node._values.keys():
            raise PeerError(f"node {j} sends shares of {len(totals)} channels")
        if number <= self.seen.get(j, -1):
            self._dropped("doubled")
        else:
            self.seen[j] = number
            for name, given in totals.items():
                back = node._back[name]
                node.get(name, given if j not in back else given - back[j])
                back[j] = given
        return [Send(j, GOT, number)]

    def _taken(self, at: Exchange, number: int) -> list[Effect]:
        if at.phase is not OFFERED or number != at.number:
            return self._dropped("stale")
        at.phase, at.number, at.sent = IDLE, number + 1, None
        return []

    # -- Links ---------------------------------------------------------------------------------

    def _next(self, j: int) -> int:
        return self._at(j).number + 2  # the other end may be one ahead

    def _age(self, link: Edge) -> int:
        return self.round

    def _close(self, j: int) -> None:
        self.exchanges[j] = Exchange(self._at(j).number)
        if self.method.pushes:
            return
        for name, flow in self.flow.items():
            if j in flow:
                self.node.get(name, -flow.pop(j))
        self.node.forget(j)

    def _opened(self, j: int) -> None:
        self.exchanges[j] = Exchange(self._link(j).since)

    def _forgotten(self, j: int) -> None:
        self.seen.pop(j, None)
        self.node.forget(j)

    def _unheard(self) -> list[Send]:
        return [at.sent for at in self.exchanges.values() if at.sent is not None]

    # -- Checkpoints ---------------------------------------------------------------------------

    _STATE = (*GossipNode._STATE, "begun", "count", "flow", "seen")

    def _node_state(self) -> dict[str, Any]:
        exchanges = []
        for j, at in self.exchanges.items():
            sent = None if at.sent is None else [at.sent.kind, at.sent.items]
            both = {"mine": at.mine, "theirs": at.theirs}
            tree = [at.number, at.phase.value, at.weight, trees.dump(both), trees.dump(sent)]
            exchanges.append([j, tree])
        return {"pair": self.node.state(), "exchanges": exchanges}

    def _restore_node(self, state: Mapping[str, Any]) -> None:
        self.node.restore(state["pair"])
        for j, (number, phase, weight, both, sent) in state["exchanges"]:
            at = self.exchanges[j] = Exchange(number)
            at.phase, at.weight = Phase(phase), weight
            at.mine, at.theirs = trees.load(None, both).values()
            if (message := trees.load(None, sent)) is not None:
                kind, items = message
                at.sent = Send(j, kind, number, list(items), at.mine)
