"""Delay-adaptive asynchronous SGD.

Mishchenko, Bach, Even, Woodworth, "Asynchronous SGD Beats Minibatch SGD Under Arbitrary
Delays", NeurIPS 2022 (arXiv:2206.07638); Koloskova, Stich, Jaggi, "Sharper Convergence
Guarantees for Asynchronous SGD", NeurIPS 2022 (arXiv:2206.08307).  Both shrink the step of an
update whose delay tau exceeds the concurrency tau_C to O(1 / (L tau)); only the abstracts were
at hand and the constants are UNVERIFIED.  We make the step continuous at tau_C:

    gamma_t = gamma min(1, tau_C / tau_t)
"""

from dataclasses import dataclass

from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.method import Finisher, Method, Rule, Schedule, StepSize
from offbeat.runtime.base.registry import Count, Positive


@dataclass
class DelayAdaptive(Rule):
    """g min(1, tau_C / tau)."""

    concurrency: int | None = None  # None: the number of workers

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        allowed = self.concurrency or server.n
        tau = server.step - update.step
        return g if tau <= allowed else (allowed / tau) * g


@ALGORITHMS.register("delay-adaptive")
def delay_adaptive(*, lr: Positive = 0.1, concurrency: Count | None = None) -> Method:
    """Delay-adaptive asynchronous SGD: step lr min(1, tau_C / tau), tau_C = n by default."""
    return Method(Schedule(Finisher()), [DelayAdaptive(concurrency), StepSize(lr)])
