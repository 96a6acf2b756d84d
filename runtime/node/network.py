"""The links of a gossip run: a topology; some messages are lost, some nodes are away."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.randomness import Streams, rng
from offbeat.runtime.experiment.checks import dropping, of_links, refuse
from offbeat.topologies import Topology
from offbeat.workers.fleet import Fleet

KEPT_ROUNDS = 64
MOST_PADDED = 4  # entries of a table of neighbours, for each neighbour
NOTHING: Any = 0.0  # what is mixed on a channel before anything is published


@dataclass(frozen=True)
class RoundGraph:
    """Who hears whom in one round: m messages, and the weights.

    Args:
        matrix: ``[n, n]``; the weights of links that fail are back on the diagonal.
        src, dst, weight: ``[m]``, of the messages that are sent, by dst.
        through: ``[m]``, those that are received; None for all.
        reach: ``[n]``, to how many each node sends, if to more than hear it now.
    """

    matrix: sparse.csr_array
    src: NDArray
    dst: NDArray
    weight: NDArray
    through: NDArray | None = None
    reach: NDArray | None = None

    @cached_property
    def out(self) -> NDArray:
        """``[n]``: how many messages each node sends."""
        if self.reach is not None:
            return self.reach
        return np.bincount(self.src, minlength=self.matrix.shape[0])

    @cached_property
    def messages(self) -> int:
        """How many all send together."""
        return int(self.out.sum())

    def alike(self, size: int) -> NDArray:
        """``[n]``: bytes that each sends if all messages have ``size``; made once."""
        if size not in self._alike:
            self._alike[size] = size * self.out
        return self._alike[size]

    @cached_property
    def _alike(self) -> dict[int, NDArray]:
        return {}

    @cached_property
    def _count(self) -> NDArray:
        return np.bincount(self.dst, minlength=self.matrix.shape[0])

    @cached_property
    def _heard(self) -> NDArray:
        """``[most, n]``: whom each node hears; n stands for nobody."""
        n, count = self.matrix.shape[0], self._count
        first = np.cumsum(count) - count
        heard = np.full((count.max(initial=0), n), n)
        for place, row in enumerate(heard):
            more = count > place
            row[more] = self.src[first[more] + place]
        return heard

    def latest(self, time_s: NDArray, sent_s: NDArray) -> NDArray:
        """``[n]``: ``time_s``, or the last ``sent_s`` of whom each hears, if that is later."""
        most = int(self._count.max(initial=0))
        if most * len(time_s) > MOST_PADDED * (len(self.dst) + len(time_s)):  # there is a hub
            latest = time_s.copy()
            np.maximum.at(latest, self.dst, sent_s[self.src])
            return latest
        if most * len(time_s) > len(self.dst):
            sent_s = np.append(sent_s, -np.inf)
        latest = np.maximum.reduce(sent_s.take(self._heard), axis=0, initial=-np.inf)
        return np.maximum(time_s, latest)

    def received(self, x: NDArray) -> NDArray:
        """``x [m, ...]`` of the messages that are received."""
        return x if self.through is None else x[self.through]


class Network:
    """Answers who hears whom in each round.

    Args:
        topology: who would, and with what weight.
        fleet: how many messages are lost, and whether nodes sit rounds out.
        method: what has to bear it.
        seed: of the losses.
        asynchronous: whether nodes exchange in pairs, at their own pace.

    Raises:
        ConfigError: the method does not suit the topology, or cannot bear the losses.
    """

    def __init__(
        self,
        topology: Topology,
        fleet: Fleet,
        method: Gossip,
        seed: int,
        asynchronous: bool = False,
    ) -> None:
        refuse(of_links(topology, fleet, method, asynchronous))
        self.topology, self.loss, self._pushes = topology, fleet.loss, method.pushes
        self._asynchronous = asynchronous
        self.dropping = dropping(fleet)
        self.fixed = topology.period == 1 and not self.loss and not self.dropping
        self._streams = Streams(seed, "loss", topology.n)
        self._whole = lru_cache(maxsize=min(topology.period or 1, KEPT_ROUNDS))(self._round)

    def round(self, k: int, present: NDArray | None = None) -> RoundGraph:
        """Round ``k`` among the nodes ``present [n]`` (a mask; None for all)."""
        whole = self.whole(k)
        if not self.loss and present is None:
            return whole
        n, src, dst, weight = self.topology.n, whole.src, whole.dst, whole.weight
        diagonal = whole.matrix.diagonal()
        if present is not None:
            there = present[src] & present[dst]
            # Who keeps a weight that goes nowhere: the giver of a share, the taker of an average.
            owner = src if self._pushes else dst
            np.add.at(diagonal, owner[~there], weight[~there])
            src, dst, weight = src[there], dst[there], weight[there]
        through = np.ones(len(src), bool)
        if self.loss:
            through = self._arrives(k, src, dst)
            if not self._pushes:
                through &= self._arrives(k, dst, src)  # paired: both ways, or neither
                np.add.at(diagonal, dst[~through], weight[~through])
        place = (
            np.concatenate([dst[through], np.arange(n)]),
            np.concatenate([src[through], np.arange(n)]),
        )
        values = np.concatenate([weight[through], diagonal])
        matrix = sparse.csr_array(sparse.coo_array((values, place), shape=(n, n)))
        return RoundGraph(matrix, src, dst, weight, through)

    def whole(self, k: int) -> RoundGraph:
        """Round ``k`` if nothing is lost and nobody away."""
        return self._whole(k if self.topology.period is None else k % self.topology.period)

    def place(self, k: int) -> int:
        """A round that is as ``k`` is to who sees all losses; the same of many, where many are."""
        if self._asynchronous or not self.loss:
            return k if self.topology.period is None else k % self.topology.period
        return k

    def seen(self, k: int) -> RoundGraph:
        """Round ``k`` as its nodes see it: between asynchronous ones, losses are of exchanges."""
        return self.whole(k) if self._asynchronous else self.round(k)

    def arrives(self, k: int, src: int, dst: int) -> bool:
        """Whether message ``k`` from ``src`` to ``dst`` is not lost."""
        return not self.loss or bool(self._arrives(k, np.array([src]), np.array([dst]))[0])

    def _round(self, k: int) -> RoundGraph:
        matrix = self.topology.matrix(k)
        coo = matrix.tocoo(copy=False)  # by rows, as dst is to be
        other = coo.row != coo.col
        return RoundGraph(matrix, coo.col[other], coo.row[other], coo.data[other])

    def _arrives(self, k: int, src: NDArray, dst: NDArray) -> NDArray:
        """Whether the message of round ``k`` over each link is not lost."""
        if not len(src):
            return np.zeros(0, bool)
        address = np.int64(k) * self.topology.n + dst
        return self._streams.uniform(src, address, 1)[:, 0] >= self.loss


class Uplink:
    """When what one node sends arrives: its link sends one message after the other.

    Args:
        fleet: its latency, bandwidth and jitter.
        seed: of the run.
        i: the node.
    """

    def __init__(self, fleet: Fleet, seed: int, i: int) -> None:
        self._fleet, self._seed, self._i = fleet, seed, i
        self._free_s = 0.0  # until when what it sends keeps its link busy
        self._serials: dict[int, int] = {}  # to whom -> of the next message

    def serial(self, to: int) -> int:
        """The number of the message at hand among those to this node."""
        serial = self._serials.get(to, 0)
        self._serials[to] = serial + 1
        return serial

    def delay_s(self, now_s: float, to: int, nbytes: int, serial: int) -> float:
        """Seconds until a message of ``nbytes`` that is sent now is there."""
        fleet = self._fleet
        delay_s = fleet.latency_s
        if fleet.bandwidth:
            self._free_s = max(self._free_s, now_s) + nbytes / fleet.bandwidth
            delay_s += self._free_s - now_s
        if fleet.jitter_s:
            at = self._i * fleet.workers + to
            delay_s += rng(self._seed, "message jitter", at, serial).exponential(fleet.jitter_s)
        return delay_s

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"free_s": self._free_s, "serials": [[j, k] for j, k in self._serials.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        self._free_s = state["free_s"]
        self._serials = {j: k for j, k in state["serials"]}
