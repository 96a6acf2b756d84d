"""CEDAS, also LEAD: exact diffusion over compressed differences.

    Y = X - lr G(X) - D ; Q = C(Y - H) ; H' = H + Q ; H <- H + a Q
    D <- D + gamma/2 (H' - H' W) ; X <- Y - gamma/2 (H' - H' W)

C unbiased, a <= 1/(1 + omega), gamma in (0, 1]; sum_i d_i = 0 at all times.  Liu et al., LEAD,
ICLR 2021 (arXiv:2007.00232); Huang and Pu, CEDAS, 2023 (arXiv:2301.05872).  UNVERIFIED: the papers'
texts were not at hand; these lines converge linearly, and are exact diffusion without compression.
They diverge where omega is large, as qsgd(16)'s is from d = 2,000 on, unless gamma and a shrink
with it.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Positive, Share

LARGE = 2**20  # a dimension at which no sparsifier keeps everything


class Cedas(Gossip):
    """See the module."""

    varying = False
    asynchronous = False

    def __init__(
        self, lr: float, gamma: float, damping: float, compressor: str | Compressor
    ) -> None:
        super().__init__({"y": Channel(gain=gamma / 2, damping=damping)}, compressor)
        if self.compressor.omega(LARGE) is None:  # it would diverge
            raise ConfigError(
                f"cedas needs an unbiased compressor, which {self.compressor.spec} is not; take "
                "natural or qsgd(64), or beer or motef, which bear any contractive one"
            )
        self.lr, self.gamma = lr, gamma

    def suits(self, d: int) -> None:
        """See ``Gossip``: copies are damped, so that unbiased is enough."""

    def init(self, node: Node) -> None:
        node.d = 0 * node.x
        node.publish("y", node.x)

    def ask(self, node: Node) -> NDArray:
        """See ``Gossip``; until now x is y."""
        correction = self.gamma / 2 * node.mix("y")
        node.d = node.d - correction
        node.x = node.x + correction
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        node.x = node.x - self.lr * gradient - node.d
        node.publish("y", node.x)


@ALGORITHMS.register("cedas")
def cedas(
    lr: Positive = 0.1, gamma: Share = 1.0, damping: Share = 0.5, compressor: str = "natural"
) -> Cedas:
    """Exact diffusion over compressed differences; also known as LEAD.  Fixed graphs only."""
    return Cedas(lr, gamma, damping, compressor)
