"""Signs, one bit a number: bare, or scaled so that they contract.

Seide et al., 1-bit SGD, Interspeech 2014; Bernstein et al., signSGD, ICML 2018
(arXiv:1802.04434); scaled: Karimireddy et al., ICML 2019 (arXiv:1901.09847),

    C(x) = (||x||_1 / d) sign(x),  sign(0) = +1,
    ||C(x) - x||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2,  so alpha >= 1 / d.

A bit of 1 is non-negative.  ceil(d / 8) bytes, and the scale.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import BitReader
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    pieces,
)
from offbeat.runtime.base.tensors import dtype_of, fetch, is_tensor, library, load

# _SIGNS[byte]: its eight signs, lowest bit first
_SIGNS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1).astype(np.float32)


def sign_bits(x: NDArray) -> NDArray[np.uint8]:
    """``[n, ceil(d / 8)]``: 1 where ``x [n, d]`` is non-negative."""
    n, d = x.shape
    out = np.empty((n, (d + 7) // 8), np.uint8)
    for rows, columns in pieces(n, d):
        bits = np.packbits(x[rows, columns] >= 0, axis=-1, bitorder="little")
        first = columns.start // 8
        out[rows, first : first + bits.shape[1]] = bits
    return out


def sign_bits_there(x: Any) -> NDArray[np.uint8]:
    """The same of a tensor, fetched."""
    bits = library(x).nn.functional.pad(x >= 0, (0, -x.shape[1] % 8))
    return fetch((bits.reshape(len(x), -1, 8) * _powers(x.device)).sum(2).byte())


def _powers(device: Any) -> Any:
    """What the bits of a byte count, lowest first."""
    return load(np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8), device)


@codec(3)
class Signs(Coded):
    """One bit a number, and one scale a row."""

    def __init__(self, d: int, bits: NDArray[np.uint8], scale: NDArray) -> None:
        super().__init__(len(bits), d, scale.dtype)
        self.bits, self.scale = bits, scale  # [n, ceil(d / 8)], [n]

    def _rows(self) -> NDArray:
        table = _SIGNS.astype(self.dtype, copy=False)
        out = np.empty((self.n, self.d), self.dtype)
        for rows, columns in pieces(self.n, self.d):
            piece = out[rows, columns]
            bits = self.bits[rows, columns.start // 8 : (columns.stop + 7) // 8]
            signs = table.take(bits, axis=0).reshape(len(piece), -1)  # eight a look-up
            np.multiply(signs[:, : piece.shape[1]], self.scale[rows, None], out=piece)
        return out

    def _there(self, device: Any) -> Any:
        bits, scale = load(self.bits, device), load(self.scale, device)
        odd = (bits[:, :, None] & _powers(device)).reshape(self.n, -1)[:, : self.d] != 0
        return (2 * odd.to(scale.dtype) - 1) * scale[:, None]

    def _sizes(self) -> int:
        return self.dtype.itemsize + (self.d + 7) // 8

    def _payloads(self) -> list[bytes]:
        scale = self.scale.astype(self.dtype.newbyteorder("<"), copy=False)
        return [s.tobytes() + b.tobytes() for s, b in zip(scale, self.bits, strict=True)]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        scale = source.array(dtype.newbyteorder("<").str, 1).astype(dtype, copy=False)
        return cls(d, source.array("u1", (d + 7) // 8)[None], scale)


class Sign(Compressor):
    """sign(x), times the mean magnitude."""

    draws = False
    apart = True

    def __init__(self, scaled: bool) -> None:
        self.scaled = scaled

    def alpha(self, d: int) -> float | None:
        """1 / d; of one x it is ||x||_1^2 / (d ||x||_2^2), 2 / pi for a Gaussian."""
        return 1 / d if self.scaled else None

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        n, d = x.shape
        bits = sign_bits_there(x) if is_tensor(x) else sign_bits(x)
        scale = self._scale(x) if self.scaled else np.ones(n)
        return Signs(d, bits, scale.astype(dtype_of(x)))

    def _scale(self, x: Any) -> NDArray[np.float64]:
        n, d = x.shape
        if is_tensor(x):
            return fetch((x.abs().double() / d).sum(1))
        scale = np.zeros(n)
        for rows, columns in pieces(n, d):
            # Divided first: the sum of large numbers could be too large.
            share = np.multiply(np.abs(x[rows, columns]), 1 / d, dtype=np.float64)
            scale[rows] += share.sum(axis=-1)
        return scale


@COMPRESSORS.register("sign")
def sign() -> Sign:
    """Bare signs, of magnitude 1: for sign descent, not contractive."""
    return Sign(scaled=False)


@COMPRESSORS.register("scaled-sign")
def scaled_sign() -> Sign:
    """Signs times the mean magnitude."""
    return Sign(scaled=True)
