"""FedBuff.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022
(arXiv:2106.06639): updates are weighted by staleness, collected, and applied K at a time; a new
client is sampled whenever one finishes.  Recalled, not re-read: UNVERIFIED.
"""

from offbeat.algorithms.server.contract import ALGORITHMS
from offbeat.algorithms.server.method import (
    Buffer,
    Method,
    Schedule,
    StalenessWeight,
    StepSize,
    Uniform,
)
from offbeat.runtime.base.registry import Count, NonNegative, Positive


@ALGORITHMS.register("fedbuff")
def fedbuff(*, lr: Positive = 0.1, buffer: Count = 8, power: NonNegative = 0.5) -> Method:
    """FedBuff: the mean of ``buffer`` updates, each weighted (1 + tau)^-power, is one step."""
    rules = [StalenessWeight(power), Buffer(buffer), StepSize(lr)]
    return Method(Schedule(Uniform()), rules)
