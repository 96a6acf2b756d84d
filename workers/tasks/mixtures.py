"""Mixtures of Gaussians as classes: the toy problem of asynchronous Local-SGD.

google-deepmind/asyncdiloco, the code released with arXiv:2401.09135: every class is a mixture of
clusters whose centres lie on the unit sphere; a perceptron with one hidden layer tells the classes
apart; the loss is measured on part of the training data.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, NonNegative, Seed
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.tasks.contract import TASKS
from offbeat.workers.tasks.empirical import EmpiricalRisk, cross_entropy
from offbeat.workers.tasks.mlp import MLP
from offbeat.workers.tasks.shards import Sampling, Shards

EVALUATED = 2048  # samples at a time


class Perceptron(MLP):
    """An ``MLP`` that begins as torch's layers do."""

    def initial(self, seed: int) -> NDArray:
        """Weights and biases from U(-1, 1) / sqrt(in)."""
        draws = rng(seed, "initial")
        sizes = [(i, i * o + o) for i, o in self.shapes]
        return np.concatenate([draws.uniform(-1, 1, size) / np.sqrt(i) for i, size in sizes])


class Mixtures(EmpiricalRisk):
    """Cross-entropy over the shards; evaluated on every so-many-th of all samples."""

    def __init__(self, shards: Shards, model: MLP, evaluated: int) -> None:
        super().__init__(shards, model)
        count = len(shards.labels)
        self._seen = np.linspace(0, count - 1, min(evaluated, count)).astype(int)

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """loss and accuracy on the samples looked at."""
        model, total, right = self.model, 0.0, 0
        assert isinstance(model, MLP)
        for rows in np.array_split(self._seen, -(-len(self._seen) // EVALUATED)):
            a, y = self.shards.features[rows], self.shards.labels[rows]
            logits = model.logits(x, a)
            right += int((logits.argmax(axis=1) == y).sum())
            weights = np.full(len(rows), 1.0 / len(self._seen))
            total += float(cross_entropy(logits[None].astype(float), y[None], weights)[0][0])
        return {"loss": total, "accuracy": right / len(self._seen)}


@TASKS.register("mixtures")
def mixtures(
    hidden: Count = 128,
    *,
    workers: Count = 4,
    samples: Count = 4096,
    features: Count = 512,
    classes: Count = 4,
    clusters: Count = 1,
    noise: NonNegative = 0.5,
    batch: Count = 32,
    partition: str = "iid",
    sampling: Sampling = "passes",
    evaluated: Count = 10_000,
    dtype: Literal["float32", "float64"] = "float32",
    seed: Seed = 0,
) -> Mixtures:
    """Classes that are mixtures of Gaussians, and a perceptron: asyncdiloco's toy.

    The defaults are its small problem; ``samples=128000, clusters=8`` its large one (with
    ``hidden=65000``).

    Args:
        hidden: width of the hidden layer.
        workers: n.
        samples: N, in equal clusters.
        features: dimension of the data.
        classes, clusters: classes, and clusters a class.
        noise: standard deviation of each coordinate around its centre.
        batch, partition, sampling: see ``logistic``.
        evaluated: samples on which the loss is measured, of the training data.
        dtype: of data and parameters.
        seed: of data, division and sampling.
    """
    count = classes * clusters
    if classes < 2:
        raise ConfigError(f"mixtures: needs two classes or more, not {classes}")
    if samples < count:
        raise ConfigError(
            f"mixtures: {samples} samples cannot fill {classes} x {clusters} clusters"
        )
    draws = rng(seed, "mixtures")
    centres = draws.standard_normal((count, features))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    cluster = np.repeat(np.arange(count), samples // count)
    data = draws.standard_normal((len(cluster), features), np.float32).astype(dtype)
    data *= noise
    data += centres.astype(dtype)[cluster]
    labels = cluster // clusters
    parts = PARTITIONS.parse(partition)(labels, workers, seed)
    shards = Shards(data, labels, parts, batch=batch, sampling=sampling, seed=seed, classes=classes)
    return Mixtures(shards, Perceptron([features, hidden, classes]), evaluated)
