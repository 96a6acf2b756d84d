"""Rescaled ASGD.

Mahran, Maranjyan, Richtarik, "Rescaled Asynchronous SGD: Optimal Distributed Optimization under
Data and System Heterogeneity", 2026 (arXiv:2605.13434).  Pure asynchronous SGD whose steps are
proportional to the worker's computation time, so that all workers weigh alike over a cycle.
Only the abstract was at hand: compute times are *observed* here, and the step of worker i is
lr s_i / mean_j s_j over the workers heard of so far (both our reading, UNVERIFIED).
"""

from dataclasses import dataclass, field

from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.method import Finisher, Method, Rule, Schedule, StepSize
from offbeat.runtime.base.registry import Positive


@dataclass
class Rescale(Rule):
    """g s_i / mean_j s_j, s_i the mean seconds of worker i's jobs so far."""

    seconds: dict[int, float] = field(default_factory=dict)  # worker -> s_i
    total: float = 0.0  # sum of them

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        s = 1.0 / server.speed(update.worker)
        self.total += s - self.seconds.get(update.worker, 0.0)
        self.seconds[update.worker] = s
        return (s * len(self.seconds) / self.total) * g


@ALGORITHMS.register("rescaled")
def rescaled(*, lr: Positive = 0.1) -> Method:
    """Rescaled ASGD: pure asynchronous SGD, each step scaled by the worker's compute time."""
    return Method(Schedule(Finisher()), [Rescale(), StepSize(lr)])
