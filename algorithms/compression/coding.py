"""Bits and bytes: bit planes, sorted indices (Golomb-Rice), subsets from a seed.

Everything is little endian and packed from the lowest bit.  Encoders are deterministic; readers
take nothing on trust and raise ``PeerError``.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.moved import renamed

CHUNK = 2**17  # numbers at a time: fits a cache, and is a multiple of 8

RICE, FIXED, BITMAP, ALL = range(4)  # how a set of indices is written: two bits of its tag


class BitReader:
    """Walks over the bytes of a peer."""

    def __init__(self, frame: bytes | bytearray | memoryview) -> None:
        self.frame, self.at = memoryview(frame).cast("B"), 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.frame) - self.at

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > self.left:
            raise PeerError(f"a frame ends {count - self.left} byte(s) early")
        self.at += count
        return self.frame[self.at - count : self.at]

    def number(self, dtype: str) -> int:
        """One integer."""
        return int(self.array(dtype, 1)[0])

    def array(self, dtype: str, count: int) -> NDArray:
        """``count`` numbers; floats must be finite."""
        kind = np.dtype(dtype)
        values = np.frombuffer(self.take(count * kind.itemsize), kind)
        if kind.kind == "f" and not np.isfinite(values).all():
            raise PeerError("a frame carries a number that is not finite")
        return values

    def end(self) -> None:
        """Nothing may follow."""
        if self.left:
            raise PeerError(f"a frame has {self.left} byte(s) too many")


def packed_size(count: Any, bits: Any) -> Any:
    """Bytes of ``count`` numbers of ``bits`` bits: ceil(count bits / 8).  Of arrays too."""
    return (count * bits + 7) // 8


def pack(values: NDArray, bits: int) -> bytes:
    """Unsigned ``values [m] < 2^bits``: whole low bytes first, then planes of single bits."""
    whole, planes = divmod(bits, 8)
    parts = [(values >> 8 * i).astype(np.uint8).tobytes() for i in range(whole)]
    if planes:
        top = (values >> 8 * whole).astype(np.uint8)
        plane = np.empty((planes, len(values)), np.uint8)
        for i in range(planes):
            np.bitwise_and(top, 1 << i, out=plane[i])  # packbits takes anything but 0 for 1
        parts.append(np.packbits(plane.ravel(), bitorder="little").tobytes())
    return b"".join(parts)


def unpack(source: BitReader, count: int, bits: int) -> NDArray:
    """What ``pack`` wrote, ``[count]``, as the smallest of uint8, uint16, uint32 that holds it."""
    kind: Any = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    whole, planes = divmod(bits, 8)
    raw = source.take(count * whole)
    values: NDArray = np.zeros(count, kind)
    for i in range(whole):
        low = np.frombuffer(raw[count * i : count * (i + 1)], np.uint8)
        values |= low.astype(kind) << 8 * i
    if planes:
        stream = np.frombuffer(source.take((count * planes + 7) // 8), np.uint8)
        plane = np.unpackbits(stream, count=count * planes, bitorder="little")
        for i, one in enumerate(plane.reshape(planes, count)):
            values |= one.astype(kind) << (8 * whole + i)
    return values


def entropy_bits(d: int, k: int) -> float:
    """log2 C(d, k): what k of d indices cost at least, if all sets are alike."""
    return (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)


def rice_parameter(d: int, k: NDArray) -> NDArray[np.int64]:
    """floor(log2(ln 2 d / k)), the best for gaps of mean d / k (Golomb 1966, Rice 1979)."""
    return np.maximum(0, np.floor(np.log2(math.log(2) * d / k))).astype(np.int64)


@lru_cache
def _rice_parameter(d: int, k: int) -> int:
    return int(rice_parameter(d, np.array(k)))


def rice_plan(values: NDArray) -> tuple[NDArray, NDArray]:
    """Of each row of unsigned ``values [n, d]``, in Golomb-Rice code: ``(bytes [n], b [n])``."""
    d = values.shape[1]
    b = rice_parameter(values.sum(axis=-1, dtype=np.int64) + d, np.array(d))
    unary = (values >> b.astype(values.dtype)[:, None]).sum(axis=-1, dtype=np.int64) + d
    return (unary + 7) // 8 + packed_size(d, b), b


def write_rice(values: NDArray, b: int) -> bytes:
    """Of unsigned ``values [m]`` the b low bits, then the rest in unary: q zeros and a one."""
    quotient = values.astype(np.int64) >> b
    ends = np.cumsum(quotient + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    low = (values & values.dtype.type((1 << b) - 1)).astype(np.uint32)
    return pack(low, b) + np.packbits(unary, bitorder="little").tobytes()


def read_rice(source: BitReader, count: int, b: int, most: int) -> NDArray[np.int64]:
    """What ``write_rice`` wrote: ``count`` numbers, their quotients' sum at most ``most``."""
    if b > 31:
        raise PeerError(f"a frame has Rice parameter {b}; at most 31 makes sense")
    low = unpack(source, count, b).astype(np.int64)
    length = (count + most + 7) // 8
    some = np.frombuffer(source.frame[source.at : source.at + length], np.uint8)
    ends = np.flatnonzero(np.unpackbits(some, bitorder="little"))[:count]
    if len(ends) < count:
        raise PeerError(f"a frame has {len(ends)} numbers and needs {count}")
    source.take(int(ends[-1]) // 8 + 1)
    return ((np.diff(ends, prepend=-1) - 1) << b) + low


def _gaps(index: NDArray, starts: NDArray) -> NDArray:
    """Indices left out before each of ``index``, which starts anew at ``starts``."""
    gaps = np.empty_like(index)
    np.subtract(index[1:], index[:-1], out=gaps[1:])
    gaps -= 1
    gaps[starts] = index[starts]
    return gaps


def _width(d: int) -> int:
    return max(1, (d - 1).bit_length())


def support_plan(index: NDArray, k: NDArray, d: int) -> tuple[NDArray, NDArray]:
    """How to write each of n sets of indices below d: ``(bytes [n], tags [n])``.

    The shortest of Rice, fixed width and bitmap, and one byte for the tag (two bits which, six
    bits the parameter of Rice); none or all of d cost the tag alone.

    Args:
        index: ``[sum k]``, one sorted set after another.
        k: ``[n]``, the size of each.
    """
    some = k > 0
    starts = (np.cumsum(k) - k)[some]
    b = rice_parameter(d, np.maximum(k, 1))
    unary = k.copy()  # gap g costs g >> b zeros and a one
    if len(starts):
        quotient = _gaps(index, starts)
        quotient >>= b[0] if (b == b[0]).all() else np.repeat(b, k)
        unary[some] += np.add.reduceat(quotient, starts)
    rice = (unary + 7) // 8 + packed_size(k, b)
    fixed, bitmap = packed_size(k, _width(d)), (d + 7) // 8
    other = np.minimum(fixed, bitmap)
    size = np.where(some & (k < d), np.minimum(rice, other), 0)
    tag = np.where(rice <= other, RICE | b << 2, np.where(fixed <= bitmap, FIXED, BITMAP))
    tag[~some], tag[k == d] = FIXED, ALL
    return 1 + size, tag


def support_sizes(index: NDArray, d: int) -> NDArray[np.int64]:
    """The bytes of ``support_plan`` for n sets of one size, ``index [n, k]``: in fewer steps."""
    n, k = index.shape
    if k in (0, d):
        return np.ones(n, np.int64)
    b = _rice_parameter(d, k)
    quotient = np.empty_like(index)
    np.subtract(index[:, 1:], index[:, :-1] + 1, out=quotient[:, 1:])
    quotient[:, 0] = index[:, 0]
    quotient >>= b
    unary = quotient.sum(axis=1)
    unary += k + 7
    unary >>= 3
    unary += packed_size(k, b)
    return np.minimum(unary, min(packed_size(k, _width(d)), packed_size(d, 1)), out=unary) + 1


def write_support(index: NDArray, d: int) -> bytes:
    """Sorted ``index [k]`` of 0..d-1, the shortest way."""
    k = len(index)
    _, (tag,) = support_plan(index, np.array([k]), d)
    head = bytes([tag])
    if k in (0, d):
        return head
    if tag & 3 == RICE:
        b = int(tag) >> 2
        return head + write_rice(_gaps(index, np.array([0])), b)
    if tag & 3 == FIXED:
        return head + pack(index.astype(np.uint32), _width(d))
    bitmap = np.zeros(d, np.uint8)
    bitmap[index] = 1
    return head + np.packbits(bitmap, bitorder="little").tobytes()


def read_support(source: BitReader, d: int, k: int) -> NDArray:
    """What ``write_support`` wrote: k sorted, distinct indices below d."""
    if k > d:
        raise PeerError(f"a frame keeps {k} of {d} numbers")
    tag = source.number("<u1")
    mode, b = tag & 3, tag >> 2
    if mode == ALL:
        if k != d:
            raise PeerError(f"a frame says it keeps all of {d} numbers and has {k}")
        return np.arange(d)
    if k == 0:
        return np.zeros(0, np.int64)
    if mode == RICE:
        index = np.cumsum(read_rice(source, k, b, d >> b) + 1) - 1
    elif mode == FIXED:
        index = unpack(source, k, _width(d)).astype(np.int64)
    else:
        bits = np.frombuffer(source.take((d + 7) // 8), np.uint8)
        index = np.flatnonzero(np.unpackbits(bits, count=d, bitorder="little"))
    if len(index) != k or index[-1] >= d or (k > 1 and np.diff(index).min() < 1):
        raise PeerError(f"a frame's indices are not {k} ascending numbers below {d}")
    return index


def words(seeds: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """``[n, count]``: the first words of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

    >>> [hex(word) for word in words(np.zeros(1, np.uint64), 2)[0]]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + seeds[:, None]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def subsets(seeds: NDArray[np.uint64], d: int, k: int) -> NDArray[np.int64]:
    """``[n, k]``: of 0..d-1, sorted, a function of each seed, the same for every library for ever.

    The first k distinct of independent uniform draws are a uniform k-subset; beyond d / 2, what is
    left out is drawn.  No set is off its probability by more than rounding to 53 bits.

    >>> subsets(np.array([1], np.uint64), 10, 3)
    array([[5, 7, 9]])
    """
    n, few = len(seeds), min(k, d - k)
    chosen = np.empty((n, few), np.int64)
    count = max(16, int(few * 1.5))
    short = np.arange(n) if few else np.arange(0)
    while len(short):
        step = max(1, CHUNK // count)
        parts, short = [short[i : i + step] for i in range(0, len(short), step)], short[:0]
        for rows in parts:
            uniform = (words(seeds[rows], count) >> np.uint64(11)).astype(np.float64)
            draws = (uniform * (2.0**-53 * d)).astype(np.int64)
            draws = np.sort(draws << 32 | np.arange(count), axis=-1)  # by value, then by turn
            index, turn = draws >> 32, draws & (2**32 - 1)
            turn[:, 1:][index[:, 1:] == index[:, :-1]] = count  # drawn before
            last = np.partition(turn, few - 1, axis=-1)[:, few - 1, None]
            done = last[:, 0] < count
            chosen[rows[done]] = index[done][(turn <= last)[done]].reshape(-1, few)
            short = np.concatenate([short, rows[~done]])
        count *= 2
    if few == k:
        return chosen
    keep = np.ones((n, d), bool)
    keep[np.arange(n)[:, None], chosen] = False
    return np.flatnonzero(keep).reshape(n, k) - np.arange(0, n * d, d)[:, None]


__getattr__ = renamed(__name__, {"Reader": "BitReader"})
