"""Logistic regression, binary and multinomial."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from offbeat.runtime.base.registry import Count, Finite, Fraction, NonNegative, Seed
from offbeat.workers.data import Data
from offbeat.workers.tasks.contract import TASKS
from offbeat.workers.tasks.empirical import EmpiricalRisk, cross_entropy
from offbeat.workers.tasks.shards import BatchSize, DType, Features, Inputs, Sampling, Shards


class Binary:
    """log(1 + exp(-y <a, x>)), labels 0/1 read as y = -1/+1; d = features.

    Its inputs are -y a, which is all that loss and gradient ask for.
    """

    labelled = False

    def __init__(self, features: int, start: float = 0.0) -> None:
        self.dim, self.start = features, start

    def initial(self, seed: int) -> NDArray:
        """``start`` in every coordinate."""
        return np.full(self.dim, self.start)

    def inputs(self, features: Features, labels: NDArray) -> Features:
        """-y a."""
        self._zero = np.zeros((), features.dtype)
        sign = (1 - 2 * labels).astype(features.dtype)
        if isinstance(features, np.ndarray):
            features *= sign[:, None]
        else:
            features.data *= np.repeat(sign, np.diff(features.indptr))
        return features

    def gradient(
        self, x: NDArray, a: Inputs, y: NDArray | None, c: NDArray
    ) -> tuple[NDArray, NDArray]:
        u = np.matvec(a, x)  # minus the margin
        losses = np.vecdot(np.logaddexp(self._zero, u), c)
        p = expit(u, out=u)
        p *= c
        return losses, np.vecmat(p, a)

    def hits(self, x: NDArray, a: Features, y: NDArray) -> NDArray:
        """See ``Model``; a sample on the boundary is missed."""
        return a @ x < 0


class Multinomial:
    """Softmax regression; parameters ``[features, classes]``, flat."""

    labelled = True

    def __init__(self, features: int, classes: int, start: float = 0.0) -> None:
        self.shape = features, classes
        self.dim, self.start = features * classes, start

    def initial(self, seed: int) -> NDArray:
        """``start`` in every coordinate."""
        return np.full(self.dim, self.start)

    def inputs(self, features: Features, labels: NDArray) -> Features:
        """The features."""
        return features

    def gradient(
        self, x: NDArray, a: Inputs, y: NDArray | None, c: NDArray
    ) -> tuple[NDArray, NDArray]:
        logits = np.matmul(a, x.reshape(-1, *self.shape))
        losses, residual = cross_entropy(logits, y, c)
        return losses, np.matmul(a.transpose(0, 2, 1), residual).reshape(x.shape)

    def hits(self, x: NDArray, a: Features, y: NDArray) -> NDArray:
        return (a @ x.reshape(self.shape)).argmax(axis=1) == y


@TASKS.register("logistic")
def logistic(
    data: Data = "digits",
    *,
    target: str | None = None,
    workers: Count = 10,
    partition: str = "iid",
    batch: BatchSize = 32,
    sampling: Sampling = "replacement",
    l2: NonNegative = 0.0,
    nonconvex: NonNegative = 0.0,
    intercept: bool = False,
    start: Finite = 0.0,
    holdout: Fraction = 0.0,
    dtype: DType = "float32",
    seed: Seed = 0,
) -> EmpiricalRisk:
    """Logistic regression: binary for two classes, multinomial for more.

    Args:
        data: a bundled data set or a file; see ``offbeat list data``.  Large sparse files stay
            sparse.
        target: the column of a .csv that holds the labels.
        workers: n.
        partition: iid, contiguous, sorted, classes(c) or dirichlet(alpha).
        batch: samples a gradient, or "full".
        sampling: "replacement", or "passes" (each worker's share reshuffled at each pass).
        l2, nonconvex: r(x) = l2 sum x_j^2 + nonconvex sum x_j^2 / (1 + x_j^2).
        intercept: append a constant feature 1.
        start: the value of every coordinate of x_0.
        holdout: fraction held out, on which accuracy is measured.
        dtype: precision of model and data.
        seed: of division and sampling.
    """
    shards = Shards.read(
        data,
        workers,
        partition=partition,
        batch=batch,
        sampling=sampling,
        holdout=holdout,
        intercept=intercept,
        dtype=dtype,
        seed=seed,
        target=target,
        sparse=True,
    )
    if shards.classes == 2:
        return EmpiricalRisk(shards, Binary(shards.width, start), l2=l2, nonconvex=nonconvex)
    model = Multinomial(shards.width, shards.classes, start)
    return EmpiricalRisk(shards, model, l2=l2, nonconvex=nonconvex)
