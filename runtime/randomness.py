"""Randomness is addressed, not drawn: every number is a pure function of where it is used.

Two forms.  ``rng`` gives a numpy generator for one address.  ``bits`` and what stands on it
answer for many jobs at once: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) seeded by the address
of each job, so that jobs computed in a batch draw what they would have drawn alone.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = (np.uint64(s) for s in (27, 30, 31, 32))


def rng(seed: int, purpose: str, node: int = 0, index: int = 0) -> np.random.Generator:
    """The generator at address ``(seed, purpose, node, index)``.

    >>> bool(rng(1, "a").random() == rng(1, "a").random())
    True
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), node, index])


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


def bits(seed: int, purpose: str, worker: NDArray, draw: NDArray, count: int) -> NDArray[np.uint64]:
    """``[k, count]`` random 64-bit words; row j depends on ``(worker[j], draw[j])`` alone."""
    key = np.array([(seed << 32 | zlib.crc32(purpose.encode())) & (2**64 - 1)], np.uint64)
    state = _mix(_mix(key) + worker.astype(np.uint64) * _GOLDEN)
    state = _mix(state + draw.astype(np.uint64) * _GOLDEN)
    return _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def uniform(seed: int, purpose: str, worker: NDArray, draw: NDArray, count: int) -> NDArray:
    """``[k, count]`` float64 in (0, 1), addressed like ``bits``."""
    words = bits(seed, purpose, worker, draw, count) >> np.uint64(11)
    return (words.astype(np.float64) + 0.5) * 2.0**-53


def integers(
    seed: int, purpose: str, worker: NDArray, draw: NDArray, count: int, below: NDArray
) -> NDArray[np.int64]:
    """``[k, count]`` integers in ``[0, below[j])`` for row j, addressed like ``bits``.

    Multiply-and-shift on 32 bits: no value is off its probability by more than 2^-32.
    """
    words = bits(seed, purpose, worker, draw, count) >> _S32
    return ((words * below.astype(np.uint64)[:, None]) >> _S32).astype(np.int64)
