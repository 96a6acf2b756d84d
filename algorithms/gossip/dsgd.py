"""D-SGD: gradient steps and averaging with the neighbours.

    adapt then combine:   X <- (X - lr G(X)) W        stable for lr L < 2
    combine then adapt:   X <- X W - lr G(X)          stable for lr L < 1 + lambda_n(W)

Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?, NeurIPS 2017
(arXiv:1705.09056); the two orders after Cattivelli and Sayed, IEEE Trans. Signal Processing 2010.
With momentum u <- beta u + g takes the gradient's place.  Where the nodes' objectives differ and
lr is constant it stops at a distance of about lr zeta / gap from the optimum.
"""

from typing import Literal

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Fraction, Positive

Order = Literal["adapt-then-combine", "combine-then-adapt"]


class DSGD(Gossip):
    """Decentralised SGD, uncompressed; see the module."""

    def __init__(self, lr: float, momentum: float, order: Order) -> None:
        super().__init__({"x": Channel()})
        self.lr, self.momentum = lr, momentum
        self.adapt_first = order == "adapt-then-combine"
        self.overlap = not self.adapt_first

    def init(self, node: Node) -> None:
        if self.momentum:
            node.u = 0 * node.x
        node.publish("x", node.x)

    def ask(self, node: Node) -> NDArray:
        if self.adapt_first:
            node.x = node.average("x")
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        if self.momentum:
            node.u = gradient = self.momentum * node.u + gradient
        x = -self.lr * gradient
        x += node.x if self.adapt_first else node.average("x")
        node.x = x
        node.publish("x", node.x)


@ALGORITHMS.register("dsgd")
def dsgd(lr: Positive = 0.1, momentum: Fraction = 0.0, order: Order = "adapt-then-combine") -> DSGD:
    """Decentralised SGD: a gradient step, then the neighbours' average (or the other order)."""
    return DSGD(lr, momentum, order)


class ADPSGD(DSGD):
    """After each gradient, average with one neighbour, whatever that one is doing.

        x_i, x_j <- (x_i + x_j)/2 ;  x_i <- x_i - lr g(x_i before)

    Lian, Zhang, Zhang, Liu, Asynchronous Decentralized Parallel Stochastic Gradient Descent,
    ICML 2018 (arXiv:1710.06952).
    """

    synchronous = False
    partners = "one"

    def __init__(self, lr: float, momentum: float) -> None:
        super().__init__(lr, momentum, "combine-then-adapt")


@ALGORITHMS.register("ad-psgd")
def ad_psgd(lr: Positive = 0.1, momentum: Fraction = 0.0) -> ADPSGD:
    """Asynchronous decentralised SGD: each gradient is followed by averaging with one neighbour."""
    return ADPSGD(lr, momentum)
