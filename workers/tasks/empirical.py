"""Empirical risk: a model's mean loss over data that the workers share out, and a regulariser."""

import copy
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.registry import Spec
from offbeat.workers.tasks.contract import ours
from offbeat.workers.tasks.shards import Features, Inputs, Shards


class Model(Protocol):
    """A differentiable predictor over flat parameters, k copies at once."""

    dim: int

    def initial(self, seed: int) -> NDArray:
        """The starting parameters ``[d]``."""
        ...

    labelled: bool
    """Whether it wants labels beside the inputs."""

    def inputs(self, features: Features, labels: NDArray) -> Features:
        """What it wants to be given in place of the features ``[N, f]``, which it may change."""
        ...

    def gradient(
        self, x: NDArray, a: Inputs, y: NDArray | None, c: NDArray
    ) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` and gradients ``[k, d]`` of sum_b c_b loss(x_j; a_jb, y_jb).

        ``a [k, B, f]`` are inputs, ``y [k, B]`` classes, ``c [B]`` weights.
        """
        ...

    def hits(self, x: NDArray, a: Features, y: NDArray) -> NDArray:
        """Whether x ``[d]`` classifies each sample rightly, ``[N]``; ``a [N, f]`` are inputs."""
        ...


class EmpiricalRisk:
    """f_i(x) = mean over worker i's samples of loss(x; a, y) + r(x); f is the mean of the f_i.

    r(x) = l2 sum x_j^2 + nonconvex sum x_j^2 / (1 + x_j^2), the two regularisers of AsGrad's
    released experiments (their l2 has no factor 1/2).

    Args:
        shards: the data and its division; the task's own from here on.
        model: the predictor.
        l2, nonconvex: weights of the regularisers.
    """

    spec: Spec | None = None

    def __init__(
        self, shards: Shards, model: Model, *, l2: float = 0.0, nonconvex: float = 0.0
    ) -> None:
        self.shards, self.model, self.l2, self.nonconvex = shards, model, l2, nonconvex
        self.workers, self.dim, self.sizes = shards.workers, model.dim, shards.draws.sizes
        self.tensors: list[int] = getattr(model, "tensors", [model.dim])
        shards.prepare(model.inputs, model.labelled)
        self._weights = shards.weights
        self._theirs = not ours(model)  # then it may change what it is given
        self._even: dict[int, NDArray] = {}  # batch size -> [B], all 1/B

    def initial(self, seed: int) -> NDArray:
        """The model's starting point ``[d]``, in the data's precision."""
        return self.model.initial(seed).astype(self.shards.features.dtype)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` and gradients ``[k, d]``; see ``Task``."""
        if len(x) > self.shards.most:
            pieces = [slice(j, j + self.shards.most) for j in range(0, len(x), self.shards.most)]
            found = [self.gradient(x[p], worker[p], draw[p]) for p in pieces]
            losses, gradients = (np.concatenate(parts) for parts in zip(*found, strict=True))
            return losses, gradients
        a, y = self._private(*self.shards.samples(worker, draw))
        losses, gradients = self.model.gradient(x, a, y, self._mean(a.shape[1]))
        if self.l2 or self.nonconvex:
            losses = self._regularise(x, losses, gradients)
        return losses, gradients

    def _mean(self, count: int) -> NDArray:
        """``[B]`` equal weights."""
        if count not in self._even:
            self._even[count] = np.full(count, 1.0 / count, self._weights.dtype)
        return self._even[count]

    def _private(self, *held: Any) -> Any:
        """Inputs and labels as a model of a user's own is given them: copies."""
        return copy.deepcopy(held) if self._theirs else held

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """loss and grad_norm of f; accuracy, on held-out samples where there are any."""
        one, s = x[None], self.shards
        a, y = self._private(*s.all())
        losses, gradients = self.model.gradient(one, a, y, self._weights)
        losses = self._regularise(one, losses, gradients)
        right = self.model.hits(x, *self._private(*(s.test or (s.features, s.labels))))
        return {
            "loss": float(losses[0]),
            "grad_norm": float(np.linalg.norm(gradients[0])),
            "accuracy": float(right.mean()),
        }

    def _regularise(self, x: NDArray, losses: NDArray, gradients: NDArray) -> NDArray:
        """Add r to ``losses`` (answered) and its gradient to ``gradients`` (in place)."""
        if self.l2:
            losses = losses + self.l2 * (x * x).sum(axis=1)
            gradients += 2 * self.l2 * x
        if self.nonconvex:
            q = 1 + x * x
            losses = losses + self.nonconvex * (1 - 1 / q).sum(axis=1)
            gradients += 2 * self.nonconvex * x / (q * q)
        return losses


def cross_entropy(z: NDArray, y: NDArray | None, c: NDArray) -> tuple[NDArray, NDArray]:
    """Losses ``[k]`` and residuals ``[k, B, C]`` (the gradient in z) of logits ``z [k, B, C]``.

    ``y [k, B]`` are the classes, ``c [B]`` the weights of the samples.  ``z`` is overwritten.
    """
    assert y is not None
    k, b, classes = z.shape
    z -= z.max(axis=2, keepdims=True)
    flat, mine = z.reshape(-1, classes), (np.arange(k * b), y.ravel())
    picked = flat[mine].reshape(k, b)
    np.exp(z, out=z)
    total = z.sum(axis=2)
    # Row by row: one matrix product for all rows would round differently for different k.
    losses = np.vecdot(np.log(total) - picked, c)
    z /= total[:, :, None]
    flat[mine] -= 1
    z *= c[:, None]
    return losses, z
