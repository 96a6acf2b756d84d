"""One node of a gossip run, with its own vectors ``[d]`` and only what neighbours tell it.

It computes what one row of ``runtime.gossip.stacked`` computes.  A round: ``outbox`` answers what
to send to each node that hears this one, ``inbox`` takes what came, then the method's ``ask`` and
``tell``.

A link may be closed and opened again.  Its ends then forget what they kept for each other, and the
first message over it says the whole copy instead of a difference.  What came over the link on a
``conserved`` channel is given back when it closes, each end what it took itself: so the sum over
the others is what they put in, whatever was under way (after the flow updating of Jesus, Baquero
and Almeida, DAIS 2009).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.compression.contract import HEADER, decode
from offbeat.algorithms.gossip import Channel, Gossip
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.tensors import finite
from offbeat.runtime.node.network import NOTHING, RoundGraph

Item = bytes | NDArray | None
"""What one channel sends over one link: a compressor's frame, a vector, or nothing."""

Spoken = dict[str, NDArray]
"""What one node says to another: a vector a channel, as who hears it then knows it."""


class CodedVector:
    """A compressed vector: the ``value`` that its receiver reads, and the message, or its frame."""

    __slots__ = ("_frame", "message", "value")

    def __init__(self, value: NDArray, message: Any = None, frame: bytes | None = None) -> None:
        self.value, self.message, self._frame = value, message, frame

    @property
    def frame(self) -> bytes:
        """The bytes that travel; they are made when they are asked for."""
        if self._frame is None:
            self._frame = self.message.encode()[0]
        return self._frame

    @property
    def nbytes(self) -> int:
        """How many."""
        return len(self.frame) if self.message is None else int(self.message.nbytes)


class Read(NamedTuple):
    """An item as it was read: ``whole`` where it is no compressed difference but all there is."""

    value: Any
    whole: bool


@dataclass
class LocalView:
    """What one node sees of a round."""

    hears: list[int]
    """To whom messages are sent, whether they arrive or not."""
    gives: dict[int, float]
    """The weights with which others take this node's vector."""
    shares: dict[int, float]
    """The same, of messages that are lost, too."""
    takes: dict[int, float]
    """The weights with which this node takes theirs."""
    own: float

    @classmethod
    def of(cls, graph: RoundGraph, node: int) -> "LocalView":
        """What ``node`` sees of the round of all nodes."""
        got = np.ones(len(graph.src), bool) if graph.through is None else graph.through
        out, back = graph.src == node, graph.dst == node
        # Plain numbers: numpy's own would make single precision double.
        return cls(
            hears=graph.dst[out].tolist(),
            gives=_pairs(graph.dst, graph.weight, out & got),
            shares=_pairs(graph.dst, graph.weight, out),
            takes=_pairs(graph.src, graph.weight, back & got),
            own=float(graph.matrix.diagonal()[node]),
        )

    def without(self, gone: Sequence[int], pushes: bool) -> "LocalView":
        """The same without some nodes: their weight is this node's own."""
        gives, shares, takes = (
            {j: weight for j, weight in weights.items() if j not in gone}
            for weights in (self.gives, self.shares, self.takes)
        )
        before, after = (self.shares, shares) if pushes else (self.takes, takes)
        own = self.own + sum(weight for j, weight in before.items() if j not in after)
        return LocalView([j for j in self.hears if j not in gone], gives, shares, takes, own)


def _pairs(node: NDArray, weight: NDArray, which: NDArray) -> dict[int, float]:
    return dict(zip(node[which].tolist(), weight[which].tolist(), strict=True))


class End(ABC):
    """One node's end of a channel; its fields without underscore are its state.

    Args:
        conserved: see ``Channel``.
    """

    def __init__(self, conserved: bool) -> None:
        self.value: Any = None  # what was published last, [d]
        self.mixed: Any = NOTHING
        # What was taken from each neighbour so far, and what is to be given back with the next mix.
        self.flow: dict[int, NDArray] | None = {} if conserved else None
        self.owed: Any = NOTHING

    def start(self, value: NDArray) -> None:
        """Publish what all nodes know."""
        self.publish(value)

    @abstractmethod
    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""

    @abstractmethod
    def send(self, links: LocalView, anew: Sequence[int]) -> dict[int, Item]:
        """What goes to each of ``links.hears``; all there is to those ``anew``."""

    @abstractmethod
    def receive(self, links: LocalView, got: Mapping[int, Read]) -> None:
        """What came from each of ``links.takes``."""

    def mix(self) -> NDArray:
        """See ``Node``, or what was kept and arrived of what was pushed."""
        return self.mixed

    def close(self, j: int) -> None:
        """The link to ``j`` is out of use: forget what stood on it."""
        if self.flow is not None:
            self.owed = self.owed - self.flow.pop(j, NOTHING)

    def fresh(self, j: int) -> None:  # noqa: B027 - most have forgotten by then
        """The node ``j`` that comes back has forgotten all."""

    def _moved(self, j: int, moved: NDArray) -> NDArray:
        if self.flow is not None:
            self.flow[j] = self.flow.get(j, NOTHING) + moved
        return moved

    def _back(self, total: NDArray) -> None:
        self.mixed = total if self.owed is NOTHING else total + self.owed
        self.owed = NOTHING

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: trees.dump(v) for key, v in vars(self).items() if not key.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        for key, tree in state.items():
            setattr(self, key, trees.load(None, tree))


class Values(End):
    """What is published is sent as it is, or compressed without memory (``squeeze``)."""

    def __init__(self, squeeze: Any, conserved: bool) -> None:
        super().__init__(conserved)
        self._squeeze = squeeze
        self.count = 0
        self.frame: Item = None  # what is sent

    def start(self, value: NDArray) -> None:
        if self._squeeze is None:
            self.value = value
        else:
            self.publish(value)

    def publish(self, value: NDArray) -> NDArray:
        if self._squeeze is None:
            self.value = self.frame = value
        else:
            self.value, self.frame = self._squeeze(value, self.count)
        self.count += 1
        return self.value

    def send(self, links: LocalView, anew: Sequence[int]) -> dict[int, Item]:
        return dict.fromkeys(links.hears, self.frame)

    def receive(self, links: LocalView, got: Mapping[int, Read]) -> None:
        if self.value is None:
            return
        total = NOTHING
        if self.frame is not None:  # else all start alike
            for j, weight in links.takes.items():
                if got[j].value is not None:
                    moved = got[j].value - self.value
                    moved *= weight
                    self._moved(j, moved)
                    total = moved if total is NOTHING else np.add(total, moved, out=total)
        self._back(total)


class Public(End):
    """Compressed differences on a fixed graph: the public copies of this node and its neighbours.

    Every message that is published goes to all, and changes the copy at every end alike.
    """

    def __init__(self, squeeze: Any, channel: Channel) -> None:
        super().__init__(channel.conserved)
        self._squeeze, self._damping = squeeze, channel.damping
        self.count = 0
        self.first: Any = NOTHING  # the copy of whoever has not said more
        self.h: Any = None
        self.q: Any = None  # the message that is on its way
        self.frame: Item = None
        self.copies: dict[int, Any] = {}

    def start(self, value: NDArray) -> None:
        self.h = self.first = value

    def publish(self, value: NDArray) -> NDArray:
        if self.h is None:
            self.h = np.zeros_like(value)
        self.q, self.frame = self._squeeze(value - self.h, self.count)
        self.count += 1
        return self.h + self.q

    def send(self, links: LocalView, anew: Sequence[int]) -> dict[int, Item]:
        sent: dict[int, Item] = dict.fromkeys(links.hears, self.frame)
        if self.q is not None:
            sent |= {j: self.h + self._damping * self.q for j in anew}
        return sent

    def receive(self, links: LocalView, got: Mapping[int, Read]) -> None:
        total = NOTHING if self.q is None else np.zeros_like(self.q)
        for j, weight in links.takes.items():
            q, whole = got[j]
            if q is None:
                continue
            if whole:
                self.copies[j] = says = q
            else:
                h = self.copies.get(j, self.first)
                says, self.copies[j] = h + q, h + self._damping * q
            if self.q is not None:
                total += self._moved(j, weight * (says - self.h - self.q))
        self._back(total)
        if self.q is not None:
            self.h = self.h + self._damping * self.q
            self.q = self.frame = None

    def close(self, j: int) -> None:
        super().close(j)
        self.copies[j] = NOTHING


class Copies(End):
    """Compressed differences a link: what went over it, out and in.  Two vectors a neighbour."""

    def __init__(self, squeeze: Any, conserved: bool) -> None:
        super().__init__(conserved)
        self._squeeze = squeeze
        self.count = 0
        self.out: dict[int, NDArray] = {}
        self.back: dict[int, NDArray] = {}
        self.sent: dict[int, NDArray] = {}  # their copies after the messages that are on their way

    def publish(self, value: NDArray) -> NDArray:
        self.value = value
        return value

    def send(self, links: LocalView, anew: Sequence[int]) -> dict[int, Item]:
        items: dict[int, Item] = dict.fromkeys(links.hears)
        if self.value is None:
            return items
        for j in links.hears:
            if j in anew:
                self.sent[j] = items[j] = self.value
                continue
            h = self.out.get(j)
            q, items[j] = self._squeeze(self.value if h is None else self.value - h, self.count, j)
            self.sent[j] = q if h is None else h + q
        self.count += 1
        return items

    def receive(self, links: LocalView, got: Mapping[int, Read]) -> None:
        sent, self.sent = self.sent, {}
        for j in links.takes:
            q, whole = got[j]
            if q is not None:
                self.back[j] = q if whole or j not in self.back else self.back[j] + q
        if self.value is None:
            return
        total = np.zeros_like(self.value)
        for j, weight in links.gives.items():
            if j in sent:
                self.out[j] = sent[j]
                if j not in got or got[j].value is not None:
                    total += self._moved(j, -weight * sent[j])
        for j, weight in links.takes.items():
            if got[j].value is not None:
                total += self._moved(j, weight * self.back[j])
        self._back(total)

    def close(self, j: int) -> None:
        super().close(j)
        for table in (self.out, self.back, self.sent):
            table.pop(j, None)


class Totals(End):
    """Shares given away, as running totals, so that a later message makes up for a lost one."""

    def __init__(self) -> None:
        super().__init__(conserved=False)
        self.given: dict[int, NDArray] = {}
        self.taken: dict[int, NDArray] = {}

    def publish(self, value: NDArray) -> NDArray:
        self.value = value
        return value

    def send(self, links: LocalView, anew: Sequence[int]) -> dict[int, Item]:
        for j, share in links.shares.items():
            self.given[j] = self.given.get(j, NOTHING) + share * self.value
        return {j: self.given[j] for j in links.hears}

    def receive(self, links: LocalView, got: Mapping[int, Read]) -> None:
        self.mixed = links.own * self.value
        for j in links.takes:
            total = got[j].value
            self.mixed = self.mixed + total - self.taken.get(j, NOTHING)
            self.taken[j] = total

    def fresh(self, j: int) -> None:
        self.given.pop(j, None)
        self.taken.pop(j, None)


class NodeChannels:
    """What a method sees as ``Node``: one of n.

    Args:
        i: its number.
        n: of how many.
        method: whose channels it uses.
        x: ``[d]``, where it starts.
        fixed: whether the weights never change.
        common: whether all start at one point.
        seed: of the run.
    """

    def __init__(
        self, i: int, n: int, method: Gossip, x: NDArray, *, fixed: bool, common: bool, seed: int
    ) -> None:
        self.x = x
        self._i, self._n, self._seed, self._starting = i, n, seed, common
        self._pushes = method.pushes
        self._ends = {
            name: self._end(name, channel, method, fixed)
            for name, channel in method.channels.items()
        }

    def __getattr__(self, field: str) -> Any:
        raise AttributeError(f"the node has no {field} yet")

    def _end(self, name: str, channel: Channel, method: Gossip, fixed: bool) -> End:
        squeeze = self._squeezer(method.compressor, f"compress {name}")
        if method.pushes:
            return Totals()
        if method.exact:
            return Values(None, channel.conserved)
        if not channel.memory:
            return Values(squeeze, channel.conserved)
        return Public(squeeze, channel) if fixed else Copies(squeeze, channel.conserved)

    def _squeezer(self, compressor: Compressor, purpose: str) -> Any:
        def squeeze(value: NDArray, index: int, to: int | None = None) -> tuple[NDArray, bytes]:
            node = self._i if to is None else self._i * self._n + to
            generator = rng(self._seed, purpose, node, index) if compressor.draws else None
            message = compressor.compress(value, generator)
            return message.dense(), message.encode()[0]

        return squeeze

    def mix(self, channel: str) -> NDArray:
        return self._ends[channel].mix()

    def publish(self, channel: str, value: NDArray) -> NDArray:
        if self._starting:
            self._ends[channel].start(value)
            return value
        return self._ends[channel].publish(value)

    def average(self, channel: str) -> NDArray:
        end = self._ends[channel]
        return end.value + end.mix()

    push, pushed = publish, mix

    def begun(self) -> None:
        """From now on, what is published has to be sent."""
        self._starting = False

    def outbox(self, links: LocalView, anew: Sequence[int] = ()) -> dict[int, list[Item]]:
        """What goes to whom this round, an item a channel; all there is to those ``anew``."""
        self.begun()
        sent = [end.send(links, anew) for end in self._ends.values()]
        return {j: [items[j] for items in sent] for j in links.hears}

    def read(self, items: Sequence[Item]) -> list[Read]:
        """What a neighbour sent; see ``read``."""
        values = [self.x if end.value is None else end.value for end in self._ends.values()]
        reads = read(items, [len(value) for value in values], self.x.dtype)
        if self._pushes and any(one.value is None for one in reads):
            raise PeerError("a share is missing")
        return reads

    def inbox(self, links: LocalView, mail: Mapping[int, Sequence[Read]]) -> None:
        """What came this round, of which ``links.takes`` says what counts."""
        for place, end in enumerate(self._ends.values()):
            end.receive(links, {j: mail[j][place] for j in links.takes})

    def close(self, j: int) -> None:
        """The link to ``j`` is out of use."""
        for end in self._ends.values():
            end.close(j)

    def fresh(self, j: int) -> None:
        """The node ``j`` has forgotten all."""
        for end in self._ends.values():
            end.fresh(j)

    def fields(self) -> dict[str, Any]:
        """The method's state."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        ends = {name: end.state() for name, end in self._ends.items()}
        return {"fields": trees.dump(self.fields()), "ends": ends, "starting": self._starting}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        self._starting = state["starting"]
        for key, value in trees.load(None, state["fields"]).items():
            setattr(self, key, value)
        for name, end in self._ends.items():
            end.restore(state["ends"][name])


def read(items: Sequence[Item], sizes: Sequence[int], dtype: np.dtype) -> list[Read]:
    """One item a channel, of these sizes.

    Raises:
        PeerError: it is not what a node of this run sends.
    """
    if len(items) != len(sizes):
        raise PeerError(f"a message has {len(items)} items, not one a channel")
    reads = []
    for item, d in zip(items, sizes, strict=True):
        if item is None:
            reads.append(Read(None, False))
            continue
        whole = isinstance(item, np.ndarray)
        value = item if isinstance(item, np.ndarray) else decode([item], d).dense()
        if value.shape != (d,) or value.dtype != dtype:
            raise PeerError(
                f"a vector is {value.dtype} of shape {list(value.shape)}, where {dtype} of shape "
                f"[{d}] is right"
            )
        if not finite(value):
            raise PeerError("a vector is not finite")
        reads.append(Read(value, whole))
    return reads


def nbytes(items: Iterable[Item | CodedVector]) -> int:
    """Bytes of a message."""
    return sum(
        item.nbytes
        if isinstance(item, CodedVector)
        else len(item)
        if isinstance(item, bytes)
        else HEADER + item.nbytes
        for item in items
        if item is not None
    )
