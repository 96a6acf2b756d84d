"""Rand-k: keep a uniform k-subset of the entries, which travels as a seed.

Stich, Cordonnier, Jaggi, NeurIPS 2018 (arXiv:1809.07599).  As it is, alpha = k / d, exactly:
E ||C(x) - x||^2 = (1 - k / d) ||x||^2.  Times d / k it is unbiased with omega = d / k - 1, exactly
(Wangni et al., NeurIPS 2018).
"""

from typing import Any

import numpy as np

from offbeat.algorithms.compression.coding import subsets
from offbeat.algorithms.compression.contract import COMPRESSORS, Compressor, Message, overflow
from offbeat.algorithms.compression.sparse import Kept, Seeded, Sparsifier, carry, count, gather


class RandK(Sparsifier):
    """A uniform k-subset."""

    def __init__(self, k: int | float, unbiased: bool) -> None:
        self.k, self.unbiased = k, unbiased

    def kept(self, d: int) -> int:
        return count(self.k, d)

    def alpha(self, d: int) -> float | None:
        """k / d."""
        return None if self.unbiased else self.kept(d) / d

    def omega(self, d: int) -> float | None:
        """d / k - 1."""
        return d / self.kept(d) - 1 if self.unbiased else None

    def sparsify(self, x: Any, rng: np.random.Generator, values: Compressor | None) -> Message:
        n, d = x.shape
        k = self.kept(d)
        seeds = rng.integers(2**64, size=(n,), dtype=np.uint64)
        index = subsets(seeds, d, k)
        chosen = gather(x, index)
        if self.unbiased:
            chosen *= chosen.dtype.type(d / k)
            overflow(self, chosen)
        return Seeded(d, seeds, carry(chosen, values, rng), index)


@COMPRESSORS.register("randk")
def randk(k: Kept = 0.01, *, unbiased: bool = False) -> RandK:
    """A uniform k-subset, as it is or times d / k; k is a count or a share of d."""
    return RandK(k, unbiased)
