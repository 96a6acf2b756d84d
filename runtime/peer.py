"""One node of a gossip run, with its own vectors ``[d]`` and only what neighbours tell it.

It computes what one row of ``runtime.stacked`` computes.  A round: ``outbox`` answers what to send
to each node that hears this one, ``inbox`` takes what came, then the method's ``ask`` and ``tell``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip import Channel, Gossip
from offbeat.runtime.randomness import rng
from offbeat.runtime.stacked import NOTHING, Round

Mail = dict[int, list[Any]]
"""Node -> one item a channel: a vector, a running total, or None."""


class Links:
    """What one node sees of a round.

    Args:
        now: the round of all nodes.
        node: whose view it is.
    """

    def __init__(self, now: Round, node: int) -> None:
        got = np.ones(len(now.src), bool) if now.through is None else now.through
        out, back = now.src == node, now.dst == node
        self.hears: list[int] = now.dst[out].tolist()
        """To whom messages are sent, whether they arrive or not."""
        # Plain numbers: numpy's own would make single precision double.
        weight = now.weight
        self.gives = _pairs(now.dst, weight, out & got)
        """The weights with which others take this node's vector."""
        self.shares = _pairs(now.dst, weight, out)
        """The same, of messages that are lost, too."""
        self.takes = _pairs(now.src, weight, back & got)
        """The weights with which this node takes theirs."""
        self.own = float(now.matrix.diagonal()[node])


def _pairs(node: NDArray, weight: NDArray, which: NDArray) -> dict[int, float]:
    return dict(zip(node[which].tolist(), weight[which].tolist(), strict=True))


class End(ABC):
    """One node's end of a channel."""

    def start(self, value: NDArray) -> None:
        """Publish what all nodes know."""
        self.publish(value)

    value: Any
    """What was published last, ``[d]``."""

    @abstractmethod
    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""

    @abstractmethod
    def send(self, links: Links) -> dict[int, Any]:
        """What goes to each of ``links.hears``."""

    @abstractmethod
    def receive(self, links: Links, got: Mapping[int, Any]) -> None:
        """What came from each of ``links.takes``."""

    @abstractmethod
    def mix(self) -> NDArray:
        """See ``Node``, or what was kept and arrived of what was pushed."""


class Values(End):
    """What is published is sent as it is, or compressed without memory."""

    def __init__(self, squeeze: Any) -> None:
        self._squeeze = squeeze
        self.count = 0
        self.value: Any = None
        self.mixed: Any = NOTHING

    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""
        self.value = self._squeeze(value, self.count)
        self.count += 1
        return self.value

    def send(self, links: Links) -> dict[int, Any]:
        """See ``End``."""
        return dict.fromkeys(links.hears, self.value)

    def receive(self, links: Links, got: Mapping[int, Any]) -> None:
        """See ``End``."""
        if self.value is not None:
            self.mixed = sum(
                (w * got[j] for j, w in links.takes.items()), (links.own - 1) * self.value
            )

    def mix(self) -> NDArray:
        """See ``Node``."""
        return self.mixed


class Sum(End):
    """Compressed differences on a fixed graph: h, and s = sum_j w_ij h_j.  Two vectors, any degree.

    Every message that is published is sent once to all, and changes s at both ends.
    """

    def __init__(self, squeeze: Any, damping: float) -> None:
        self._squeeze, self._damping = squeeze, damping
        self.count = 0
        self.h: Any = None
        self.s: Any = None
        self.q: Any = None  # the message that is on its way
        self.mixed: Any = NOTHING

    def start(self, value: NDArray) -> None:
        """See ``End``."""
        self.h = self.s = value

    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""
        if self.h is None:
            self.h = self.s = np.zeros_like(value)
        self.q = self._squeeze(value - self.h, self.count)
        self.count += 1
        return self.h + self.q

    def send(self, links: Links) -> dict[int, Any]:
        """See ``End``."""
        return dict.fromkeys(links.hears, self.q)

    def receive(self, links: Links, got: Mapping[int, Any]) -> None:
        """See ``End``."""
        if self.q is None:
            self.mixed = NOTHING if self.h is None else self.s - self.h
            return
        total = sum((w * got[j] for j, w in links.takes.items()), links.own * self.q)
        self.mixed = self.s + total - self.h - self.q
        self.h, self.s = self.h + self._damping * self.q, self.s + self._damping * total
        self.q = None

    def mix(self) -> NDArray:
        """See ``Node``."""
        return self.mixed


class Copies(End):
    """Compressed differences a link: what went over it, out and in.  Two vectors a neighbour."""

    def __init__(self, squeeze: Any) -> None:
        self._squeeze = squeeze
        self.count = 0
        self.value: Any = None
        self.out: dict[int, NDArray] = {}
        self.back: dict[int, NDArray] = {}
        self.sent: dict[int, NDArray] = {}
        self.mixed: Any = NOTHING

    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""
        self.value = value
        return value

    def send(self, links: Links) -> dict[int, Any]:
        """See ``End``."""
        if self.value is None:
            return dict.fromkeys(links.hears)
        for j in links.hears:
            h = self.out.setdefault(j, np.zeros_like(self.value))
            self.sent[j] = self._squeeze(self.value - h, self.count, j)
        self.count += 1
        return {j: self.sent[j] for j in links.hears}

    def receive(self, links: Links, got: Mapping[int, Any]) -> None:
        """See ``End``."""
        if self.value is None:
            return
        self.mixed = np.zeros_like(self.value)
        for j, weight in links.gives.items():
            self.out[j] = self.out[j] + self.sent[j]
            self.mixed = self.mixed - weight * self.out[j]
        for j, weight in links.takes.items():
            self.back[j] = self.back.get(j, 0) + got[j]
            self.mixed = self.mixed + weight * self.back[j]
        self.sent = {}

    def mix(self) -> NDArray:
        """See ``Node``."""
        return self.mixed


class Totals(End):
    """Shares given away, as running totals, so that a later message makes up for a lost one."""

    def __init__(self) -> None:
        self.value: Any = None
        self.given: dict[int, NDArray] = {}
        self.taken: dict[int, NDArray] = {}
        self.arrived: Any = None

    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""
        self.value = value
        return value

    def send(self, links: Links) -> dict[int, Any]:
        """See ``End``."""
        for j, share in links.shares.items():
            self.given[j] = self.given.get(j, 0) + share * self.value
        return {j: self.given[j] for j in links.hears}

    def receive(self, links: Links, got: Mapping[int, Any]) -> None:
        """See ``End``."""
        self.arrived = links.own * self.value
        for j in links.takes:
            self.arrived = self.arrived + got[j] - self.taken.get(j, 0)
            self.taken[j] = got[j]

    def mix(self) -> NDArray:
        """What was kept and what arrived."""
        return self.arrived


class Peer:
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
            return Values(lambda value, count: value)
        if not channel.memory:
            return Values(squeeze)
        return Sum(squeeze, channel.damping) if fixed else Copies(squeeze)

    def _squeezer(self, compressor: Compressor, purpose: str) -> Any:
        def squeeze(value: NDArray, index: int, to: int | None = None) -> NDArray:
            node = self._i if to is None else self._i * self._n + to
            generator = rng(self._seed, purpose, node, index) if compressor.draws else None
            return compressor.compress(value, generator).dense()

        return squeeze

    def mix(self, channel: str) -> NDArray:
        """See ``Node``."""
        return self._ends[channel].mix()

    def publish(self, channel: str, value: NDArray) -> NDArray:
        """See ``Node``."""
        if self._starting:
            self._ends[channel].start(value)
            return value
        return self._ends[channel].publish(value)

    def average(self, channel: str) -> NDArray:
        """See ``Node``."""
        end = self._ends[channel]
        return end.value + end.mix()

    push, pushed = publish, mix

    def begun(self) -> None:
        """From now on, what is published has to be sent."""
        self._starting = False

    def outbox(self, links: Links) -> Mail:
        """What goes to whom this round."""
        self.begun()
        sent = [end.send(links) for end in self._ends.values()]
        return {j: [items[j] for items in sent] for j in links.hears}

    def inbox(self, links: Links, mail: Mail) -> None:
        """What came this round, of which ``links.takes`` says what counts."""
        for place, end in enumerate(self._ends.values()):
            end.receive(links, {j: mail[j][place] for j in links.takes})
