"""Top-k: keep the k entries of largest magnitude.

Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, NeurIPS 2018 (arXiv:1809.07599);
Alistarh et al., NeurIPS 2018 (arXiv:1809.10505).  alpha = k / d, attained where all magnitudes
are equal.  Of equal magnitudes the lower index is kept.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import CHUNK
from offbeat.algorithms.compression.contract import COMPRESSORS, Compressor, Message
from offbeat.algorithms.compression.sparse import Kept, Sparse, Sparsifier, carry, count, gather
from offbeat.runtime.base.tensors import fetch, is_tensor

LARGE = 2**15  # from here on, rows are searched one by one with a threshold from a sample
SAMPLE = 2**13


def largest(x: NDArray, k: int) -> NDArray:
    """Sorted indices ``[n, k]`` of the k largest magnitudes of each row of ``x [n, d]``."""
    n, d = x.shape
    if k == d:
        return np.tile(np.arange(d), (n, 1))
    index = np.empty((n, k), np.int64)
    step = max(1, CHUNK // d)
    for first in range(0, n, step):
        # The bits of a magnitude, as a whole number, are in the same order and sooner compared.
        a = np.abs(x[first : first + step]).view(f"i{x.itemsize}")
        t = np.partition(a, d - k, axis=-1)[:, d - k, None]  # the k-th largest
        keep = a >= t
        at = np.flatnonzero(keep)
        if len(at) > len(a) * k:
            surplus = np.count_nonzero(keep, axis=-1) - k
            rows = np.flatnonzero(surplus)
            tied = a[rows] == t[rows]
            order = tied.cumsum(axis=-1)
            keep[rows] &= ~tied | (order <= order[:, -1:] - surplus[rows, None])
            at = np.flatnonzero(keep)
        index[first : first + step] = at.reshape(-1, k)
        index[first : first + step] -= np.arange(0, a.size, d)[:, None]
    return index


def largest_of_many(x: NDArray, k: int) -> NDArray:
    """The same for one long ``x [d]``, by magnitude: ``[1, k]``.

    A sample gives a threshold below the k-th largest magnitude (almost surely; else everything is
    searched), one pass in cache-sized pieces keeps what reaches it, and these are searched.
    """
    d = len(x)
    sample = np.abs(x[:: max(1, d // SAMPLE)])
    share = len(sample) * k / d
    rank = int(share + 4 * share**0.5 + 4)  # four standard deviations beyond the k-th
    if rank >= len(sample) // 2:
        return largest(x[None], k)
    t = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    index, size = [], []
    buffer, reached = np.empty(CHUNK, x.dtype), np.empty(CHUNK, bool)
    for first in range(0, d, CHUNK):
        piece = x[first : first + CHUNK]
        a = np.abs(piece, out=buffer[: len(piece)])
        at = np.flatnonzero(np.greater_equal(a, t, out=reached[: len(piece)]))
        size.append(a[at])
        at += first
        index.append(at)
    survivors = np.concatenate(index)
    if len(survivors) < k:
        return largest(x[None], k)
    return survivors[largest(np.concatenate(size)[None], k)]


def largest_there(x: Any, k: int) -> Any:
    """The same for a tensor ``x [n, d]``: a tensor ``[n, k]``."""
    a = x.abs()
    t = a.topk(k, sorted=False).values.amin(1, keepdim=True)
    keep = a >= t
    surplus = keep.sum(1, keepdim=True) - k
    if surplus.any():
        tied = a == t
        order = tied.cumsum(1)
        keep &= ~tied | (order <= order[:, -1:] - surplus)
    return keep.nonzero()[:, 1].reshape(-1, k)


class TopK(Sparsifier):
    """The k largest magnitudes."""

    draws = False

    def __init__(self, k: int | float) -> None:
        self.k = k

    def kept(self, d: int) -> int:
        return count(self.k, d)

    def alpha(self, d: int) -> float:
        """k / d."""
        return self.kept(d) / d

    def sparsify(self, x: Any, rng: np.random.Generator, values: Compressor | None) -> Message:
        d = x.shape[1]
        k = self.kept(d)
        if is_tensor(x):
            index = largest_there(x, k)
        elif d < LARGE:
            index = largest(x, k)
        else:
            index = np.concatenate([largest_of_many(row, k) for row in x])
        return Sparse(d, fetch(index), carry(gather(x, index), values, rng))


@COMPRESSORS.register("topk")
def topk(k: Kept = 0.01) -> TopK:
    """The k largest magnitudes; k is a count or a share of d."""
    return TopK(k)
