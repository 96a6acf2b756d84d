"""Stochastic gradient push: D-SGD for directed graphs and lost messages.

    X <- A X ;  w <- A w ;  z_i = x_i / w_i ;  X <- X - lr G(Z)

A's columns sum to 1: a node gives shares of all it has to those that hear it, and need not know
what they do with them; w, which starts at 1, undoes the imbalance.  Assran, Loizou, Ballas, Rabbat,
Stochastic Gradient Push for Distributed Deep Learning, ICML 2019 (arXiv:1811.10792); the sum of x
is kept whatever is lost where messages carry running totals (Hadjicostis, Vaidya,
Dominguez-Garcia, IEEE Trans. Control of Network Systems 2016).
"""

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Positive


class GradientPush(Gossip):
    """See the module."""

    pushes = True

    def __init__(self, lr: float) -> None:
        super().__init__({"x": Channel(), "w": Channel()})
        self.lr = lr

    def init(self, node: Node) -> None:
        node.w = np.ones_like(node.x[..., :1])
        self._push(node)

    def ask(self, node: Node) -> NDArray:
        node.x, node.w = node.pushed("x"), node.pushed("w")
        return node.x / node.w

    def tell(self, node: Node, gradient: NDArray) -> None:
        node.x = node.x - self.lr * gradient
        self._push(node)

    def _push(self, node: Node) -> None:
        node.push("x", node.x)
        node.push("w", node.w)

    def models(self, node: Node) -> NDArray:
        """Z."""
        return node.x / node.w


@ALGORITHMS.register("gradient-push")
def gradient_push(lr: Positive = 0.1) -> GradientPush:
    """Stochastic gradient push: for directed graphs, and exact whatever messages are lost."""
    return GradientPush(lr)
