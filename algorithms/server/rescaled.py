"""Rescaled ASGD.

Mahran, Maranjyan, Richtarik, "Rescaled Asynchronous SGD: Optimal Distributed Optimization under
Data and System Heterogeneity", 2026 (arXiv:2605.13434).  Pure asynchronous SGD whose steps are
proportional to the worker's computation time, so that all workers weigh alike over a cycle.
Only the abstract was at hand: compute times are *observed* here, and the factors are normalised
to mean one over arrivals, w_i = s_i (1/n) sum_j 1/s_j (both our reading, UNVERIFIED).
"""

from dataclasses import dataclass, field

from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.method import Finisher, Method, Rule, Schedule, StepSize
from offbeat.runtime.registry import Positive


@dataclass
class Rescale(Rule):
    """w_i g; a worker not heard of yet counts as infinitely slow."""

    speeds: dict[int, float] = field(default_factory=dict)  # worker -> observed jobs a second
    total: float = 0.0  # sum of them

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray | None:
        """See ``Rule``."""
        speed = server.speed(update.worker)
        self.total += speed - self.speeds.get(update.worker, 0.0)
        self.speeds[update.worker] = speed
        return (self.total / (server.n * speed)) * g


@ALGORITHMS.register("rescaled")
def rescaled(*, lr: Positive = 0.1) -> Method:
    """Rescaled ASGD: pure asynchronous SGD, each step scaled by the worker's compute time."""
    return Method(Schedule(Finisher()), [Rescale(), StepSize(lr)])
