"""CHOCO-SGD: D-SGD over compressed differences to public copies.

    paper       X' = X - lr G(X) ; Q = C(X' - H) ; H <- H + Q ; X <- X' + gamma (H W - H)
    overlapped  X <- X - lr G(X) + gamma (H W - H) ; Q = C(X - H) ; H <- H + Q

Koloskova, Stich, Jaggi, Decentralized Stochastic Optimization and Gossip Algorithms with
Compressed Communication, ICML 2019 (arXiv:1902.00340).  The second is the order of the authors'
deep-learning code, whose messages travel during the next gradient; the two are different methods:
uncompressed and with gamma = 1 they are D-SGD's two orders.  ``safe_gamma`` is the theory's,
often a hundredth of what experiments use.
"""

from typing import Literal

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Positive


class Choco(Gossip):
    """See the module."""

    def __init__(
        self, lr: float, gamma: float, compressor: str | Compressor, *, overlap: bool
    ) -> None:
        super().__init__({"x": Channel(gain=gamma)}, compressor)
        self.lr, self.gamma, self.overlap = lr, gamma, overlap

    def init(self, node: Node) -> None:
        node.publish("x", node.x)

    def ask(self, node: Node) -> NDArray:
        if not self.overlap:
            node.x = node.x + self.gamma * node.mix("x")
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        x = -self.lr * gradient
        if self.overlap:
            x += self.gamma * node.mix("x")
        x += node.x
        node.x = x
        node.publish("x", node.x)


def safe_gamma(gap: float, beta: float, alpha: float) -> float:
    """gap^2 alpha / (16 gap + gap^2 + 4 beta^2 + 2 gap beta^2 - 8 gap alpha).

    With it and no gradients ||X - mean X||^2 + ||X - H||^2 shrinks by 1 - gap^2 alpha / 82 a round,
    or faster (UNVERIFIED: the constant is quoted; tests see it hold).

    >>> round(safe_gamma(gap=0.5, beta=1.5, alpha=0.5), 5)
    0.00714

    Args:
        gap: 1 - max(|lambda_2|, |lambda_n|) of W, which is symmetric.
        beta: ||I - W||_2 = 1 - lambda_n.
        alpha: of the compressor, at the model's dimension.
    """
    return gap**2 * alpha / (16 * gap + gap**2 + (4 + 2 * gap) * beta**2 - 8 * gap * alpha)


@ALGORITHMS.register("choco")
def choco(
    lr: Positive = 0.1,
    gamma: Positive = 0.1,
    compressor: str = "topk(0.1)",
    order: Literal["paper", "overlapped"] = "paper",
) -> Choco:
    """CHOCO-SGD: D-SGD over compressed differences to public copies."""
    return Choco(lr, gamma, compressor, overlap=order == "overlapped")
