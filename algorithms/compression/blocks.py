"""Block-wise: each run of B entries is compressed on its own, with its own scale.

Zheng et al., Communication-efficient distributed blockwise momentum SGD, NeurIPS 2019
(arXiv:1905.10936).  alpha and omega are the worst of the blocks', of which the last may be
shorter: 1 / B for scaled signs, whatever d is.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import BitReader
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    HEADER,
    MOST_NESTING,
    Coded,
    Compressor,
    Message,
    Stack,
    codec,
    header,
    made,
    nest,
)
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.registry import Count
from offbeat.runtime.base.tensors import joined


@codec(10)
class Blocks(Coded):
    """Messages of consecutive blocks of one row."""

    def __init__(self, parts: list[Message]) -> None:
        super().__init__(1, sum(part.n * part.d for part in parts), parts[0].dtype)
        self.parts = parts  # blocks of one size, then what is left

    def _rows(self) -> NDArray:
        return np.concatenate([part._rows().ravel() for part in self.parts])[None]

    def _there(self, device: Any) -> Any:
        return joined([part._there(device).ravel() for part in self.parts])[None]

    def _sizes(self) -> int:
        kinds = {part.d for part in self.parts}
        bare = sum(part.nbytes - part.n * HEADER for part in self.parts)
        return 4 + len(kinds) * HEADER + bare  # one header for all blocks of a size

    def _payloads(self) -> list[bytes]:
        out = [self.parts[0].d.to_bytes(4, "little")]
        last = None
        for part in self.parts:
            frames = part.encode()
            if part.d != last:
                out.append(frames[0][:HEADER])
            out += [frame[HEADER:] for frame in frames]
            last = part.d
        return [b"".join(out)]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        size = source.number("<u4")
        if not 1 <= size <= d or depth == MOST_NESTING:
            raise PeerError(f"a frame has blocks of {size} in {d} numbers, {depth} deep")
        parts: list[Message] = []
        for count, length in ((d // size, size), (1, d % size)):
            if length:
                kind, held, found = header(source, length)
                if (held, found) != (dtype, length):
                    raise PeerError(f"a frame has a block of {found} {held}, not {length} {dtype}")
                # Every block takes a byte at least, so a short frame cannot ask for many.
                parts += [kind._read(source, length, dtype, depth + 1) for _ in range(count)]
        return cls(parts)


class Blockwise(Compressor):
    """A compressor applied to blocks."""

    def __init__(self, inner: Compressor, size: int) -> None:
        self.inner, self.size = inner, size
        self.draws, self.batched, self.depth = inner.draws, False, nest(inner)
        self.apart = inner.apart

    def _worst(self, d: int) -> list[int]:
        """The sizes of blocks there are."""
        return [size for size in (min(self.size, d), d % self.size) if size]

    def alpha(self, d: int) -> float | None:
        """The least of the blocks'."""
        alphas = [self.inner.alpha(size) for size in self._worst(d)]
        return None if None in alphas else min(alphas)  # type: ignore[type-var]

    def omega(self, d: int) -> float | None:
        """The most of the blocks'."""
        omegas = [self.inner.omega(size) for size in self._worst(d)]
        return None if None in omegas else max(omegas)  # type: ignore[type-var]

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        rows: list[Message] = [self._row(row, rng) for row in x]
        return rows[0] if len(rows) == 1 else Stack(rows)

    def _row(self, x: Any, rng: np.random.Generator) -> Blocks:
        whole = len(x) - len(x) % self.size
        parts = []
        if whole:
            parts.append(self.inner._compress(x[:whole].reshape(-1, self.size), rng))
        if whole < len(x):
            parts.append(self.inner._compress(x[None, whole:], rng))
        return Blocks(parts)


@COMPRESSORS.register("blocks")
def blocks(inner: str | Compressor, size: Count = 1024) -> Blockwise:
    """A compressor applied to each block of ``size`` entries, as blocks(scaled-sign, 256)."""
    return Blockwise(made(inner), size)
