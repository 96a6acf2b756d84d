"""How a data set is divided among workers.

A partition is a function of ``(labels [N], workers, seed)`` to a list of index arrays, one a
worker, disjoint, none empty.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, Positive, Registry

PARTITIONS = Registry("partition")
Parts = list[NDArray[np.int64]]
MAX_DIRICHLET_TRIES = 1000


class Partition:
    """A way to divide; ``spec`` says which."""

    spec: object = None

    def __init__(
        self, divide: Callable[[NDArray, int, np.random.Generator], Parts], *, labelled: bool = True
    ) -> None:
        self._divide, self.labelled = divide, labelled  # whether it looks at labels

    def __call__(self, labels: NDArray, workers: int, seed: int) -> Parts:
        """Index arrays, one a worker.

        Raises:
            ConfigError: more workers than samples, or a division that leaves a worker empty.
        """
        if workers > len(labels):
            raise ConfigError(
                f"{workers} workers but only {len(labels)} samples: each worker needs at least one"
            )
        parts = self._divide(labels, workers, rng(seed, "partition"))
        if empty := [w for w, part in enumerate(parts) if len(part) == 0]:
            raise ConfigError(
                f"partition {self.spec} leaves worker {empty[0]} without samples; "
                "take fewer workers or a milder skew"
            )
        return parts


def held_out(count: int, fraction: float, seed: int) -> tuple[NDArray, NDArray]:
    """Which of ``count`` samples are kept, and which fraction is held out, at random; both sorted.

    Raises:
        ConfigError: a side is empty.
    """
    away = round(fraction * count)
    if fraction and away in (0, count):
        raise ConfigError(f"holdout={fraction} of {count} samples leaves a side empty")
    order = rng(seed, "holdout").permutation(count) if fraction else np.arange(count)
    return np.sort(order[away:]), np.sort(order[:away])


def divided(
    partition: str, kept: NDArray, workers: int, seed: int, labels: Callable[[], NDArray]
) -> Parts:
    """The samples ``kept``, divided; ``labels`` answers those of all, where they are looked at."""
    division = PARTITIONS.parse(partition)
    known = labels()[kept] if division.labelled else np.zeros(len(kept))
    return [kept[part] for part in division(known, workers, seed)]


def _cut(order: NDArray, workers: int) -> Parts:
    """Equal shares of ``order``: the first ones are one longer where it does not divide."""
    return [np.asarray(part) for part in np.array_split(order, workers)]


@PARTITIONS.register("iid")
def iid() -> Partition:
    """Every worker gets an equal random share."""
    return Partition(lambda labels, n, rng: _cut(rng.permutation(len(labels)), n), labelled=False)


@PARTITIONS.register("contiguous")
def contiguous() -> Partition:
    """Equal blocks of consecutive rows, in file order; the remainder N mod n is left out."""
    return Partition(
        lambda labels, n, rng: _cut(np.arange(len(labels) - len(labels) % n), n), labelled=False
    )


@PARTITIONS.register("sorted")
def sorted_by_label() -> Partition:
    """Equal blocks after a stable sort by label: each worker sees as few classes as possible."""
    return Partition(lambda labels, n, rng: _cut(np.argsort(labels, kind="stable"), n))


@PARTITIONS.register("classes")
def classes(per_worker: Count = 2) -> Partition:
    """Every worker gets shards of about ``per_worker`` classes (McMahan et al. 2017).

    The samples are sorted by label, cut into ``workers * per_worker`` shards, and each worker
    is dealt ``per_worker`` of them at random; a shard that spans a border adds a class.
    """

    def divide(labels: NDArray, n: int, rng: np.random.Generator) -> Parts:
        order = np.lexsort((rng.random(len(labels)), labels))
        shards = _cut(order, n * per_worker)
        dealt = rng.permutation(n * per_worker).reshape(n, per_worker)
        return [np.concatenate([shards[s] for s in mine]) for mine in dealt]

    return Partition(divide)


@PARTITIONS.register("dirichlet")
def dirichlet(alpha: Positive = 0.5) -> Partition:
    """Each class is divided by proportions drawn from Dirichlet(alpha) (Hsu et al. 2019).

    Small alpha is strong skew.  Redrawn until every worker has a sample.
    """

    def divide(labels: NDArray, n: int, rng: np.random.Generator) -> Parts:
        for _ in range(MAX_DIRICHLET_TRIES):
            parts: list[list[NDArray]] = [[] for _ in range(n)]
            for label in np.unique(labels):
                rows = rng.permutation(np.flatnonzero(labels == label))
                ends = (np.cumsum(rng.dirichlet(np.full(n, alpha))) * len(rows)).astype(int)
                for worker, share in enumerate(np.split(rows, ends[:-1])):
                    parts[worker].append(share)
            merged = [np.concatenate(shares) for shares in parts]
            if min(len(part) for part in merged) > 0:
                return merged
        raise ConfigError(
            f"dirichlet({alpha}) left a worker without samples {MAX_DIRICHLET_TRIES} times over; "
            "take a larger alpha or fewer workers"
        )

    return Partition(divide)
