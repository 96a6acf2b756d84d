"""MoTEF and BEER: gradient tracking over compressed differences.

H and G are the public copies of X and V.

    X <- X + gamma (H W - H) - lr V
    Q = C(X - H) ; H <- H + Q
    M' = (1 - lam) M + lam g(X)                                     MoTEF
    M' = g(X, xi) + (1 - lam) (M - g(X before, xi))                 MoTEF-VR
    V <- V + gamma (G W - G) + M' - M ; M <- M'
    Q = C(V - G) ; G <- G + Q

lam is the weight of the *new* gradient; lam = 1 is BEER.  M_0 = V_0 = g(X_0): with M_0 = 0, as in
the authors' code for logistic regression, mean(V) = mean(M) never holds, and the method ends at a
wrong point.  Two messages a round.

The theory wants W symmetric.  Where it is not, the fixed point is the same, but disagreement z^k
goes uncompressed, for f = L/2 |x|^2 and an eigenvalue l of W, as

    (z - 1 + gamma (1 - l))^2 + lr L (z - 1) = 0,

and may grow where |Im l| > 1 - Re l unless lr L is small beside gamma: on a directed ring of eight
from 0.02 on for gamma = 0.1.  On exponential graphs, directed ones too, there is no such l.

Islamov, Gao, Stich, Towards Faster Decentralized Stochastic Optimization with Communication
Compression, ICLR 2025 (arXiv:2405.20114); Zhao et al., BEER, NeurIPS 2022 (arXiv:2201.13320).
The form of MoTEF-VR is UNVERIFIED: the paper calls it STORM-type; its text was not at hand.
"""

from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.compression import Compressor
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node
from offbeat.runtime.base.registry import Positive, Share


class MoTEF(Gossip):
    """Momentum tracking with compression and error feedback; see the module."""

    def __init__(self, lr: float, gamma: float, lam: float, compressor: str | Compressor) -> None:
        channels = {"x": Channel(gain=gamma), "v": Channel(gain=gamma, conserved=True)}
        super().__init__(channels, compressor)
        self.lr, self.gamma, self.lam = lr, gamma, lam

    def init(self, node: Node) -> NDArray:
        node.publish("x", node.x)
        return node.x

    def begin(self, node: Node, gradient: NDArray) -> None:
        """M_0 = V_0 = g(X_0)."""
        node.m = node.v = gradient

    def ask(self, node: Node) -> NDArray:
        node.x = node.x + self.gamma * node.mix("x") - self.lr * node.v
        node.publish("x", node.x)
        return node.x

    def tell(self, node: Node, gradient: NDArray) -> None:
        m = gradient if self.lam == 1 else (1 - self.lam) * node.m + self.lam * gradient
        self._track(node, m)

    def _track(self, node: Node, m: NDArray) -> None:
        node.v = node.v + self.gamma * node.mix("v") + m - node.m
        node.m = m
        node.publish("v", node.v)


class MoTEFVR(MoTEF):
    """MoTEF with the momentum of STORM: two gradients on one sample; see the module."""

    points = 2

    def ask(self, node: Node) -> tuple[NDArray, NDArray]:  # type: ignore[override]
        before = node.x
        return super().ask(node), before

    def tell(self, node: Node, gradient: tuple[NDArray, NDArray]) -> None:  # type: ignore[override]
        new, old = gradient
        self._track(node, new + (1 - self.lam) * (node.m - old))


@ALGORITHMS.register("motef")
def motef(
    lr: Positive = 0.05, gamma: Positive = 0.1, lam: Share = 0.1, compressor: str = "topk(0.1)"
) -> MoTEF:
    """MoTEF: compressed tracking of momentum; noise-proof, whatever the nodes' differences."""
    return MoTEF(lr, gamma, lam, compressor)


@ALGORITHMS.register("motef-vr")
def motef_vr(
    lr: Positive = 0.05, gamma: Positive = 0.1, lam: Share = 0.1, compressor: str = "topk(0.1)"
) -> MoTEFVR:
    """MoTEF with STORM's momentum: two gradients a round, on one sample."""
    return MoTEFVR(lr, gamma, lam, compressor)


@ALGORITHMS.register("beer")
def beer(lr: Positive = 0.05, gamma: Positive = 0.1, compressor: str = "topk(0.1)") -> MoTEF:
    """BEER: compressed gradient tracking; MoTEF without momentum."""
    return MoTEF(lr, gamma, 1.0, compressor)
