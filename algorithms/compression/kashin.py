"""Kashin: dither spread-out coefficients in a redundant frame, where no number stands out.

Safaryan, Shulgin, Richtarik, Uncertainty principle for communication compression in distributed
and federated learning and the search for an optimal compressor, 2022 (arXiv:2002.08958); the
iteration is Lyubarskii and Vershynin's (arXiv:math/0611343).

U [d, N], U U^T = I, is d random rows of a Hadamard matrix over sqrt(N), with random signs of x's
entries: both are drawn anew for each message, and their seed travels.  Find a with U a = x and
max |a_j| small,

    M = ||y|| / sqrt(delta N),  y = x;   b = U^T y,  c = clip(b, -M, M),  a += c,  y -= U c,
    M *= eta, ...;   at last a += U^T y,

dither a to s levels of its max-norm m, and read U Q(a).  The last step makes U a = x for every x,
so that it is unbiased; columns of U have the squared length d / N and the coefficients' errors are
independent, at most (m / 2 s)^2 each, so that

    E ||U Q(a) - x||^2 <= d E m^2 / (4 s^2).

With K^2 = N m^2 / ||x||^2 that is K^2 d / (4 s^2 N), whatever d is if K is; K = 1.8 is measured
for Gaussians and N = 2 d, an error of 0.25.  That K is bounded for this U, and the paper's closed
form of omega, are UNVERIFIED.  What is proven: if the iteration does worse than a = U^T x, this is
taken, for which Hoeffding's inequality has P(|a_j| > t) <= 2 exp(-t^2 N / 2 ||x||^2), so that
E m^2 <= 2 (1 + ln 2 N) ||x||^2 / N; and m^2 <= d ||x||^2 / N always.  omega follows from these.
"""

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.compression.coding import BitReader, subsets, words
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    MOST_NESTING,
    Coded,
    Compressor,
    Message,
    codec,
    nested,
    overflow,
)
from offbeat.algorithms.compression.dithering import MOST_LEVELS, Dithering, Levels
from offbeat.runtime.base.errors import PeerError

DELTA, ETA, STEPS = 1.3, 0.5, 12  # the best measured for N = 2 d, of Gaussians from 64 to 16,384
MOST_REDUNDANCY = 4.0  # a frame has N < 8 d at most


def hadamard(x: NDArray) -> NDArray:
    """``x [N]`` times the Hadamard matrix, N a power of two, by additions in one fixed order."""
    half = len(x) // 2
    one, two = x.copy(), np.empty_like(x)
    for _ in range(half.bit_length()):
        np.add(one[0::2], one[1::2], out=two[:half])
        np.subtract(one[0::2], one[1::2], out=two[half:])
        one, two = two, one
    return one


class _Frame:
    """U and U^T."""

    def __init__(self, seed: NDArray[np.uint64], d: int, size: int, dtype: np.dtype) -> None:
        draws = words(~seed, (d + 63) // 64).astype("<u8").view(np.uint8)
        bits = np.unpackbits(draws, count=d, bitorder="little")
        self.signs = np.where(bits, 1, -1).astype(dtype) * dtype.type(size**-0.5)
        # Any rows: the first would make one half of the coefficients a copy of the other.
        self.rows, self.size = subsets(seed, size, d)[0], size

    def synthesis(self, a: NDArray) -> NDArray:
        """U a."""
        return hadamard(a)[self.rows] * self.signs

    def analysis(self, x: NDArray) -> NDArray:
        """U^T x."""
        a = np.zeros(self.size, x.dtype)
        a[self.rows] = x * self.signs
        return hadamard(a)


@codec(14)
class Framed(Coded):
    """A seed, and a message of coefficients."""

    def __init__(self, d: int, seed: NDArray[np.uint64], inner: Message) -> None:
        super().__init__(1, d, inner.dtype)
        self.seed, self.inner = seed, inner  # [1]

    def _rows(self) -> NDArray:
        frame = _Frame(self.seed, self.d, self.inner.d, self.dtype)
        return frame.synthesis(self.inner._rows()[0])[None]

    def _sizes(self) -> NDArray[np.int64]:
        return 8 + self.inner.sizes

    def _payloads(self) -> list[bytes]:
        return [self.seed.astype("<u8").tobytes() + self.inner.encode()[0]]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        seed = source.array("<u8", 1).astype(np.uint64)
        # Coefficients nest nothing: frames in frames would each have eight times as many.
        deepest = max(depth, MOST_NESTING - 1)
        inner = nested(source, deepest, dtype, int(2 * MOST_REDUNDANCY) * d)
        if inner.d < d or inner.d & (inner.d - 1):
            raise PeerError(f"a frame has {inner.d} coefficients of {d} numbers, no power of two")
        return cls(d, seed, inner)


class Kashin(Compressor):
    """Dithered coefficients."""

    batched = False
    depth = 1

    def __init__(self, s: int, redundancy: float) -> None:
        self.s, self.redundancy, self.inner = s, redundancy, Dithering(s, "max")

    def size(self, d: int) -> int:
        """N: the power of two from redundancy d on."""
        return 1 << (math.ceil(self.redundancy * d) - 1).bit_length()

    def omega(self, d: int) -> float:
        """min(2 (1 + ln 2 N), d) d / (4 s^2 N)."""
        n = self.size(d)
        return min(2 * (1 + math.log(2 * n)), d) * d / (4 * self.s**2 * n)

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        (row,) = x
        d, n = len(row), self.size(len(row))
        seed = rng.integers(2**64, size=(1,), dtype=np.uint64)
        top = np.abs(row).max()
        y = row / (top or 1)  # squares of large numbers could be too large
        frame = _Frame(seed, d, n, x.dtype)
        plain = b = frame.analysis(y)
        a = np.zeros_like(b)
        most = np.sqrt(np.vecdot(y, y) / x.dtype.type(DELTA * n))
        for _ in range(STEPS):
            c = np.clip(b, -most, most)
            a += c
            y -= frame.synthesis(c)
            b = frame.analysis(y)
            most *= x.dtype.type(ETA)
        a += b
        if np.abs(a).max() > np.abs(plain).max():
            a = plain
        levels = self.inner._compress(a[None], rng)
        assert isinstance(levels, Levels)
        levels.scale = levels.scale * top
        overflow(self, levels.scale * x.dtype.type(n))  # which bounds every sum
        return Framed(d, seed, levels)


@COMPRESSORS.register("kashin")
def kashin(
    s: Annotated[int, Field(ge=1, le=MOST_LEVELS)] = 1,
    *,
    redundancy: Annotated[float, Field(ge=1, le=MOST_REDUNDANCY, allow_inf_nan=False)] = 2.0,
) -> Kashin:
    """Dithering to ``s`` levels in a frame of ``redundancy`` d or more coefficients, unbiased."""
    return Kashin(s, redundancy)
