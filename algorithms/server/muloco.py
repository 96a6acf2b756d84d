"""MuLoCo: DiLoCo with Muon inside, whose updates are compressed with error feedback.

Therien et al., 2025 (arXiv:2505.23725).  Muon is the workers' part:
``work = "local-steps(muon(lr=0.001), steps=30)"``.  Here, of worker i's update g,

    v = g + e_i ;  q = C(v) ;  e_i <- v - q

and the mean of the q is an outer step with Nesterov's momentum.  Only the abstract and summaries
were at hand: UNVERIFIED that e_i is not damped, and which codes of two bits were used (here those
of the update's quantiles).  The error is kept with the method and the update compressed as it
arrives, so the seconds and bytes of links are those of whole updates.
"""

import math
from dataclasses import dataclass, field

from numpy.typing import NDArray

from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.compression.contract import made
from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.local_sgd import windows
from offbeat.algorithms.server.method import Method, Round, Rule, StepSize
from offbeat.algorithms.server.outer import Momentum
from offbeat.runtime.base.registry import Fraction, Positive


@dataclass
class ErrorFeedback(Rule):
    """C(g + e_i), and what that leaves out is added to worker i's next update."""

    compressor: Compressor
    error: dict[int, NDArray] = field(default_factory=dict)  # worker -> e_i, [d]
    index: int = 0  # of messages

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        v = g + self.error[update.worker] if update.worker in self.error else g
        draws = server.rng("compress", self.index) if self.compressor.draws else None
        q = self.compressor.compress(v, draws).dense()
        self.index += 1
        self.error[update.worker] = v - q
        return q


@ALGORITHMS.register("muloco")
def muloco(
    *,
    lr: Positive = 0.7,
    momentum: Fraction = 0.9,
    compressor: str = "quantile(2)",
    sample_shards: bool = False,
) -> Method:
    """MuLoCo: DiLoCo of updates compressed with error feedback; give it Muon to work with."""
    plan = windows(math.inf, True, False, None, sample_shards)
    outer = Momentum(momentum, nesterov=True)
    return Method(plan, [ErrorFeedback(made(compressor)), Round(), outer, StepSize(lr)])
