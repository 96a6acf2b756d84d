"""Sparsifiers whose messages differ in size: hard threshold, and all or nothing.

Hard threshold: Sahu et al., Rethinking gradient sparsification as total error minimization,
NeurIPS 2021 (arXiv:2108.00951).  Keep |x_j| >= lam with one lam for the whole of training:
||C(x) - x||^2 <= d lam^2, an absolute error, so there is no alpha.

Bernoulli: x with probability p, else 0; alpha = p, exactly.
"""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.compression.contract import COMPRESSORS, Compressor, Message, Stack
from offbeat.algorithms.compression.sparse import Sparse, Sparsifier, carry
from offbeat.runtime.base.registry import Positive
from offbeat.runtime.base.tensors import fetch, library


def _ragged(x: Any, keep: Any, values: Compressor | None, rng: np.random.Generator) -> Message:
    rows: list[Message] = []
    for row, mask in zip(x, keep, strict=True):
        index = library(mask).argwhere(mask)[:, 0]
        held = fetch(row[index])
        rows.append(Sparse(len(row), fetch(index)[None], carry(held[None], values, rng)))
    return rows[0] if len(rows) == 1 else Stack(rows)


class Threshold(Sparsifier):
    """Magnitudes of lam or more."""

    draws = False

    def __init__(self, lam: float) -> None:
        self.lam = lam

    def kept(self, d: int) -> int:
        return d

    def sparsify(self, x: Any, rng: np.random.Generator, values: Compressor | None) -> Message:
        return _ragged(x, library(x).abs(x) >= self.lam, values, rng)


@COMPRESSORS.register("threshold")
def threshold(lam: Positive) -> Threshold:
    """Magnitudes of ``lam`` or more: the absolute error is bounded, the size is not."""
    return Threshold(lam)


class Bernoulli(Sparsifier):
    """Everything with probability p, else nothing."""

    apart = False

    def __init__(self, p: float) -> None:
        self.p = p

    def kept(self, d: int) -> int:
        return d

    def alpha(self, d: int) -> float:
        """p."""
        return self.p

    def sparsify(self, x: NDArray, rng: np.random.Generator, values: Compressor | None) -> Message:
        sent = rng.random(len(x)) < self.p
        return _ragged(x, np.broadcast_to(sent[:, None], x.shape), values, rng)


@COMPRESSORS.register("bernoulli")
def bernoulli(p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5) -> Bernoulli:
    """All of x with probability ``p``, else zero."""
    return Bernoulli(p)
