"""Empirical risk: a model's mean loss over data that the workers share out, and a regulariser."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.registry import Spec
from offbeat.workers.tasks.shards import Shards


class Model(Protocol):
    """A differentiable predictor over flat parameters, k copies at once."""

    dim: int

    def initial(self, seed: int) -> NDArray:
        """The starting parameters ``[d]``."""
        ...

    def gradient(self, x: NDArray, a: NDArray, y: NDArray, c: NDArray | float) -> tuple:
        """Losses ``[k]`` and gradients ``[k, d]`` of sum_b c_b loss(x_j; a_jb, y_jb)."""
        ...

    def predict(self, x: NDArray, a: NDArray) -> NDArray:
        """Classes ``[N]`` of the samples ``a [N, f]`` under parameters ``x [d]``."""
        ...


class EmpiricalRisk:
    """f_i(x) = mean over worker i's samples of loss(x; a, y) + r(x); f is the mean of the f_i.

    r(x) = l2 sum x_j^2 + nonconvex sum x_j^2 / (1 + x_j^2), the two regularisers of AsGrad's
    released experiments (their l2 has no factor 1/2).

    Args:
        shards: the data and its division.
        model: the predictor.
        l2, nonconvex: weights of the regularisers.
    """

    spec: Spec | None = None

    def __init__(
        self, shards: Shards, model: Model, *, l2: float = 0.0, nonconvex: float = 0.0
    ) -> None:
        self.shards, self.model, self.l2, self.nonconvex = shards, model, l2, nonconvex
        self.workers, self.dim = shards.workers, model.dim
        self._weights = shards.weights

    def initial(self, seed: int) -> NDArray:
        """The model's starting point ``[d]``, in the data's precision."""
        return self.model.initial(seed).astype(self.shards.features.dtype)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` and gradients ``[k, d]``; see ``Task``."""
        losses = np.empty(len(x), x.dtype)
        gradients = np.empty_like(x)
        for jobs, a, y in self.shards.batches(worker, draw):
            losses[jobs], gradients[jobs] = self.model.gradient(x[jobs], a, y, 1.0 / y.shape[1])
        return self._regularised(x, losses, gradients)

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """loss and grad_norm of f; accuracy, on held-out samples where there are any."""
        one, s = x[None], self.shards
        found = self.model.gradient(one, s.features[None], s.labels[None], self._weights)
        losses, gradients = self._regularised(one, *found)
        a, y = s.test or (s.features, s.labels)
        return {
            "loss": float(losses[0]),
            "grad_norm": float(np.linalg.norm(gradients[0])),
            "accuracy": float((self.model.predict(x, a) == y).mean()),
        }

    def _regularised(
        self, x: NDArray, losses: NDArray, gradients: NDArray
    ) -> tuple[NDArray, NDArray]:
        if self.l2:
            losses = losses + self.l2 * (x * x).sum(axis=1)
            gradients += 2 * self.l2 * x
        if self.nonconvex:
            q = 1 + x * x
            losses = losses + self.nonconvex * (1 - 1 / q).sum(axis=1)
            gradients += 2 * self.nonconvex * x / (q * q)
        return losses, gradients


def cross_entropy(z: NDArray, y: NDArray, c: NDArray | float) -> tuple[NDArray, NDArray]:
    """Losses ``[k]`` and residuals ``[k, B, C]`` (the gradient in z) of logits ``z [k, B, C]``.

    ``y [k, B]`` are the classes, ``c`` the weight of each sample (a number or ``[B]``).
    ``z`` is overwritten.
    """
    k, b, classes = z.shape
    z -= z.max(axis=2, keepdims=True)
    flat, mine = z.reshape(-1, classes), (np.arange(k * b), y.ravel())
    picked = flat[mine].reshape(k, b)
    np.exp(z, out=z)
    total = z.sum(axis=2)
    losses = ((np.log(total) - picked) * c).sum(axis=1)
    z /= total[:, :, None]
    flat[mine] -= 1
    z *= c if isinstance(c, float) else c[:, None]
    return losses, z
