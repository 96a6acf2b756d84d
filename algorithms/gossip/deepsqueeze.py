"""DeepSqueeze: the model itself is compressed, what was left out is added to the next.

    X' = X - lr G(X) ; V = X' + E ; Q = C(V) ; E <- V - Q ; X <- X' + gamma (Q W - Q)

Tang et al., DeepSqueeze: Decentralization Meets Error-Compensated Compression, 2019
(arXiv:1907.07346).  No copies of neighbours are kept, so changing weights harm nothing; strong
compressors leave it far from the optimum.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Positive


class DeepSqueeze(Gossip):
    """See the module."""

    def __init__(self, lr: float, gamma: float, compressor: str | Compressor) -> None:
        super().__init__({"q": Channel(gain=gamma, memory=False)}, compressor)
        self.lr, self.gamma = lr, gamma

    def init(self, node: Node) -> None:
        node.error = 0 * node.x

    def ask(self, node: Node) -> NDArray:
        node.x = node.x + self.gamma * node.mix("q")
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        node.x = node.x - self.lr * gradient
        v = node.x + node.error
        node.error = v - node.publish("q", v)


@ALGORITHMS.register("deepsqueeze")
def deepsqueeze(
    lr: Positive = 0.1, gamma: Positive = 0.1, compressor: str = "topk(0.1)"
) -> DeepSqueeze:
    """D-SGD over compressed models with error compensation; no copies of neighbours are kept."""
    return DeepSqueeze(lr, gamma, compressor)
