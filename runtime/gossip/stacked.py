"""All nodes of a synchronous run at once: fields are ``[n, d]``, mixing is one sparse product.

Three kinds of wire carry a channel:

* ``Broadcast``: every node tells all its neighbours the same, so there is one public copy a node,
  and mixing is H <- W H - H.  Right while W is fixed, and for channels that keep nothing.
* ``PerEdge``: both ends of a link keep what went over it in either direction, so weights may change
  and links fail: x_i gets w_ij h_ji and gives w_ji h_ij away; what one gains the other loses.
* ``Shares``: a node gives away shares of all it has; running totals make up for lost messages.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.compression.contract import HEADER
from offbeat.algorithms.gossip import Channel
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.node.network import NOTHING, RoundGraph

DENSE = 16  # nodes up to which a dense product is faster than a sparse one
OWN_STREAM = 256  # nodes up to which each has generators of its own; beyond, one draws for all
MOST_LINKS_BYTES = 2**33  # of the copies that one channel's links keep


class Product:
    """x -> W x for ``x [n, d]``; W is kept as the last call wanted it."""

    def __init__(self) -> None:
        self._of: Any = None
        self._as: Any = None

    def __call__(self, matrix: sparse.csr_array, x: NDArray) -> NDArray:
        """``[n, d]``, new."""
        if self._of is not matrix or self._as.dtype != x.dtype:
            data = matrix.data.astype(x.dtype)
            self._of = matrix  # which shares its indices: they are as large as its numbers
            self._as = sparse.csr_array((data, matrix.indices, matrix.indptr), matrix.shape)
            if matrix.shape[0] <= DENSE:
                self._as = self._as.toarray()
        return self._as @ x


def compress(
    compressor: Compressor,
    x: NDArray,
    seed: int,
    purpose: str,
    nodes: NDArray,
    index: int,
    own: bool,
) -> tuple[NDArray, NDArray]:
    """What the receivers of rows ``x [m, d]`` read, and the rows' bytes ``[m]``.

    Row r draws from the address (seed, purpose, nodes[r], index) if it has its ``own``.
    """
    generators: Any = None
    if compressor.draws and own:
        generators = [rng(seed, purpose, int(node), index) for node in nodes]
    elif compressor.draws:
        generators = rng(seed, f"{purpose} of all", 0, index)
    message = compressor.compress(x, generators)
    return message.dense(), message.sizes


class Wire(ABC):
    """One channel of all nodes; its fields without underscore are its state."""

    def start(self, value: NDArray) -> None:
        """Publish what all nodes know."""
        self.publish(value)

    @abstractmethod
    def publish(self, value: NDArray) -> NDArray:
        """See ``Node``."""

    @abstractmethod
    def exchange(self, now: RoundGraph) -> NDArray:
        """Messages travel; answers the bytes that each node sends, ``[n]``."""

    @abstractmethod
    def mix(self) -> NDArray:
        """See ``Node``, or what arrived of what was pushed."""

    def average(self) -> NDArray:
        return self.value + self.mix()

    value: Any
    """``[n, d]``: what every node published last."""

    sizes: Any = 0
    """Bytes of its message, ``[n]`` or of all, where all neighbours are sent the same."""

    def keep(self, value: NDArray, sizes: Any, nodes: NDArray) -> None:
        """Put ``nodes [n]`` (a mask) back to the ``value`` of before."""
        self.value = np.where(nodes[:, None], value, self.value)
        self.sizes = np.where(nodes, sizes, self.sizes)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: trees.dump(v) for key, v in vars(self).items() if not key.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        for key, tree in state.items():
            setattr(self, key, trees.load(getattr(self, key), tree))


class Broadcast(Wire):
    """See the module; ``exact`` channels are not compressed."""

    def __init__(
        self, compressor: Compressor, channel: Channel, exact: bool, n: int, seed: int, name: str
    ) -> None:
        self._compressor, self._channel, self._exact = compressor, channel, exact
        self._seed, self._name, self._product = seed, f"compress {name}", Product()
        self.count = 0  # of what was published
        self.value: Any = None  # [n, d], the public copies that neighbours mix with
        self.h: Any = None  # [n, d], where differences are taken to others: damped copies
        self.sizes = 0 if exact else np.zeros(n, np.int64)
        self._now: Any = None

    def start(self, value: NDArray) -> None:
        if self._channel.memory or self._exact:
            self.value = value if self._exact else value.copy()
            if self._channel.damping < 1:
                self.h = value
        else:
            self.publish(value)

    def publish(self, value: NDArray) -> NDArray:
        if self._exact:
            self.value = value
            self.sizes = HEADER + value[0].nbytes
            return value
        damped = self._channel.damping < 1
        h = self.h if damped else self.value
        if h is None:
            h = np.zeros_like(value)
        apart = value - h if self._channel.memory else value
        q, self.sizes[:] = compress(
            self._compressor,
            apart,
            self._seed,
            self._name,
            np.arange(len(value)),
            self.count,
            own=len(value) <= OWN_STREAM,
        )
        self.count += 1
        if not self._channel.memory:
            self.value = q
        elif damped:
            self.value = h + q
            self.h = h + self._channel.damping * q
        else:
            h += q
            self.value = h
        return self.value

    def exchange(self, now: RoundGraph) -> NDArray:
        self._now = now
        return now.alike(self.sizes) if isinstance(self.sizes, int) else self.sizes * now.out

    def mix(self) -> NDArray:
        if self.value is None:
            return NOTHING
        mixed = self.average()
        mixed -= self.value
        return mixed

    def average(self) -> NDArray:
        return self._product(self._now.matrix, self.value)


class Slots:
    """A row for every directed link that was ever used, in memory that grows with them."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.keys = np.empty(0, np.int64)  # src n + dst, sorted
        self.at = np.empty(0, np.int64)  # their rows

    def find(self, src: NDArray, dst: NDArray, *tables: NDArray) -> tuple[NDArray, list[NDArray]]:
        """The rows ``[m]`` of links, and ``tables`` with new rows of zeros for new links."""
        keys = src.astype(np.int64) * self._n + dst
        new = np.setdiff1d(keys, self.keys)
        grown = list(tables)
        if len(new):
            rows = len(self.keys) + np.arange(len(new))
            keys_all = np.concatenate([self.keys, new])
            order = np.argsort(keys_all)
            self.keys, self.at = keys_all[order], np.concatenate([self.at, rows])[order]
            for place, table in enumerate(tables):
                size = len(self.keys) * table.shape[1] * table.itemsize
                if size > MOST_LINKS_BYTES:
                    raise ConfigError(
                        f"the copies that {len(self.keys):,} links keep would need "
                        f"{size / 2**30:.1f} GiB a channel; take fewer nodes, a fixed graph, or "
                        'replicas = "global"'
                    )
                zeros = np.zeros((len(new), table.shape[1]), table.dtype)
                grown[place] = np.concatenate([table, zeros])
        return self.at[np.searchsorted(self.keys, keys)], grown


class PerEdge(Wire):
    """See the module."""

    def __init__(self, compressor: Compressor, n: int, seed: int, name: str) -> None:
        self._compressor, self._seed, self._name = compressor, seed, f"compress {name}"
        self.slots = Slots(n)
        self.count = 0  # of exchanges
        self.value: Any = None  # [n, d], what was published last
        self.h: Any = None  # [links, d], what went over each link so far
        self.mixed: Any = NOTHING  # [n, d]

    def publish(self, value: NDArray) -> NDArray:
        self.value = value
        return value

    def exchange(self, now: RoundGraph) -> NDArray:
        if self.value is None:
            return np.zeros_like(now.out)
        n, d = self.value.shape
        if self.h is None:
            self.h = np.zeros((0, d), self.value.dtype)
        rows, (self.h,) = self.slots.find(now.src, now.dst, self.h)
        sizes = np.zeros_like(now.out)
        if len(rows):
            q, each = compress(
                self._compressor,
                self.value[now.src] - self.h[rows],
                self._seed,
                self._name,
                now.src.astype(np.int64) * n + now.dst,
                self.count,
                own=n <= OWN_STREAM,
            )
            np.add.at(sizes, now.src, each)
            rows = now.received(rows)
            self.h[rows] += now.received(q)
        self.count += 1
        src, dst, weight = map(now.received, (now.src, now.dst, now.weight))
        weight = weight.astype(self.value.dtype)
        place = np.concatenate([dst, src]), np.concatenate([rows, rows])
        gains = sparse.coo_array((np.concatenate([weight, -weight]), place), shape=(n, len(self.h)))
        self.mixed = gains.tocsr() @ self.h
        return sizes

    def mix(self) -> NDArray:
        return self.mixed


class Shares(Wire):
    """See the module; ``lossy`` where running totals are needed."""

    def __init__(self, n: int, lossy: bool) -> None:
        self._lossy, self._product = lossy, Product()
        self.slots = Slots(n)
        self.value: Any = None  # [n, d], what was pushed last
        self.given: Any = None  # [links, d], all that was ever given over each link
        self.taken: Any = None  # [links, d], and what of it has arrived
        self.arrived: Any = None  # [n, d]

    def publish(self, value: NDArray) -> NDArray:
        self.value = value
        return value

    def exchange(self, now: RoundGraph) -> NDArray:
        sizes = (HEADER + self.value[0].nbytes) * now.out
        if not self._lossy:
            self.arrived = self._product(now.matrix, self.value)
            return sizes
        d = self.value.shape[1]
        if self.given is None:
            self.given = self.taken = np.zeros((0, d), self.value.dtype)
        rows, (self.given, self.taken) = self.slots.find(now.src, now.dst, self.given, self.taken)
        weight = now.weight.astype(self.value.dtype)[:, None]
        self.given[rows] += weight * self.value[now.src]
        self.arrived = now.matrix.diagonal().astype(self.value.dtype)[:, None] * self.value
        rows, dst = now.received(rows), now.received(now.dst)
        np.add.at(self.arrived, dst, self.given[rows] - self.taken[rows])
        self.taken[rows] = self.given[rows]
        return sizes

    def mix(self) -> NDArray:
        """What was kept and what arrived."""
        return self.arrived


class Stacked:
    """What a method sees as ``Node``: all nodes at once.

    Args:
        x: ``[n, d]``, where they start.
        wires: by channel.
        common: whether all start at one point.
    """

    def __init__(self, x: NDArray, wires: Mapping[str, Wire], common: bool) -> None:
        self.x = x
        self._wires, self._starting = wires, common

    def __getattr__(self, field: str) -> Any:
        raise AttributeError(f"the node has no {field} yet")

    def mix(self, channel: str) -> NDArray:
        return self._wires[channel].mix()

    def publish(self, channel: str, value: NDArray) -> NDArray:
        wire = self._wires[channel]
        if self._starting:
            wire.start(value)
            return value
        return wire.publish(value)

    def average(self, channel: str) -> NDArray:
        return self._wires[channel].average()

    def push(self, channel: str, value: NDArray) -> None:
        self._wires[channel].publish(value)

    def pushed(self, channel: str) -> NDArray:
        return self._wires[channel].mix()

    def exchange(self, now: RoundGraph) -> NDArray:
        """Messages travel on all channels; answers the bytes that each node sends, ``[n]``."""
        self._starting = False
        first, *more = self._wires.values()
        sent = first.exchange(now)
        for wire in more:
            sent = sent + wire.exchange(now)
        return sent

    def fields(self) -> dict[str, Any]:
        """The method's state."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def snapshot(self) -> tuple[dict[str, Any], list[Any]]:
        """What ``keep`` can put back."""
        return self.fields(), [(wire.value, np.copy(wire.sizes)) for wire in self._wires.values()]

    def keep(self, snapshot: tuple[dict[str, Any], list[Any]], nodes: NDArray) -> None:
        """Put ``nodes [n]`` (a mask) back to where they were: they have sat a round out."""
        fields, values = snapshot
        for key, old in fields.items():
            setattr(self, key, np.where(nodes[:, None], old, getattr(self, key)))
        for wire, (value, sizes) in zip(self._wires.values(), values, strict=True):
            wire.keep(value, sizes, nodes)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        wires = {name: wire.state() for name, wire in self._wires.items()}
        return {"fields": trees.dump(self.fields()), "wires": wires}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        self._starting = False
        for key, value in trees.load(None, state["fields"]).items():
            setattr(self, key, value)
        for name, wire in self._wires.items():
            wire.restore(state["wires"][name])
