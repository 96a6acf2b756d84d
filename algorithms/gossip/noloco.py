"""NoLoCo: No-all-reduce Low Communication Training Method for Large Models.

    m_i <- alpha m_i - lr (g_i + g_j)/2 + gamma ((x_i + x_j)/2 - x_i)
    x_i <- x_i + m_i

g_i is what the local steps since the last round moved (``work = "local-steps(adamw)"``), j the node
that i is paired with in this round: ``topology = "matching"``.  Only pairs ever wait for one
another.  On another graph the two means are those of its weights.

With E[d^2], E[d m], E[m^2] over nodes, d = x_i - mean x, many nodes in random pairs go, apart from
gradients, through the linear map that a test writes down; it contracts for gamma < 2 (1 - alpha^2).

Kolehmainen, Blagoev, Donaghy, Ersoy, Nies, 2025 (arXiv:2506.10911).  Read from the authors' code
(jkolehm/noloco, SparseOptimizerC), which has gamma = lr; as in the code, the momentum is heavy
ball.  The routing of activations between pipelines, which the paper adds, is not here.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Fraction, Positive


class NoLoCo(Gossip):
    """See the module."""

    asynchronous = False  # momentum spreads an exchange over rounds: pairs would not keep the sum

    def __init__(self, lr: float, momentum: float, gamma: float) -> None:
        super().__init__({"x": Channel(gain=gamma), "g": Channel()})
        self.lr, self.momentum, self.gamma = lr, momentum, gamma

    def init(self, node: Node) -> None:
        node.m = 0 * node.x
        node.publish("x", node.x)
        node.publish("g", node.m)

    def ask(self, node: Node) -> NDArray:
        node.m = self.momentum * node.m - self.lr * node.average("g") + self.gamma * node.mix("x")
        node.x = node.x + node.m
        node.publish("x", node.x)
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        node.publish("g", gradient)


@ALGORITHMS.register("noloco")
def noloco(lr: Positive = 0.7, momentum: Fraction = 0.3, gamma: Positive = 0.7) -> NoLoCo:
    """DiLoCo without all-reduce: in each round, random pairs average what they moved and are."""
    return NoLoCo(lr, momentum, gamma)
