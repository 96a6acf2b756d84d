"""Messages that keep some of the coordinates, and the base of what makes them.

A sparse message is a set of indices and a message of the values at them, so that any compressor
can follow a sparsifier.
"""

from abc import abstractmethod
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.compression.coding import (
    BitReader,
    read_support,
    subsets,
    support_sizes,
    write_support,
)
from offbeat.algorithms.compression.contract import Coded, Compressor, Message, codec, nested
from offbeat.algorithms.compression.identity import Dense
from offbeat.runtime.base.tensors import fetch, is_tensor, load

Kept = (
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
)  # k as a count (1) or as a share of d (0.01)


def count(kept: int | float, d: int) -> int:
    """k of d: at least 1, at most d."""
    return min(kept if isinstance(kept, int) else max(1, round(kept * d)), d)


def _flat(index: NDArray, d: int) -> NDArray:
    n = len(index)
    return index + np.arange(0, n * d, d)[:, None] if n > 1 else index


def gather(x: Any, index: Any) -> NDArray:
    """The values ``[n, k]``, here, of ``x [n, d]`` at ``index [n, k]``, here or beside x."""
    if is_tensor(x):
        return fetch(x.gather(1, index if is_tensor(index) else load(index, x.device)))
    return np.take(x, _flat(index, x.shape[1]))


def scatter(index: NDArray, values: NDArray, d: int) -> NDArray:
    """``[n, d]``: zeros, and ``values [n, k]`` at ``index [n, k]``."""
    n, _ = index.shape
    out = np.zeros(n * d, values.dtype)
    out[_flat(index, d)] = values
    return out.reshape(n, d)


def scatter_there(index: NDArray, values: Any, d: int) -> Any:
    """The same as a tensor, where the tensor ``values`` is."""
    out = values.new_zeros(len(values), d)
    return out.scatter_(1, load(index, values.device), values)


@codec(1)
class Sparse(Coded):
    """Values at sorted indices."""

    def __init__(self, d: int, index: NDArray, values: Message) -> None:
        super().__init__(len(index), d, values.dtype)
        self.index, self.values = index, values  # [n, k], n rows of k

    def _rows(self) -> NDArray:
        return scatter(self.index, self.values._rows(), self.d)

    def _there(self, device: Any) -> Any:
        return scatter_there(self.index, self.values._there(device), self.d)

    def _sizes(self) -> NDArray[np.int64]:
        return support_sizes(self.index, self.d) + self.values.sizes

    def _payloads(self) -> list[bytes]:
        pairs = zip(self.index, self.values.encode(), strict=True)
        # The inner header, which says k, comes first.
        return [inner + write_support(index, self.d) for index, inner in pairs]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        values = nested(source, depth, dtype, d)
        return cls(d, read_support(source, d, values.d)[None], values)


@codec(2)
class Seeded(Coded):
    """Values at indices that both ends draw from a seed of 8 bytes."""

    def __init__(
        self, d: int, seeds: NDArray, values: Message, index: NDArray | None = None
    ) -> None:
        super().__init__(len(seeds), d, values.dtype)
        self.seeds, self.values, self._index = seeds, values, index  # seeds [n] uint64

    @property
    def index(self) -> NDArray:
        """``[n, k]``, drawn when first asked for: a short frame may stand for many."""
        if self._index is None:
            self._index = subsets(self.seeds, self.d, self.values.d)
        return self._index

    def _rows(self) -> NDArray:
        return scatter(self.index, self.values._rows(), self.d)

    def _there(self, device: Any) -> Any:
        return scatter_there(self.index, self.values._there(device), self.d)

    def _sizes(self) -> NDArray[np.int64]:
        return 8 + self.values.sizes

    def _payloads(self) -> list[bytes]:
        pairs = zip(self.seeds.astype("<u8"), self.values.encode(), strict=True)
        return [seed.tobytes() + inner for seed, inner in pairs]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        seed = source.array("<u8", 1).astype(np.uint64)
        return cls(d, seed, nested(source, depth, dtype, d))


class Sparsifier(Compressor):
    """Keeps coordinates; ``values`` says what becomes of them on the way."""

    depth = 1
    apart = True  # kept values are fetched, and are compressed here in turn

    @abstractmethod
    def kept(self, d: int) -> int:
        """The most coordinates it keeps."""

    @abstractmethod
    def sparsify(self, x: Any, rng: np.random.Generator, values: Compressor | None) -> Message:
        """The message of ``x [n, d]``, its kept values compressed in turn by ``values``."""

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        return self.sparsify(x, rng, None)


def carry(values: NDArray, by: Compressor | None, rng: np.random.Generator) -> Message:
    """The message of kept ``values [n, k]``."""
    if by is None or values.shape[1] == 0:
        return Dense(values)
    return by._compress(values, rng)
