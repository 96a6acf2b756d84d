"""What a gossip node wants done: messages that are to be sent, jobs that are to be computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.contract import HEADER
from offbeat.runtime.node.channels import CodedVector, Item, Spoken, nbytes

WEIGHT_BYTES = HEADER + 8


class Send:
    """A message: ``kind`` and ``number`` (of the round or exchange) say what the items are.

    Args:
        to: whom.
        kind, number: see above.
        items: one a channel.
        spoken: the same as they are read, which saves who is in this process the reading.
        weight: of the exchange that is offered; it travels before the items.
    """

    __slots__ = ("_items", "_nbytes", "kind", "number", "spoken", "to", "weight")

    def __init__(
        self,
        to: int,
        kind: str,
        number: int,
        items: Sequence[Item | CodedVector] = (),
        spoken: Spoken | None = None,
        weight: float | None = None,
    ) -> None:
        self.to, self.kind, self.number, self._items = to, kind, number, items
        self.spoken, self.weight = spoken or {}, weight
        self._nbytes: int | None = None

    @property
    def items(self) -> tuple[Item, ...]:
        """What travels."""
        items = tuple(item.frame if isinstance(item, CodedVector) else item for item in self._items)
        return items if self.weight is None else (np.array([self.weight]), *items)

    @property
    def nbytes(self) -> int:
        """Bytes of its items."""
        if self._nbytes is None:
            self._nbytes = nbytes(self._items) + (0 if self.weight is None else WEIGHT_BYTES)
        return self._nbytes


class Compute(NamedTuple):
    """Job ``number`` of this node: gradients at ``points`` ([d] each), on one sample."""

    number: int
    points: tuple[NDArray, ...]


class RoundDone(NamedTuple):
    """The node has done ``round`` rounds, and its model ``[d]`` is this."""

    round: int
    model: NDArray


Effect = Send | Compute | RoundDone
