"""No compression: C(x) = x, alpha = 1, omega = 0; 4 d or 8 d bytes."""

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import BitReader
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Frame,
    Message,
    codec,
)


@codec(0)
class Dense(Coded):
    """Numbers as they are."""

    def __init__(self, values: NDArray) -> None:
        super().__init__(values.shape[0], values.shape[1], values.dtype)
        self.values = values  # [n, d]

    def _rows(self) -> NDArray:
        return self.values.copy()

    def _sizes(self) -> int:
        return self.d * self.dtype.itemsize

    def _payloads(self) -> list[Frame]:
        wire = self.values.astype(self.dtype.newbyteorder("<"), copy=False)
        return [row.data for row in wire]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        values = source.array(dtype.newbyteorder("<").str, d)
        return cls(values.astype(dtype, copy=False)[None])


class Identity(Compressor):
    """x."""

    draws = False

    def alpha(self, d: int) -> float:
        """1."""
        return 1.0

    def omega(self, d: int) -> float:
        """0."""
        return 0.0

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        return Dense(x.copy())


@COMPRESSORS.register("identity")
def identity() -> Identity:
    """No compression."""
    return Identity()
