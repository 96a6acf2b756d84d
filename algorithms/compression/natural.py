"""Natural compression: magnitudes rounded at random to a power of two.

Horvath et al., Natural Compression for Distributed Deep Learning, MSML 2022 (arXiv:1905.10988).
2^a <= |x| < 2^(a+1) becomes 2^(a+1) with probability |x| / 2^a - 1, else 2^a; unbiased, with
omega = 1 / 8, attained at 4/3 2^a.  In bits: a random number is added to the mantissa, the carry
goes to the exponent, and sign and exponent travel: 9 bits of a float32, 12 of a float64.

Denormal numbers become 0 or the smallest normal number: unbiased, but beyond omega.
"""

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import Reader, pack, packed_size, unpack
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    pieces,
)
from offbeat.runtime.errors import ConfigError, PeerError

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

    def _sizes(self) -> int:
        return packed_size(self.d, FORMS[self.dtype.itemsize][2])

    def _payloads(self) -> list[bytes]:
        bits = FORMS[self.dtype.itemsize][2]
        return [pack(row, bits) for row in self.code]

    @classmethod
    def _read(cls, source: Reader, d: int, dtype: np.dtype, depth: int) -> Message:
        bits = FORMS[dtype.itemsize][2]
        code = unpack(source, d, bits)
        highest = 2 ** (bits - 1) - 1  # this exponent means infinity
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
