"""A data set divided among workers, and the samples behind each of their jobs."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import Streams, rng
from offbeat.runtime.base.registry import Count
from offbeat.workers.data import load
from offbeat.workers.partition import PARTITIONS, Parts, held_out

Sampling = Literal["replacement", "passes"]
BatchSize = Count | Literal["full"]
DType = Literal["float32", "float64"]
Features = Any  # [N, f], an array or csr_array
Inputs = Any  # [k, B, f], an array or SparseRows

GATHER_BYTES = 2**21  # rows gathered at a time; larger gains nothing and leaves the cache
FEW = 16  # up to so many jobs, a worker's next draws are taken from a block made ahead
BLOCK = 128  # draws a block
NOTHING = 0, np.empty((0, 0), np.int64)  # a block of no draws
AHEAD = 256  # workers up to which it pays: more make larger batches, and fewer draws each


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
        self._ahead: dict[int, tuple[int, NDArray]] = {}  # worker -> first draw, [BLOCK, B] rows

    def share(self, worker: int) -> slice:
        """All samples of a worker."""
        return slice(self.starts[worker], self.starts[worker] + self.sizes[worker])

    def rows(self, worker: NDArray, draw: NDArray) -> NDArray[np.int64]:
        """``[k, B]``: the samples of each job."""
        if self.sampling == "passes":
            return np.stack([self._in_pass(*job) for job in zip(worker, draw, strict=True)])
        if len(worker) > FEW or len(self.sizes) > AHEAD:
            return self._drawn(worker, draw)
        found = []
        for w, t in zip(worker.tolist(), draw.tolist(), strict=True):
            first, block = self._ahead.get(w, NOTHING)
            if not first <= t < first + len(block):
                first = t - t % BLOCK
                block = self._drawn(np.full(BLOCK, w), np.arange(first, first + BLOCK))
                self._ahead[w] = first, block
            found.append(block[t - first])
        return np.array(found) if len(found) > 1 else found[0][None]

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


class SparseRows:
    """Sparse inputs ``[k, B, f]`` of k jobs: one matrix with a block a job on its diagonal.

    What ``matvec``, ``vecmat`` and ``matmul`` sum of a row does not depend on the other jobs.
    """

    def __init__(self, blocks: csr_array, shape: tuple[int, int, int]) -> None:
        self.blocks, self.shape = blocks, shape

    @classmethod
    def of(cls, rows: csr_array, k: int) -> "SparseRows":
        """``rows [k B, f]`` of k jobs, one after the other."""
        count, width = rows.shape
        if k > 1:
            per_job = np.diff(rows.indptr[:: count // k])
            indices = rows.indices + np.repeat(np.arange(k) * width, per_job)
            rows = csr_array((rows.data, indices, rows.indptr), shape=(count, k * width))
        return cls(rows, (k, count // k, width))

    def transpose(self, *axes: int) -> "SparseRows":
        """``[k, f, B]``."""
        assert axes == (0, 2, 1)
        k, rows, columns = self.shape
        return SparseRows(self.blocks.T, (k, columns, rows))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, a: Any, b: Any) -> Any:
        """Products with as many arrays ``[k, ...]``, as those of dense rows."""
        if ufunc is np.vecmat:
            a, b = b.transpose(0, 2, 1), a
        k, rows, columns = a.shape
        product = a.blocks @ b.reshape(k * columns, *b.shape[2:])
        return product.reshape(k, rows, *b.shape[2:])


class Shards:
    """Features and labels, a worker's rows side by side.

    Args:
        features: ``[N, f]``, an array or CSR.
        labels: ``[N]``, classes 0..C-1.
        parts: row indices of each worker.
        batch, sampling, seed: see ``Draws``.
        test: features and labels held out, for accuracy only.
        classes: C; as many as ``labels`` show if absent.
    """

    def __init__(
        self,
        features: Features,
        labels: NDArray,
        parts: Parts,
        *,
        batch: BatchSize = 32,
        sampling: Sampling = "replacement",
        seed: int = 0,
        test: tuple[Features, NDArray] | None = None,
        classes: int | None = None,
    ) -> None:
        order = np.concatenate(parts)
        dense = isinstance(features, np.ndarray)
        self.features = np.ascontiguousarray(features[order]) if dense else features[order]
        self.labels = labels[order]
        self.workers, self.width = len(parts), features.shape[1]
        self.classes = classes or int(labels.max()) + 1
        self.draws = Draws(parts, batch=batch, sampling=sampling, seed=seed)
        self.test = test
        self.most = 1  # jobs whose samples are gathered at a time
        if batch != "full":
            self.most = max(1, GATHER_BYTES * len(order) // (batch * nbytes(self.features)))

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
        target: str | None = None,
        sparse: bool = False,
    ) -> "Shards":
        """Load ``data``, hold out a random fraction of it for testing, divide the rest."""
        features, labels = load(data, dtype, target=target, sparse=sparse)
        classes = int(labels.max()) + 1
        if intercept:
            ones = np.ones((len(labels), 1), features.dtype)
            dense = isinstance(features, np.ndarray)
            features = np.hstack([features, ones]) if dense else hstack([features, ones], "csr")
        test = None
        if holdout:
            kept, away = held_out(len(labels), holdout, seed)
            test = features[away], labels[away]
            features, labels = features[kept], labels[kept]
            if len(np.unique(labels)) < 2:
                raise ConfigError(f"holdout={holdout} leaves one class only; hold out less")
        parts = PARTITIONS.parse(partition)(labels, workers, seed)
        return cls(
            features,
            labels,
            parts,
            batch=batch,
            sampling=sampling,
            seed=seed,
            test=test,
            classes=classes,
        )

    @property
    def weights(self) -> NDArray:
        """``[N]`` weights with which the mean of the workers' means is one sum over samples."""
        each = 1.0 / (self.workers * self.draws.sizes)
        return np.repeat(each, self.draws.sizes).astype(self.features.dtype)

    def prepare(self, inputs: Callable[[Features, NDArray], Features], labelled: bool) -> None:
        """Keep what a model wants in place of the features, once and for all.

        Args:
            inputs: ``(features [N, f], labels [N]) -> [N, f]``; it may change the features.
            labelled: whether ``samples`` shall answer labels.
        """
        assert not hasattr(self, "_labelled"), "shards belong to one task"
        self._labelled = labelled
        self.features = inputs(self.features, self.labels)
        if self.test is not None:
            self.test = inputs(self.test[0].copy(), self.test[1]), self.test[1]

    def samples(self, worker: NDArray, draw: NDArray) -> tuple[Inputs, NDArray | None]:
        """Inputs ``[k, B, f]`` and labels ``[k, B]``, if wanted, of at most ``most`` jobs."""
        if self.draws.batch == "full":
            return self.all(self.draws.share(int(worker[0])))
        rows = self.draws.rows(worker, draw)
        labels = self.labels[rows] if self._labelled else None
        if isinstance(self.features, np.ndarray):
            return self.features.take(rows, axis=0), labels
        return SparseRows.of(self.features[rows.ravel()], len(rows)), labels

    def all(self, mine: slice = slice(None)) -> tuple[Inputs, NDArray]:
        """Inputs ``[1, N, f]`` and labels ``[1, N]`` of the samples ``mine``."""
        labels = self.labels[None, mine]
        if isinstance(self.features, np.ndarray):
            return self.features[None, mine], labels
        return SparseRows.of(self.features[mine], 1), labels


def nbytes(features: Features) -> int:
    """How large they are in memory."""
    if isinstance(features, np.ndarray):
        return features.nbytes
    return int(features.data.nbytes + features.indices.nbytes + features.indptr.nbytes)
