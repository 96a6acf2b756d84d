"""Random dithering (QSGD): magnitudes rounded at random to s equal levels of a norm.

Alistarh et al., QSGD, NeurIPS 2017 (arXiv:1610.02132).  With u ~ U[0, 1)

    Q(x)_j = ||x|| sign(x_j) l_j / s,   l_j = floor(s |x_j| / ||x|| + u_j).

In the 2-norm omega = min(d / s^2, sqrt(d) / s).  In the max-norm (TernGrad for s = 1: Wen et al.,
NeurIPS 2017, arXiv:1705.07878)

    E ||Q(x) - x||^2 = sum_j (m |x_j| - x_j^2) <= (sqrt(d) - 1) / 2 ||x||^2,  s = 1, m = max |x_j|,

attained by one entry of 1 + sqrt(d) among ones.  More levels never add variance, and that of an
entry is at most (m / 2 s)^2, so omega = min((sqrt(d) - 1) / 2, d / (4 s^2)).

Natural dithering (Horvath et al., arXiv:1905.10988) has the levels 0, 2^(1-s), ..., 1/2, 1 of the
2-norm, and omega = 1/8 + sqrt(d) 2^(1-s) min(1, sqrt(d) 2^(1-s)).

Levels travel in the shortest of three forms: with ceil(log2(2 s + 1)) bits each; magnitudes in
Golomb-Rice code and the signs of those that are not zero; indices of those, and these.  The norm
travels in x's dtype.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.compression.coding import (
    CHUNK,
    BitReader,
    pack,
    packed_size,
    read_rice,
    read_support,
    rice_plan,
    support_plan,
    unpack,
    write_rice,
    write_support,
)
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    overflow,
    pieces,
)
from offbeat.algorithms.compression.natural import FORMS
from offbeat.runtime.base.errors import PeerError

MOST_LEVELS = 2**15 - 1
DENSE, SPARSE, RICE = 0, 1, 2


@codec(4)
class Levels(Coded):
    """A scale a row, and signed levels -s..s."""

    def __init__(self, levels: NDArray, scale: NDArray, s: int) -> None:
        super().__init__(levels.shape[0], levels.shape[1], scale.dtype)
        self.levels, self.scale, self.s = levels, scale, s  # [n, d], [n]

    @property
    def bits(self) -> int:
        """ceil(log2(2 s + 1))."""
        return (2 * self.s).bit_length()

    def _rows(self) -> NDArray:
        out = self.levels.astype(self.dtype)
        out /= self.s  # before the scale, which may be the smallest number there is
        out *= self.scale[:, None]
        return out

    def _plan(self) -> tuple[NDArray, NDArray]:
        """Bytes of the levels, ``[n]``, and ``[n, 2]``: the form; its b, or the bits of l - 1."""
        sizes = np.full(self.n, packed_size(self.d, self.bits))
        forms = np.zeros((self.n, 2), np.int64)
        some = np.count_nonzero(self.levels, axis=-1)
        step = max(1, CHUNK // max(self.d, 1))
        for first in range(0, self.n, step):
            rows = slice(first, first + step)
            rice, b = rice_plan(_magnitudes(self.levels[rows]))
            rice += 1 + (some[rows] + 7) // 8
            better = rice < sizes[rows]
            sizes[rows][better] = rice[better]
            forms[rows][better] = np.stack([np.full(len(b), RICE), b], axis=-1)[better]
        few = np.flatnonzero(4 + some // 4 <= sizes)  # sign and index cost two bits at least
        picked = self.levels[few]
        at = np.flatnonzero(picked)
        at %= self.d
        most = np.maximum(picked.max(axis=-1), -picked.min(axis=-1)).astype(np.int64)
        width = np.ceil(np.log2(np.maximum(most, 1))).astype(np.int64)  # (l - 1).bit_length()
        support, _ = support_plan(at, some[few], self.d)
        sparse = 5 + support + packed_size(some[few], width + 1)
        better = sparse < sizes[few]
        sizes[few[better]] = sparse[better]
        forms[few[better]] = np.stack([np.full(len(width), SPARSE), width], axis=-1)[better]
        return sizes, forms

    def _sizes(self) -> NDArray[np.int64]:
        return self.dtype.itemsize + 3 + self._plan()[0]

    def _payloads(self) -> list[bytes]:
        scale = self.scale.astype(self.dtype.newbyteorder("<"), copy=False)
        frames = []
        forms = self._plan()[1].tolist()
        for row, one, (form, width) in zip(self.levels, scale, forms, strict=True):
            head = one.tobytes() + self.s.to_bytes(2, "little")
            if form == RICE:
                signs = np.packbits(row[row != 0] > 0, bitorder="little").tobytes()
                code = _magnitudes(row)
                frames.append(head + bytes([RICE, width]) + write_rice(code, width) + signs)
                continue
            if form == DENSE:
                code = (row.astype(np.int32) + self.s).astype(_unsigned(self.bits))
                frames.append(head + bytes([DENSE]) + pack(code, self.bits))
                continue
            index = np.flatnonzero(row)
            kept = row[index].astype(np.int32)
            code = ((np.abs(kept) - 1) << 1 | (kept > 0)).astype(np.uint32)
            size = len(index).to_bytes(4, "little") + bytes([width])
            packed = write_support(index, self.d) + pack(code, width + 1)
            frames.append(head + bytes([SPARSE]) + size + packed)
        return frames

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        scale = source.array(dtype.newbyteorder("<").str, 1).astype(dtype, copy=False)
        s, mode = source.number("<u2"), source.number("<u1")
        if not 1 <= s <= MOST_LEVELS or mode > RICE:
            raise PeerError(f"a frame has {s} levels in form {mode}")
        kind = np.int8 if s <= 127 else np.int16
        if mode == DENSE:
            code = unpack(source, d, (2 * s).bit_length())
            if d and code.max() > 2 * s:
                raise PeerError(f"a frame has level {code.max()} of {2 * s}")
            return cls((code.astype(np.int32) - s).astype(kind)[None], scale, s)
        if mode == RICE:
            b = source.number("<u1")
            magnitude = read_rice(source, d, b, d * (s >> min(b, 15)))
            if magnitude.max(initial=0) > s:
                raise PeerError(f"a frame has level {magnitude.max()} of {s}")
            levels = magnitude.astype(kind)
            at = np.flatnonzero(levels)
            signs = np.frombuffer(source.take((len(at) + 7) // 8), np.uint8)
            positive = np.unpackbits(signs, count=len(at), bitorder="little")
            levels[at[positive == 0]] *= -1
            return cls(levels[None], scale, s)
        k, width = source.number("<u4"), source.number("<u1")
        if width > 15:
            raise PeerError(f"a frame has levels of {width} bits; at most 15 makes sense")
        index = read_support(source, d, k)
        code = unpack(source, k, width + 1).astype(np.int32)
        level = (code >> 1) + 1
        if k and level.max() > s:
            raise PeerError(f"a frame has level {level.max()} of {s}")
        levels = np.zeros(d, kind)
        levels[index] = np.where(code & 1, level, -level)
        return cls(levels[None], scale, s)


def _magnitudes(levels: NDArray) -> NDArray:
    return np.abs(levels).view(f"u{levels.itemsize}")


def _unsigned(bits: int) -> type[np.unsignedinteger]:
    return np.uint8 if bits <= 8 else np.uint16


@codec(11)
class Powered(Levels):
    """The same, where level l stands for sign(l) 2^(|l| - s)."""

    def _rows(self) -> NDArray:
        table = np.ldexp(self.dtype.type(1), np.arange(self.s + 1) - self.s)
        table[0] = 0
        out = table[np.abs(self.levels)]
        out *= self.scale[:, None]
        return np.copysign(out, self.levels, out=out)


def euclidean(compressor: Compressor, x: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """``(y [n, d], r [n], norms [n])`` with |x| / ||x|| = |y| / r, whatever the range of x."""
    squares = np.vecdot(x, x)
    y, r = x, np.sqrt(squares)
    norms = r.copy()
    bad = ~np.isfinite(squares) | (squares < np.finfo(x.dtype).tiny ** 0.5)
    if bad.any():  # squares too large, or so small that digits are lost
        z = x[bad]
        top = np.abs(z).max(axis=-1)
        z /= np.where(top > 0, top, 1)[:, None]
        y = x.copy()
        y[bad], r[bad] = z, np.sqrt(np.maximum(np.vecdot(z, z), 1))
        norms[bad] = top * r[bad]
        overflow(compressor, norms)
    return y, r, norms


def largest(x: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """The same of the max-norm."""
    norms = np.zeros(len(x), x.dtype)
    for rows, columns in pieces(*x.shape):
        np.maximum(norms[rows], np.abs(x[rows, columns]).max(axis=-1), out=norms[rows])
    y, r = x, norms.copy()
    bad = norms < np.finfo(x.dtype).tiny ** 0.5  # s / r could be too large
    if bad.any():
        y = x.copy()
        y[bad] /= np.where(norms > 0, norms, 1)[bad, None]
        r[bad] = 1
    return y, r, norms


class Dithering(Compressor):
    """Levels of a norm, rounded at random."""

    def __init__(self, s: int, norm: str) -> None:
        self.s, self.norm = s, norm

    def omega(self, d: int) -> float:
        """min(d / s^2, sqrt(d) / s); in the max-norm min((sqrt(d) - 1) / 2, d / (4 s^2))."""
        if self.norm == "2":
            return min(d / self.s**2, d**0.5 / self.s)
        return min(d / (4 * self.s**2), (d**0.5 - 1) / 2)

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        y, r, scale = euclidean(self, x) if self.norm == "2" else largest(x)
        steps = x.dtype.type(self.s) / r
        levels = np.empty(x.shape, np.int8 if self.s <= 127 else np.int16)
        for rows, columns in pieces(*x.shape):
            p = np.abs(y[rows, columns])
            p *= steps[rows, None]  # s |x_j| / ||x||
            np.minimum(p, self.s, out=p)  # which rounding may exceed
            level = np.floor(p)
            p -= level  # exact; p + u might round up to the next whole number
            level += rng.random(p.shape, x.dtype) < p
            levels[rows, columns] = np.copysign(level, x[rows, columns], out=level)
        return Levels(levels, scale, self.s)


@COMPRESSORS.register("qsgd")
def qsgd(
    s: Annotated[int, Field(ge=1, le=MOST_LEVELS)] = 16, *, norm: Literal["2", "max"] = "2"
) -> Dithering:
    """Magnitudes rounded at random to ``s`` levels of the norm ("2" or "max"), unbiased."""
    return Dithering(s, norm)


@COMPRESSORS.register("terngrad")
def terngrad() -> Dithering:
    """-1, 0 or 1 times the largest magnitude, unbiased."""
    return Dithering(1, "max")


class NaturalDithering(Compressor):
    """Levels that are powers of two of the 2-norm."""

    def __init__(self, s: int) -> None:
        self.s = s

    def omega(self, d: int) -> float:
        """1/8 + sqrt(d) 2^(1-s) min(1, sqrt(d) 2^(1-s))."""
        lowest = d**0.5 * 2.0 ** (1 - self.s)
        return 0.125 + lowest * min(1, lowest)

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        y, r, norms = euclidean(self, x)
        levels = np.empty(x.shape, np.int8)
        word, mantissa, bits = FORMS[x.dtype.itemsize]
        for rows, columns in pieces(*x.shape):
            p = np.abs(y[rows, columns])
            p /= r[rows, None]
            np.minimum(p, 1, out=p)  # level s; rounding may exceed it
            u = rng.random(p.shape, x.dtype)
            # As in natural compression, what is added to the mantissa carries to the exponent.
            carried = (u * x.dtype.type(2.0**mantissa)).astype(word)
            carried += p.view(word)
            level = (carried >> word(mantissa)).astype(np.int16)
            level += self.s - (2 ** (bits - 2) - 1)
            p *= x.dtype.type(2.0 ** (self.s - 1))  # in units of the lowest level
            level = np.where(p < 1, u < p, level)
            levels[rows, columns] = np.where(x[rows, columns] < 0, -level, level)
        return Powered(levels, norms, self.s)


@COMPRESSORS.register("natural-dithering")
def natural_dithering(s: Annotated[int, Field(ge=1, le=100)] = 8) -> NaturalDithering:
    """Magnitudes rounded at random to ``s`` powers of two of the 2-norm, unbiased."""
    return NaturalDithering(s)
