"""Numbers of 16 bits: bfloat16 and float16, rounded to nearest even.

bf16 has the exponents of a float32 and 8 bits of precision: a relative error of 2^-9 (2^-8 for a
float64, rounded twice), so alpha >= 1 - 2^-16.  Denormal float32 keep fewer bits; a float64 must
fit a float32.  fp16 has 11 bits of precision and few exponents: each row is scaled by a power of
two that puts its largest magnitude in [2^14, 2^15), and what is 2^-29 of that or less keeps fewer
bits; alpha >= 1 - 2^-20.  Follow a sparsifier with either by ``compose``.
"""

from typing import Any

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
    overflow,
)
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.tensors import dtype_of, fetch, is_tensor, library, load

_LARGEST = 0x7F7F  # of bfloat16, as bits


@codec(6)
class BFloat(Coded):
    """The upper halves of float32."""

    def __init__(self, upper: NDArray[np.uint16], dtype: np.dtype) -> None:
        super().__init__(upper.shape[0], upper.shape[1], dtype)
        self.upper = upper  # [n, d]

    def _rows(self) -> NDArray:
        return (self.upper.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(self.dtype)

    def _there(self, device: Any) -> Any:
        upper = load(self.upper.view(np.int16), device)
        lib = library(upper)
        return upper.view(lib.bfloat16).to(getattr(lib, self.dtype.name))

    def _sizes(self) -> int:
        return 2 * self.d

    def _payloads(self) -> list[Frame]:
        return [row.data for row in self.upper.astype("<u2", copy=False)]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        upper = source.array("<u2", d).astype(np.uint16)
        if (upper & 0x7FFF > _LARGEST).any():
            raise PeerError("a frame carries a number that is not finite")
        return cls(upper[None], dtype)


class BF16(Compressor):
    """bfloat16."""

    draws = False
    apart = True

    def alpha(self, d: int) -> float:
        """1 - 2^-16."""
        return 1 - 2.0**-16

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        if is_tensor(x):
            single = x.float()
            overflow(self, single)
            short = single.bfloat16()
            rounded = short.view(library(x).int16) - short.isinf().short()  # see below
            return BFloat(fetch(rounded).view(np.uint16), dtype_of(x))
        single = x.astype(np.float32, copy=False)
        overflow(self, single)
        bits = single.view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        even += np.uint32(0x7FFF)
        even += bits
        upper = (even >> np.uint32(16)).astype(np.uint16)
        # What would round to infinity stays the largest number: still within 2^-9.
        upper[upper & 0x7FFF > _LARGEST] -= 1
        return BFloat(upper, x.dtype)


@COMPRESSORS.register("bf16")
def bf16() -> BF16:
    """bfloat16 numbers."""
    return BF16()


@codec(7)
class Half(Coded):
    """float16 numbers times a power of two a row."""

    def __init__(self, half: NDArray[np.float16], exponent: NDArray, dtype: np.dtype) -> None:
        super().__init__(half.shape[0], half.shape[1], dtype)
        self.half, self.exponent = half, exponent  # [n, d], [n] int16

    def _rows(self) -> NDArray:
        return np.ldexp(self.half.astype(self.dtype), self.exponent[:, None].astype(np.int32))

    def _sizes(self) -> int:
        return 2 * self.d + 2

    def _payloads(self) -> list[bytes]:
        return [
            e.astype("<i2").tobytes() + row.astype("<f2").tobytes()
            for e, row in zip(self.exponent, self.half, strict=True)
        ]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        exponent = source.array("<i2", 1).astype(np.int16)
        half = source.array("<f2", d).astype(np.float16)
        with np.errstate(over="ignore"):
            top = np.ldexp(np.abs(half).max(initial=0).astype(dtype), exponent.astype(np.int32))
        if not np.isfinite(top).all():
            raise PeerError("a frame carries a number that is not finite")
        return cls(half[None], exponent, dtype)


class FP16(Compressor):
    """float16 in a row's own range."""

    draws = False

    def alpha(self, d: int) -> float:
        """1 - 2^-20."""
        return 1 - 2.0**-20

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        _, e = np.frexp(np.abs(x).max(axis=-1))  # the largest is in [2^(e-1), 2^e)
        e = e.astype(np.int32) - 15
        half = np.ldexp(x, -e[:, None]).astype(np.float16)
        # The largest float32 rounds up to infinity's exponent, where fp16 has room and x has none.
        top = np.ldexp(np.abs(half).max(axis=-1).astype(x.dtype), e)
        half[~np.isfinite(top)] = np.clip(half[~np.isfinite(top)], -32752, 32752)
        return Half(half, e.astype(np.int16), x.dtype)


@COMPRESSORS.register("fp16")
def fp16() -> FP16:
    """float16 numbers in each row's own range."""
    return FP16()
