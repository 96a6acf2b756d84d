"""CHOCO-SGD: D-SGD over compressed differences to public copies.

    paper       X' = X - lr G(X) ; Q = C(X' - H) ; H <- H + Q ; X <- X' + gamma (H W - H)
    overlapped  X <- X - lr G(X) + gamma (H W - H) ; Q = C(X - H) ; H <- H + Q

Koloskova, Stich, Jaggi, Decentralized Stochastic Optimization and Gossip Algorithms with
Compressed Communication, ICML 2019 (arXiv:1902.00340).  The second is the order of the authors'
deep-learning code, whose messages travel during the next gradient; the two are different methods:
uncompressed and with gamma = 1 they are D-SGD's two orders.
"""

from typing import Literal

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.registry import Positive


class Choco(Gossip):
    """See the module."""

    def __init__(
        self, lr: float, gamma: float, compressor: str | Compressor, *, overlap: bool
    ) -> None:
        super().__init__({"x": Channel(gain=gamma)}, compressor)
        self.lr, self.gamma, self.overlap = lr, gamma, overlap

    def init(self, node: Node) -> None:
        """See ``Gossip``."""
        node.publish("x", node.x)

    def ask(self, node: Node) -> NDArray:
        """See ``Gossip``."""
        if not self.overlap:
            node.x = node.x + self.gamma * node.mix("x")
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        """See ``Gossip``."""
        x = -self.lr * gradient
        if self.overlap:
            x += self.gamma * node.mix("x")
        x += node.x
        node.x = x
        node.publish("x", node.x)


@ALGORITHMS.register("choco")
def choco(
    lr: Positive = 0.1,
    gamma: Positive = 0.1,
    compressor: str = "topk(0.1)",
    order: Literal["paper", "overlapped"] = "paper",
) -> Choco:
    """CHOCO-SGD: D-SGD over compressed differences to public copies."""
    return Choco(lr, gamma, compressor, overlap=order == "overlapped")
