"""A data set divided among workers, and the samples behind each of their jobs."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from offbeat.runtime.errors import ConfigError
from offbeat.runtime.randomness import Streams, rng
from offbeat.runtime.registry import Count
from offbeat.workers.data import load
from offbeat.workers.partition import PARTITIONS, Parts

Sampling = Literal["replacement", "passes"]
BatchSize = Count | Literal["full"]
DType = Literal["float32", "float64"]

GATHER_BYTES = 2**21  # rows gathered at a time; larger gains nothing and leaves the cache
FEW = 16  # up to so many jobs, a worker's next draws are taken from a block made ahead
BLOCK = 128  # draws a block
AHEAD = 2048  # workers for which blocks are kept at most


class Draws:
    """Which of its samples a worker looks at in each job; samples are counted worker by worker.

    Args:
        parts: indices of each worker's samples.
        batch: samples a job, or "full" for the worker's whole share.
        sampling: "replacement" draws each sample independently; "passes" goes through the
            worker's share in an order reshuffled at each pass.
        seed: of the draws.
    """

    def __init__(self, parts: Parts, *, batch: BatchSize, sampling: Sampling, seed: int) -> None:
        self.sizes = np.array([len(part) for part in parts])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch, self.sampling, self.seed = batch, sampling, seed
        self._streams = Streams(seed, "sample", len(parts))
        self._below = self.sizes.astype(np.uint64)[:, None]
        self._first = self.starts[:, None]
        self._orders: dict[tuple[int, int], NDArray] = {}  # (worker, pass) -> permutation
        self._ahead: dict[int, tuple[int, NDArray]] = {}  # worker -> block number, [BLOCK, B] rows

    def share(self, worker: int) -> slice:
        """All samples of a worker."""
        return slice(self.starts[worker], self.starts[worker] + self.sizes[worker])

    def rows(self, worker: NDArray, draw: NDArray) -> NDArray[np.int64]:
        """``[k, B]``: the samples of each job."""
        if self.sampling == "passes":
            return np.stack([self._in_pass(*job) for job in zip(worker, draw, strict=True)])
        if len(worker) > FEW or len(self.sizes) > AHEAD:
            return self._drawn(worker, draw)
        found = [self._next(w, t) for w, t in zip(worker.tolist(), draw.tolist(), strict=True)]
        return np.array(found) if len(found) > 1 else found[0][None]

    def _next(self, worker: int, draw: int) -> NDArray[np.int64]:
        """``[B]`` samples of one job, from the block of the worker's draws around it."""
        number, at = divmod(draw, BLOCK)
        known = self._ahead.get(worker)
        if known is None or known[0] != number:
            draws = np.arange(number * BLOCK, (number + 1) * BLOCK)
            known = number, self._drawn(np.full(BLOCK, worker), draws)
            self._ahead[worker] = known
        return known[1][at]

    def _drawn(self, worker: NDArray, draw: NDArray) -> NDArray[np.int64]:
        picked = self._streams.integers(worker, draw, int(self.batch), self._below[worker])
        picked += self._first[worker]
        return picked

    def _in_pass(self, worker: int, draw: int) -> NDArray[np.int64]:
        size, batch = int(self.sizes[worker]), int(self.batch)
        at, within = np.divmod(np.arange(draw * batch, (draw + 1) * batch), size)
        found = np.empty(batch, np.int64)
        for number in np.unique(at).tolist():
            key = (int(worker), number)
            if key not in self._orders:
                order = rng(self.seed, "pass", *key).permutation(size)
                self._orders[key] = order + self.starts[worker]
                for old in [k for k in self._orders if k[0] == key[0] and k[1] < number - 1]:
                    del self._orders[old]
            here = at == number
            found[here] = self._orders[key][within[here]]
        return found


class Shards:
    """Features and labels, a worker's rows side by side.

    Args:
        features: ``[N, f]``.
        labels: ``[N]``, classes 0..C-1.
        parts: row indices of each worker.
        batch, sampling, seed: see ``Draws``.
        test: features and labels held out, for accuracy only.
    """

    def __init__(
        self,
        features: NDArray,
        labels: NDArray,
        parts: Parts,
        *,
        batch: BatchSize = 32,
        sampling: Sampling = "replacement",
        seed: int = 0,
        test: tuple[NDArray, NDArray] | None = None,
    ) -> None:
        order = np.concatenate(parts)
        self.features = np.ascontiguousarray(features[order])
        self.labels = labels[order]
        self.targets = self.labels  # what a model makes of the labels
        self.workers, self.width = len(parts), features.shape[1]
        self.classes = int(labels.max()) + 1
        self.draws = Draws(parts, batch=batch, sampling=sampling, seed=seed)
        self.test = test
        if batch != "full":
            row_bytes = batch * self.width * self.features.itemsize
            self._chunk = max(1, GATHER_BYTES // row_bytes)
            self._gathered = np.empty((0, self.width), self.features.dtype)

    @classmethod
    def read(
        cls,
        data: str,
        workers: int,
        *,
        partition: str,
        batch: BatchSize,
        sampling: Sampling,
        holdout: float,
        dtype: str,
        seed: int,
        intercept: bool = False,
    ) -> "Shards":
        """Load ``data``, hold out a random fraction of it for testing, divide the rest."""
        features, labels = load(data, dtype)
        if intercept:
            features = np.column_stack([features, np.ones(len(features), features.dtype)])
        test = None
        if holdout:
            order = rng(seed, "holdout").permutation(len(labels))
            kept = np.sort(order[round(holdout * len(labels)) :])
            away = np.sort(order[: round(holdout * len(labels))])
            if len(away) == 0 or len(kept) == 0:
                raise ConfigError(f"holdout={holdout} of {len(labels)} samples leaves a side empty")
            test = features[away], labels[away]
            features, labels = features[kept], labels[kept]
        parts = PARTITIONS.parse(partition)(labels, workers, seed)
        return cls(features, labels, parts, batch=batch, sampling=sampling, seed=seed, test=test)

    @property
    def weights(self) -> NDArray:
        """``[N]`` weights with which the mean of the workers' means is one sum over samples."""
        each = 1.0 / (self.workers * self.draws.sizes)
        return np.repeat(each, self.draws.sizes).astype(self.features.dtype)

    def batches(self, worker: NDArray, draw: NDArray) -> Iterator[tuple[slice, NDArray, NDArray]]:
        """``(which jobs, features [k, B, f], targets [k, B])``, a cacheful of jobs at a time.

        The arrays are good until the next one is asked for.
        """
        if self.draws.batch == "full":
            for j, w in enumerate(worker.tolist()):
                mine = self.draws.share(w)
                yield slice(j, j + 1), self.features[None, mine], self.targets[None, mine].copy()
            return
        rows = self.draws.rows(worker, draw)
        for first in range(0, len(rows), self._chunk):
            some = rows[first : first + self._chunk]
            if len(self._gathered) < some.size:
                self._gathered = np.empty((some.size, self.width), self.features.dtype)
            out = self._gathered[: some.size]
            self.features.take(some.ravel(), axis=0, out=out, mode="clip")
            jobs = slice(first, first + len(some))
            yield jobs, out.reshape(*some.shape, self.width), self.targets.take(some)
