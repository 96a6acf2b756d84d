"""Exact diffusion, also D2: D-SGD whose bias is corrected by the step before.

    X_{t+1} = (2 X_t - X_{t-1} - lr (G_t - G_{t-1})) (I + W)/2,   X_1 = (X_0 - lr G_0)(I + W)/2

Yuan, Ying, Zhao, Sayed, IEEE Trans. Signal Processing 2019 (arXiv:1702.05122); Tang et al., D2,
ICML 2018 (arXiv:1803.07068).  With psi = x - lr g the first line is
x <- (psi + x - psi_before)(I + W)/2, psi_before = x_0 at first.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Positive


class ExactDiffusion(Gossip):
    """See the module."""

    varying = False
    asynchronous = False

    def __init__(self, lr: float) -> None:
        super().__init__({"phi": Channel(gain=0.5)})
        self.lr = lr

    def init(self, node: Node) -> None:
        node.psi = node.phi = node.x
        node.publish("phi", node.phi)

    def ask(self, node: Node) -> NDArray:
        node.x = node.phi + 0.5 * node.mix("phi")
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        psi = node.x - self.lr * gradient
        node.phi = psi + node.x - node.psi
        node.psi = psi
        node.publish("phi", node.phi)


@ALGORITHMS.register("exact-diffusion")
def exact_diffusion(lr: Positive = 0.1) -> ExactDiffusion:
    """D-SGD whose bias is corrected by the step before; also known as D2.  Fixed graphs only."""
    return ExactDiffusion(lr)
