"""Natural compression: magnitudes rounded at random to a power of two.

Horvath et al., Natural Compression for Distributed Deep Learning, MSML 2022 (arXiv:1905.10988).
2^a <= |x| < 2^(a+1) becomes 2^(a+1) with probability |x| / 2^a - 1, else 2^a; unbiased, with
omega = 1 / 8, attained at 4/3 2^a.  In bits: a random number is added to the mantissa, the carry
goes to the exponent, and sign and exponent travel: in 9 bits of a float32 and 12 of a float64 or,
where this is shorter, how far the exponent is below the row's largest, in Golomb-Rice code.

Denormal numbers become 0 or the smallest normal number: unbiased, but beyond omega.
"""

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import (
    CHUNK,
    BitReader,
    pack,
    packed_size,
    read_rice,
    rice_plan,
    unpack,
    write_rice,
)
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    pieces,
)
from offbeat.runtime.base.errors import ConfigError, PeerError

RAW = 255  # in place of a Rice parameter

FORMS = {4: (np.uint32, 23, 9), 8: (np.uint64, 52, 12)}  # itemsize: word, mantissa, the rest


@codec(5)
class Powers(Coded):
    """Sign and exponent of every number."""

    def __init__(self, code: NDArray, dtype: np.dtype) -> None:
        super().__init__(code.shape[0], code.shape[1], dtype)
        self.code = code  # [n, d] uint16: the upper bits of the number

    def _rows(self) -> NDArray:
        word, mantissa, _ = FORMS[self.dtype.itemsize]
        return (self.code.astype(word) << word(mantissa)).view(self.dtype)

    def _below(self, rows: slice) -> tuple[NDArray, NDArray]:
        """The largest exponent of each row, and by how much each number's is less."""
        exponent = self.code[rows] & np.uint16(2 ** (FORMS[self.dtype.itemsize][2] - 1) - 1)
        top = exponent.max(axis=-1, keepdims=True, initial=0)
        return top[:, 0], top - exponent

    def _plan(self) -> tuple[NDArray, NDArray]:
        """Bytes of the numbers, ``[n]``; b of their Rice code, -1 where they go as they are."""
        sizes = np.full(self.n, packed_size(self.d, FORMS[self.dtype.itemsize][2]))
        parameters = np.full(self.n, -1)
        step = max(1, CHUNK // max(self.d, 1))
        for first in range(0, self.n, step):
            rows = slice(first, first + step)
            rice, b = rice_plan(self._below(rows)[1])
            rice += 2 + (self.d + 7) // 8
            better = rice < sizes[rows]
            sizes[rows][better], parameters[rows][better] = rice[better], b[better]
        return sizes, parameters

    def _sizes(self) -> NDArray[np.int64]:
        return 1 + self._plan()[0]

    def _payloads(self) -> list[bytes]:
        bits = FORMS[self.dtype.itemsize][2]
        frames = []
        for i, b in enumerate(self._plan()[1].tolist()):
            row = self.code[i]
            if b < 0:
                frames.append(bytes([RAW]) + pack(row, bits))
                continue
            top, below = self._below(slice(i, i + 1))
            head = bytes([b]) + top.astype("<u2").tobytes()
            signs = np.packbits(row >> np.uint16(bits - 1), bitorder="little").tobytes()
            frames.append(head + signs + write_rice(below[0], b))
        return frames

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        bits = FORMS[dtype.itemsize][2]
        highest = 2 ** (bits - 1) - 1  # this exponent means infinity
        b = source.number("<u1")
        if b == RAW:
            code = unpack(source, d, bits).astype(np.uint16)
        else:
            top = source.number("<u2")
            if b > 15 or top > highest:
                raise PeerError(f"a frame has the exponent {top} in Rice code {b}")
            signs = np.frombuffer(source.take((d + 7) // 8), np.uint8)
            below = read_rice(source, d, b, d * (top >> b))
            if below.max(initial=0) > top:
                raise PeerError(f"a frame has an exponent {below.max()} below {top}")
            code = (top - below).astype(np.uint16)
            code |= np.unpackbits(signs, count=d, bitorder="little") << np.uint16(bits - 1)
        if ((code & highest) == highest).any():
            raise PeerError("a frame carries a number that is not finite")
        return cls(code[None], dtype)


class Natural(Compressor):
    """Powers of two."""

    def omega(self, d: int) -> float:
        """1 / 8."""
        return 0.125

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        word, mantissa, bits = FORMS[x.dtype.itemsize]
        code = np.empty(x.shape, np.uint16)
        for rows, columns in pieces(*x.shape):
            noise = rng.integers(2**mantissa, size=code[rows, columns].shape, dtype=word)
            noise += x[rows, columns].view(word)
            noise >>= word(mantissa)
            code[rows, columns] = noise
        highest = 2 ** (bits - 1) - 1
        if (code & highest).max() == highest:
            raise ConfigError(f"{self} met a number whose next power of two is not a {x.dtype}")
        return Powers(code, x.dtype)


@COMPRESSORS.register("natural")
def natural() -> Natural:
    """Magnitudes rounded at random to a power of two, unbiased."""
    return Natural()
