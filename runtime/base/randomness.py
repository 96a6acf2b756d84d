"""Randomness is addressed, not drawn: every number is a pure function of where it is used.

Two forms.  ``rng`` gives a numpy generator for one address.  ``Streams`` answers for many jobs
at once, by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) from a seed of each job's own, so that
jobs computed in a batch draw what they would have drawn alone.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

# Arrays without axes: numpy is twice as fast with them as with its own scalars.
_G1 = np.array(0x9E3779B97F4A7C15, np.uint64)
_G2 = np.array(0xD1B54A32D192ED03, np.uint64)
_MIX_1 = np.array(0xBF58476D1CE4E5B9, np.uint64)
_MIX_2 = np.array(0x94D049BB133111EB, np.uint64)
_S27, _S30, _S31, _S32 = (np.array(s, np.uint64) for s in (27, 30, 31, 32))


def rng(seed: int, purpose: str, node: int = 0, index: int = 0) -> np.random.Generator:
    """The generator at address ``(seed, purpose, node, index)``.

    >>> bool(rng(1, "a").random() == rng(1, "a").random())
    True
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), node, index])


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, in place."""
    z ^= z >> _S30
    z *= _MIX_1
    z ^= z >> _S27
    z *= _MIX_2
    z ^= z >> _S31
    return z


class Streams:
    """Random words for many (worker, draw) pairs at once.

    Word j of (worker, draw) is finaliser(s_worker + draw G1 + j G2), j = 1, 2, ...: SplitMix64
    with increment G2 from a seed of its own for each pair.  Row by row, nothing depends on which
    other pairs are asked for.

    Args:
        seed, purpose: of the streams.
        workers: n.
    """

    def __init__(self, seed: int, purpose: str, workers: int) -> None:
        key = np.array([(seed << 32 | zlib.crc32(purpose.encode())) % 2**64], np.uint64)
        self._seeds = _mix(_mix(key) + np.arange(workers, dtype=np.uint64) * _G1)
        self._steps: dict[int, NDArray[np.uint64]] = {}

    def bits(self, worker: NDArray, draw: NDArray, count: int) -> NDArray[np.uint64]:
        """``[k, count]`` 64-bit words for workers ``[k]`` and draws ``[k]``."""
        if count not in self._steps:
            self._steps[count] = np.arange(1, count + 1, dtype=np.uint64) * _G2
        state = draw.astype(np.uint64)
        state *= _G1
        state += self._seeds[worker]
        return _mix(state[:, None] + self._steps[count])

    def uniform(self, worker: NDArray, draw: NDArray, count: int) -> NDArray[np.float64]:
        """``[k, count]`` numbers in (0, 1)."""
        words = self.bits(worker, draw, count) >> np.uint64(11)
        return (words.astype(np.float64) + 0.5) * 2.0**-53

    def integers(
        self, worker: NDArray, draw: NDArray, count: int, below: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """``[k, count]`` integers in [0, below_j) for ``below [k, 1]``.

        Multiply-and-shift on 32 bits: no value is off its probability by more than 2^-32.
        """
        words = self.bits(worker, draw, count)
        words >>= _S32
        words *= below
        words >>= _S32
        return words.view(np.int64)
