"""Gradient tracking: a second average follows the mean of all nodes' gradients.

    DSGT                X <- X W - lr V ;  V <- V W + G_new - G_old          (combine then adapt)
                        X <- (X - lr V) W ;  V <- V W + G_new - G_old        (adapt then combine)
    momentum tracking   the same with U <- beta U + G(X) in place of G

mean(V) = mean(G) (or mean(U)) at all times, so the nodes' differences leave no bias.  The first
order needs lr L < 1 + lambda_n(W), like D-SGD's.  On a directed ring, and wherever eigenvalues of W
are far from the real line, steps must be smaller: see MoTEF's file, with gamma = 1.
(V <- (V + G_new - G_old) W, also found under the second name, would need two exchanges a round.)

Di Lorenzo and Scutari, NEXT, 2016 (arXiv:1602.00591); Pu and Nedic, Distributed Stochastic Gradient
Tracking Methods, Math. Programming 2021 (arXiv:1805.11454).  Takezawa et al., Momentum Tracking,
TMLR 2023 (arXiv:2209.15505): their c is our u - v; U_0 = 0 here, where their code starts from one
exact average of the first gradients.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.algorithms.gossip.dsgd import Order
from offbeat.runtime.base.registry import Fraction, Positive


class DSGT(Gossip):
    """Gradient tracking, of the gradient or of its momentum; see the module."""

    def __init__(self, lr: float, momentum: float, order: Order) -> None:
        super().__init__({"x": Channel(), "v": Channel(conserved=True)})
        self.lr, self.momentum = lr, momentum
        self.adapt_first = order == "adapt-then-combine"

    def init(self, node: Node) -> NDArray:
        if not self.adapt_first:
            node.publish("x", node.x)
        return node.x

    def begin(self, node: Node, gradient: NDArray) -> None:
        """U_0 = V_0 = G(X_0)."""
        node.u = node.v = gradient
        self._publish(node)

    def ask(self, node: Node) -> NDArray:
        if self.adapt_first:
            node.x = node.average("x")
            node.v = node.average("v")
        else:
            node.x = node.average("x") - self.lr * node.v
            node.publish("x", node.x)
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        u = self.momentum * node.u + gradient if self.momentum else gradient
        v = node.v if self.adapt_first else node.average("v")
        node.v = v + u - node.u
        node.u = u
        self._publish(node)

    def _publish(self, node: Node) -> None:
        if self.adapt_first:
            node.x = node.x - self.lr * node.v
            node.publish("x", node.x)
        node.publish("v", node.v)


@ALGORITHMS.register("dsgt")
def dsgt(lr: Positive = 0.1, order: Order = "adapt-then-combine") -> DSGT:
    """Gradient tracking: a second average follows the mean gradient, and no bias is left."""
    return DSGT(lr, 0.0, order)


@ALGORITHMS.register("momentum-tracking")
def momentum_tracking(
    lr: Positive = 0.1, beta: Fraction = 0.9, order: Order = "combine-then-adapt"
) -> DSGT:
    """Gradient tracking of the heavy-ball momentum."""
    return DSGT(lr, beta, order)
