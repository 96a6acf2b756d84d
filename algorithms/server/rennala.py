"""Rennala SGD.

Tyurin, Richtarik, "Optimal Time Complexities of Parallel Stochastic Optimization Methods Under a
Fixed Computation Model", NeurIPS 2023 (arXiv:2305.12387): collect S gradients at the current
point from whoever delivers, ignore those of older points, take one step with their mean.
Optimal in time where all workers share one distribution; it ignores slow workers' data otherwise.
"""

from offbeat.algorithms.server.contract import ALGORITHMS
from offbeat.algorithms.server.method import (
    Buffer,
    DiscardStale,
    Finisher,
    Method,
    Schedule,
    StepSize,
)
from offbeat.runtime.base.registry import Count, Positive


@ALGORITHMS.register("rennala")
def rennala(*, lr: Positive = 0.1, batch: Count = 8) -> Method:
    """Rennala SGD: a step with the mean of ``batch`` fresh gradients; stale ones are ignored."""
    fresh = DiscardStale(threshold=1)
    return Method(Schedule(Finisher()), [fresh, Buffer(batch), StepSize(lr)])
