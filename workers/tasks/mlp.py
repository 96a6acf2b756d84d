"""A multilayer perceptron in closed form, k copies at once."""

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, Fraction, NonNegative, Seed
from offbeat.workers.data import Data
from offbeat.workers.tasks.contract import TASKS
from offbeat.workers.tasks.empirical import EmpiricalRisk, cross_entropy
from offbeat.workers.tasks.shards import BatchSize, DType, Sampling, Shards


class MLP:
    """Fully connected layers with bias, ReLU or tanh between them, cross-entropy on top.

    Parameters are, layer by layer, the weights ``[in, out]`` and the bias ``[out]``.

    Args:
        sizes: features, hidden widths, classes.
        activation: "relu" or "tanh".
    """

    labelled = True

    def __init__(self, sizes: list[int], activation: str = "relu") -> None:
        self.shapes = list(pairwise(sizes))
        self.relu = activation == "relu"
        self.tensors = [size for i, o in self.shapes for size in (i * o, o)]
        self.dim = sum(self.tensors)

    def initial(self, seed: int) -> NDArray:
        """Weights from N(0, 2/in) (ReLU; He et al. 2015) or N(0, 1/in) (tanh), biases zero."""
        gain, draws = (2.0 if self.relu else 1.0), rng(seed, "initial")
        pieces = []
        for i, o in self.shapes:
            pieces += [draws.standard_normal(i * o) * np.sqrt(gain / i), np.zeros(o)]
        return np.concatenate(pieces)

    def _layers(self, x: NDArray) -> list[tuple[NDArray, NDArray]]:
        """Views ``(weights [k, in, out], bias [k, 1, out])`` into rows ``x [k, d]``."""
        layers, at = [], 0
        for i, o in self.shapes:
            weights = x[:, at : at + i * o].reshape(-1, i, o)
            at += i * o
            layers.append((weights, x[:, at : at + o].reshape(-1, 1, o)))
            at += o
        return layers

    def _forward(self, layers: list[tuple[NDArray, NDArray]], a: NDArray) -> list[NDArray]:
        """The input of each layer, and the logits last."""
        values = [a]
        for depth, (weights, bias) in enumerate(layers):
            z = np.matmul(values[-1], weights)
            z += bias
            if depth < len(layers) - 1:
                z = np.maximum(z, 0, out=z) if self.relu else np.tanh(z, out=z)
            values.append(z)
        return values

    def inputs(self, features: NDArray, labels: NDArray) -> NDArray:
        """The features."""
        return features

    def gradient(
        self, x: NDArray, a: NDArray, y: NDArray | None, c: NDArray
    ) -> tuple[NDArray, NDArray]:
        layers = self._layers(x)
        *values, logits = self._forward(layers, a)
        losses, delta = cross_entropy(logits, y, c)
        gradient = np.empty(x.shape, x.dtype)
        into = self._layers(gradient)
        for depth in reversed(range(len(layers))):
            h = values[depth]
            np.matmul(h.transpose(0, 2, 1), delta, out=into[depth][0])
            delta.sum(axis=1, keepdims=True, out=into[depth][1])
            if depth:
                delta = np.matmul(delta, layers[depth][0].transpose(0, 2, 1))
                delta *= (h > 0) if self.relu else (1 - h * h)
        return losses, gradient

    def logits(self, x: NDArray, a: NDArray) -> NDArray:
        """``[N, C]`` of inputs ``a [N, f]`` with parameters ``x [d]``."""
        return self._forward(self._layers(x[None]), a[None])[-1][0]

    def hits(self, x: NDArray, a: NDArray, y: NDArray) -> NDArray:
        return self.logits(x, a).argmax(axis=1) == y


@TASKS.register("mlp")
def mlp(
    data: Data = "digits",
    *,
    target: str | None = None,
    workers: Count = 10,
    hidden: list[Count] = [64],  # noqa: B006 - never changed
    activation: Literal["relu", "tanh"] = "relu",
    partition: str = "iid",
    batch: BatchSize = 32,
    sampling: Sampling = "replacement",
    l2: NonNegative = 0.0,
    nonconvex: NonNegative = 0.0,
    holdout: Fraction = 0.0,
    dtype: DType = "float32",
    seed: Seed = 0,
) -> EmpiricalRisk:
    """A multilayer perceptron with cross-entropy loss.

    Args:
        hidden: widths of the hidden layers.
        activation: between layers.

    The other arguments are those of ``logistic``.
    """
    shards = Shards.read(
        data,
        workers,
        partition=partition,
        batch=batch,
        sampling=sampling,
        holdout=holdout,
        dtype=dtype,
        seed=seed,
        target=target,
    )
    model = MLP([shards.width, *hidden, shards.classes], activation)
    return EmpiricalRisk(shards, model, l2=l2, nonconvex=nonconvex)
