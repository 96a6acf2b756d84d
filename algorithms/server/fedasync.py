"""FedAsync.

Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", OPT 2020 (arXiv:1903.03934): the
server mixes each arriving model with weight alpha s(tau).  Here the update itself is weighted:
with one local step, x - alpha s(tau) lr g; the paper mixes the client's *model*, which also
pulls x back towards the stale point (a departure).  Recalled, not re-read: UNVERIFIED.
"""

from typing import Literal

from offbeat.algorithms.server.contract import ALGORITHMS
from offbeat.algorithms.server.method import Finisher, Method, Schedule, StalenessWeight, StepSize
from offbeat.runtime.base.registry import Natural, NonNegative, Positive


@ALGORITHMS.register("fedasync")
def fedasync(
    *,
    lr: Positive = 0.1,
    weight: Literal["polynomial", "hinge", "constant"] = "polynomial",
    a: NonNegative = 0.5,
    b: Natural = 4,
) -> Method:
    """FedAsync weights: polynomial (1 + tau)^-a, hinge 1 / (a (tau - b) + 1) beyond b, constant."""
    rule = StalenessWeight(
        power=a if weight == "polynomial" else 0.0, slope=a if weight == "hinge" else None, grace=b
    )
    return Method(Schedule(Finisher()), [rule, StepSize(lr)])
