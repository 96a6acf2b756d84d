"""An asynchronous node: it computes without a pause, and exchanges over one link at a time.

The semantics are those of ``runtime.pairs``: an exchange over {i, j} of weight w moves
w (h_j - h_i) to i and the opposite to j.  Exchanges of a link are numbered, and each takes three
messages:

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
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.contract import HEADER
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.gossip.pairs import Channels, PairNode
from offbeat.runtime.node.channels import Item, LocalView, read
from offbeat.runtime.node.node import OPEN, Edge, Effect, GossipNode, RoundDone, Send
from offbeat.runtime.node.synchronous import GOT

OFFER, ANSWER, CONFIRM, SHARES = "offer", "answer", "confirm", "shares"
IDLE, OFFERED, ANSWERED = range(3)
MOST_WEIGHT = 1.0

Said = dict[str, NDArray]


class Exchange:
    """What one end knows of the exchanges over a link; ``number`` is of the one at hand."""

    def __init__(self, number: int) -> None:
        self.number, self.is_ = number, IDLE
        self.weight = 0.0
        self.said: Said = {}  # by this end, as it is read
        self.told: Said = {}  # by the other
        self.items: tuple[Item, ...] = ()  # of the offer or answer that may be lost


class PairingNode(GossipNode):
    """See the module and ``GossipNode``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun = False  # whether its first gradient, if it needs one, is told
        self.count = 0  # of compressed messages
        self.exchanges: dict[int, Exchange] = {}
        self.flow: dict[str, dict[int, NDArray]] = {
            name: {} for name, channel in self.method.channels.items() if channel.conserved
        }
        self.frames: dict[str, Item] = {}  # of what was published
        self.seen: dict[int, int] = {}  # node -> number of the last shares that came
        self._apart = self.joining

    def _make(self, x: NDArray, common: bool) -> None:
        self.channels = Channels(self.method.channels)
        self.node = PairNode(x, self.channels, self._say)

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
        return [RoundDone(self.round, self.model), *self._exchange(), *self._step()]

    def _step(self) -> list[Effect]:
        if not self.begun or self.job is not None or self.round >= self.limit:
            return []
        return [self._compute(self.method.ask(self.node))]

    @property
    def quiet(self) -> bool:
        idle = all(exchange.is_ == IDLE for exchange in self.exchanges.values())
        return self.begun and self.job is None and self.round >= self.limit and idle

    # -- Exchanges -----------------------------------------------------------------------------

    def _at(self, j: int) -> Exchange:
        if j not in self.exchanges:
            self.exchanges[j] = Exchange(0)
        return self.exchanges[j]

    def _exchange(self) -> list[Effect]:
        """Turn to the neighbours."""
        links = LocalView(self.network.whole(self.round), self.i)
        if self.method.pushes:
            return self._share(links)
        weights = links.takes
        if self.method.partners == "one" and weights:
            generator = rng(self.experiment.seed, "partner", self.i, self.round)
            chances = np.abs(list(weights.values()))
            j = generator.choice(list(weights), p=chances / chances.sum())
            weights = {int(j): 0.5}
        effects: list[Effect] = []
        for j, weight in weights.items():
            if self._link(j).is_ == OPEN and self._at(j).is_ == IDLE:
                at = self._at(j)
                at.is_, at.weight = OFFERED, weight
                at.said, items = self._speak(j)
                at.items = (np.array([weight]), *items)
                effects.append(self._sent(Send(j, OFFER, at.number, at.items)))
        return effects

    def _received(self, frm: int, kind: str, number: int, items: Sequence[Item]) -> list[Effect]:
        handlers = (
            {SHARES: self._shared, GOT: self._taken}
            if self.method.pushes
            else {OFFER: self._offered, ANSWER: self._answered, CONFIRM: self._confirmed}
        )
        if kind not in handlers:
            raise PeerError(f'node {frm} sent "{kind}", which no asynchronous node sends')
        if self._link(frm).is_ != OPEN or number < self._link(frm).since:
            return self._dropped("closed")
        return handlers[kind](frm, self._at(frm), number, items)

    def _offered(self, j: int, at: Exchange, number: int, items: Sequence[Item]) -> list[Effect]:
        weight, told = self._weight(j, items), self._read(items[1:])
        if at.is_ == ANSWERED and number == at.number + 1:  # which says that j has moved
            self._move(j, at)
        if number != at.number:
            return self._dropped("stale")
        if at.is_ == OFFERED and self.i < j:
            return self._dropped("crossed")
        if at.is_ != ANSWERED:
            at.is_, at.weight, at.told = ANSWERED, weight, told
            at.said, said = self._speak(j)
            at.items = tuple(said)
        return [self._sent(Send(j, ANSWER, number, at.items))]

    def _answered(self, j: int, at: Exchange, number: int, items: Sequence[Item]) -> list[Effect]:
        told = self._read(items)
        if number == at.number - 1:  # it has not heard that this node has moved
            self._dropped("doubled")
        elif at.is_ != OFFERED or number != at.number:
            return self._dropped("stale")
        else:
            at.told = told
            self._move(j, at)
            self.counts["exchanges"] += 1
        return [Send(j, CONFIRM, number, ())]

    def _confirmed(self, j: int, at: Exchange, number: int, items: Sequence[Item]) -> list[Effect]:
        if at.is_ != ANSWERED or number != at.number:
            return self._dropped("stale")
        self._move(j, at)
        return []

    def _move(self, j: int, at: Exchange) -> None:
        """The exchange at hand has happened; both ends find the same numbers."""
        mine = self.channels
        for name in at.said.keys() & at.told.keys():
            says, said = at.said[name], at.told[name]
            if self._keeps(name):
                says = mine.out[name][j] = mine.out[name].get(j, 0.0) + says
                said = mine.back[name][j] = mine.back[name].get(j, 0.0) + said
            moved = at.weight * (said - says)
            mine.got[name] = mine.got[name] + moved
            if name in self.flow:
                self.flow[name][j] = self.flow[name].get(j, 0.0) + moved
        at.is_, at.number, at.said, at.told, at.items = IDLE, at.number + 1, {}, {}, ()

    def _keeps(self, name: str) -> bool:
        return not self.method.exact and self.method.channels[name].memory

    def _speak(self, j: int) -> tuple[Said, list[Item]]:
        """What this node says to ``j`` on each channel, as it is read and as it is sent."""
        mine, said = self.channels, {}
        items: list[Item] = []
        for name, channel in self.method.channels.items():
            if name not in mine.value:
                items.append(None)
                continue
            got = mine.got[name]
            level = mine.value[name] + channel.gain * got
            if self.method.exact:
                said[name], item = level, level
            elif channel.memory:
                h = mine.out[name].get(j)
                said[name], item = self._squeeze(name, level if h is None else level - h, j)
            elif isinstance(got, float):  # nothing
                said[name], item = mine.value[name], self.frames[name]
            else:  # with what it got it is no longer what a message can hold
                said[name], item = self._squeeze(name, level, j)
            items.append(item)
        return said, items

    def _weight(self, j: int, items: Sequence[Item]) -> float:
        weight = items[0] if items else None
        fits = isinstance(weight, np.ndarray) and weight.shape == (1,)
        if not fits or not abs(weight[0]) <= MOST_WEIGHT:  # type: ignore[index]
            raise PeerError(f"node {j} offers an exchange without a weight")
        return float(weight[0])  # type: ignore[index]

    def _read(self, items: Sequence[Item]) -> dict[str, NDArray]:
        sizes = [len(self.channels.value.get(name, self.node.x)) for name in self.method.channels]
        found = read(items, sizes, self.node.x.dtype)
        names = self.method.channels
        return {k: one.value for k, one in zip(names, found, strict=True) if one.value is not None}

    def _say(self, name: str, value: NDArray) -> tuple[NDArray, int]:
        """What is said where ``value`` is published: it, or it compressed."""
        if self.method.exact or self.method.channels[name].memory:
            return value, HEADER + value.nbytes
        said, self.frames[name] = self._squeeze(name, value, self.i)
        return said, len(self.frames[name])  # type: ignore[arg-type]

    def _squeeze(self, name: str, x: NDArray, j: int) -> tuple[NDArray, bytes]:
        compressor, generator = self.method.compressor, None
        if compressor.draws:
            at = self.i * self.n + j
            generator = rng(self.experiment.seed, f"compress {name}", at, self.count)
        self.count += 1
        message = compressor.compress(x, generator)
        return message.dense(), message.encode()[0]

    def _sent(self, send: Send) -> Send:
        self.counts["messages"] += 1
        self.counts["bytes"] += send.nbytes
        return send

    # -- Shares --------------------------------------------------------------------------------

    def _share(self, links: LocalView) -> list[Effect]:
        """Keep this node's share of all it has and send the others."""
        mine, own = self.channels, links.own
        free = {}
        for j, share in links.shares.items():
            if self._link(j).is_ == OPEN and self._at(j).is_ == IDLE:
                free[j] = share
            else:
                own += share
        for name, value in mine.value.items():
            mine.got[name] = mine.got[name] + own * value
            for j, share in free.items():
                mine.out[name][j] = share * value + mine.out[name].get(j, 0.0)
        effects: list[Effect] = []
        for j in free:
            at = self._at(j)
            at.is_, at.items = OFFERED, tuple(mine.out[name][j] for name in mine.value)
            effects.append(self._sent(Send(j, SHARES, at.number, at.items)))
        return effects

    def _shared(self, j: int, at: Exchange, number: int, items: Sequence[Item]) -> list[Effect]:
        mine, totals = self.channels, self._read(items)
        if totals.keys() != mine.value.keys():
            raise PeerError(f"node {j} sends shares of {len(totals)} channels")
        if number <= self.seen.get(j, -1):
            self._dropped("doubled")
        else:
            self.seen[j] = number
            for name, given in totals.items():
                mine.got[name] = mine.got[name] + given - mine.back[name].get(j, 0.0)
                mine.back[name][j] = given
        return [Send(j, GOT, number, ())]

    def _taken(self, j: int, at: Exchange, number: int, items: Sequence[Item]) -> list[Effect]:
        if at.is_ != OFFERED or number != at.number:
            return self._dropped("stale")
        at.is_, at.number, at.items = IDLE, number + 1, ()
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
            self.channels.got[name] = self.channels.got[name] - flow.pop(j, 0.0)
        for table in (self.channels.out, self.channels.back):
            for links in table.values():
                links.pop(j, None)

    def _opened(self, j: int) -> None:
        self.exchanges[j] = Exchange(self._link(j).since)

    def _forgotten(self, j: int) -> None:
        self.seen.pop(j, None)
        for table in (self.channels.out, self.channels.back):
            for links in table.values():
                links.pop(j, None)

    def _unheard(self) -> list[Send]:
        kinds = {OFFERED: SHARES if self.method.pushes else OFFER, ANSWERED: ANSWER}
        return [
            Send(j, kinds[at.is_], at.number, at.items)
            for j, at in self.exchanges.items()
            if at.is_ != IDLE
        ]

    # -- Checkpoints ---------------------------------------------------------------------------

    _STATE = (*GossipNode._STATE, "begun", "count", "flow", "frames", "seen")

    def _node_state(self) -> dict[str, Any]:
        return {
            "fields": trees.dump(self.node.fields()),
            "channels": trees.dump(vars(self.channels)),
            "exchanges": [[j, trees.dump(vars(at))] for j, at in self.exchanges.items()],
        }

    def _restore_node(self, state: Mapping[str, Any]) -> None:
        vars(self.node).update(trees.load(None, state["fields"]))
        vars(self.channels).update(trees.load(None, state["channels"]))
        for j, tree in state["exchanges"]:
            vars(self._at(j)).update(trees.load(None, tree))
