"""Least squares: quadratics whose curvature, too, differs between the workers."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import Streams, rng
from offbeat.runtime.base.registry import Count, NonNegative, Seed, Spec
from offbeat.workers.tasks.contract import TASKS


class LeastSquares:
    """f_i(x) = 1/2 ||A_i x - b_i||^2, gradients with N(0, noise^2) on every coordinate.

    Args:
        a: ``[n, m, d]``.
        b: ``[n, m]``.
        noise: standard deviation of each coordinate of a gradient's noise.
        seed: of the noise.

    Raises:
        ConfigError: the minimum is not unique.
    """

    spec: Spec | None = None

    def __init__(self, a: NDArray, b: NDArray, noise: float = 0.0, seed: int = 0) -> None:
        self.a, self.b, self.noise = a, b, noise
        self.workers, _, self.dim = a.shape
        self._streams = Streams(seed, "noise", self.workers)
        self.hessian = np.einsum("nmi,nmj->ij", a, a) / self.workers
        if np.linalg.matrix_rank(self.hessian) < self.dim:
            raise ConfigError("least-squares: the minimum is not unique; give more rows a worker")
        self.optimum = np.linalg.solve(self.hessian, np.einsum("nmi,nm->i", a, b) / self.workers)

    @property
    def smoothness(self) -> float:
        """L: the largest eigenvalue of any A_i' A_i."""
        return float(np.linalg.norm(self.a, ord=2, axis=(1, 2)).max() ** 2)

    def initial(self, seed: int) -> NDArray:
        """Zero, for every seed."""
        return np.zeros(self.dim)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` (without noise) and gradients ``[k, d]``."""
        a = self.a[worker]
        left = np.matvec(a, x) - self.b[worker]
        gradient = np.vecmat(left, a)
        if self.noise:
            gradient += self.noise * ndtri(self._streams.uniform(worker, draw, self.dim))
        return 0.5 * np.vecdot(left, left), gradient

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """``loss`` is f(x) - f*; ``distance2`` is ||x - x*||^2."""
        apart = x - self.optimum
        gradient = self.hessian @ apart
        return {
            "loss": 0.5 * float(gradient @ apart),  # exact where f(x) - f* would cancel
            "grad_norm": float(np.linalg.norm(gradient)),
            "distance2": float(apart @ apart),
        }


@TASKS.register("least-squares")
def least_squares(
    dim: Count = 20,
    *,
    workers: Count = 8,
    rows: Count = 30,
    spread: NonNegative = 1.0,
    noise: NonNegative = 0.0,
    seed: Seed = 0,
) -> LeastSquares:
    """Random least squares: every worker has its own minimiser and its own curvature.

    Args:
        dim: d.
        workers: n.
        rows: equations a worker.
        spread: standard deviation of the workers' minimisers around a common one.
        noise: standard deviation of each gradient coordinate's noise.
        seed: of all that is drawn.
    """
    generator = rng(seed, "least squares")
    a = generator.standard_normal((workers, rows, dim)) / np.sqrt(rows)
    own = generator.standard_normal(dim) + spread * generator.standard_normal((workers, dim))
    b = np.matvec(a, own) + 0.1 * generator.standard_normal((workers, rows))
    return LeastSquares(a, b, noise, seed)
