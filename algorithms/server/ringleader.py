"""Ringleader ASGD: The First Asynchronous SGD with Optimal Time Complexity under Data
Heterogeneity.

Maranjyan, Richtarik, ICLR 2026 (arXiv:2509.22860).  A table holds, for each worker, the sum and
the number of its gradients.  A round has two phases: (1) gradients are collected until every
worker has one; (2) exactly n steps, one at the arrival of each worker's next gradient, each
with the mean over workers of their means; that worker then gets the new model.  What a worker
delivers beyond its step is kept for the next round's table.  Every delay is at most 2n - 2.

Read from summaries, not from the paper's algorithm box.  Our reading, UNVERIFIED: phase 2 begins
with the arrival that fills the table, and a worker whose gradient is kept goes on at the model
it has, since a round gives it one new model.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.runtime.base.registry import Positive


@dataclass
class GradientTable:
    """Gradients of a round, by worker."""

    sums: dict[int, NDArray] = field(default_factory=dict)  # worker -> sum [d]
    counts: dict[int, int] = field(default_factory=dict)  # worker -> how many
    total: NDArray | float = 0.0  # [d], sum over workers of their means

    def add(self, i: int, g: NDArray) -> None:
        """One more gradient ``g [d]`` of worker i."""
        if i in self.sums:
            self.total = self.total - self.sums[i] / self.counts[i]
            g = self.sums[i] + g
        self.sums[i] = g
        self.counts[i] = self.counts.get(i, 0) + 1
        self.total = self.total + g / self.counts[i]


class Ringleader(Algorithm):
    """Gradient table, two phases a round."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.table, self.kept = GradientTable(), GradientTable()  # this round's, the next one's
        self.waiting: list[int] = []  # phase 2: workers that have not had their step

    def arrive(self, server: Server, update: Update) -> None:
        """See the module."""
        i = update.worker
        if self.waiting and i not in self.waiting:  # phase 2, beyond its step: for the next round
            self.kept.add(i, update.payload)
            server.assign(i, like=update)
            return
        self.table.add(i, update.payload)
        if len(self.table.sums) < server.n:  # phase 1
            server.assign(i, like=update)
            return
        if not self.waiting:  # the table is full: phase 2 begins
            self.waiting = list(range(server.n))
        server.apply((self.lr / server.n) * np.asarray(self.table.total))
        self.waiting.remove(i)
        server.assign(i)
        if not self.waiting:
            self.table, self.kept = self.kept, GradientTable()


@ALGORITHMS.register("ringleader")
def ringleader(*, lr: Positive = 0.1) -> Ringleader:
    """Ringleader ASGD: steps with the mean over workers of their mean gradients, from a table."""
    return Ringleader(lr)
