"""Quadratics with a known optimum: the instrument on which theory is checked."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from offbeat.runtime.base.randomness import Streams
from offbeat.runtime.base.registry import AtLeastOne, Count, NonNegative, Seed, Spec
from offbeat.workers.tasks.contract import TASKS


class Quadratic:
    """f_i(x) = 1/2 (x - c_i)' diag(h) (x - c_i), gradients with N(0, noise^2) on top.

    The optimum of the mean is mean(c_i), whatever h is.

    Args:
        centers: ``[n, d]``, one minimiser a worker; float32 ones make a float32 task.
        curvature: ``[d]``, the diagonal h.
        noise: standard deviation of each coordinate of a gradient's noise.
        seed: of the noise.
    """

    spec: Spec | None = None

    def __init__(
        self, centers: NDArray, curvature: NDArray | None = None, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.centers = np.asarray(centers)
        if self.centers.dtype != np.float32:
            self.centers = self.centers.astype(np.float64)
        self.workers, self.dim = self.centers.shape
        h = np.ones(self.dim) if curvature is None else curvature
        self.curvature = np.asarray(h, self.centers.dtype)
        self.noise = noise
        self._streams = Streams(seed, "noise", self.workers)
        self.optimum = self.centers.mean(axis=0)

    def initial(self, seed: int) -> NDArray:
        """Zero, for every seed."""
        return np.zeros(self.dim, self.centers.dtype)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` (without noise) and gradients ``[k, d]``."""
        apart = self.centers.take(worker, axis=0)
        np.subtract(x, apart, out=apart)
        gradient = self.curvature * apart
        losses = 0.5 * np.vecdot(gradient, apart)
        if self.noise:
            gradient += self.noise * ndtri(self._streams.uniform(worker, draw, self.dim))
        return losses, gradient

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """``loss`` is f(x) - f*; ``distance2`` is ||x - x*||^2."""
        apart = x - self.optimum
        gradient = self.curvature * apart
        return {
            "loss": 0.5 * float(gradient @ apart),  # the centres' spread drops out
            "grad_norm": float(np.linalg.norm(gradient)),
            "distance2": float(apart @ apart),
        }


@TASKS.register("quadratic")
def quadratic(
    dim: Count = 10,
    *,
    workers: Count = 10,
    spread: NonNegative = 1.0,
    condition: AtLeastOne = 1.0,
    noise: NonNegative = 0.0,
    seed: Seed = 0,
) -> Quadratic:
    """Quadratics around centres drawn from N(0, spread^2): known optimum, heterogeneous workers.

    Args:
        dim: d.
        workers: n.
        spread: standard deviation of the workers' centres; 0 makes the workers alike.
        condition: ratio of the largest to the smallest curvature (spaced evenly in log).
        noise: standard deviation of each gradient coordinate's noise.
        seed: of centres and noise.
    """
    centers = np.random.default_rng(seed).standard_normal((workers, dim)) * spread
    return Quadratic(centers, np.geomspace(1.0 / condition, 1.0, dim), noise, seed)
