"""Outer optimisers: rules that make one server step of the updates that workers send.

Composed with ``StepSize`` behind them, as in ``[Nesterov(0.9), StepSize(0.7)]``; ``g`` is an
update's payload: a gradient, or what local steps moved.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.server.contract import Server, Update
from offbeat.algorithms.server.method import Rule


@dataclass
class Momentum(Rule):
    """m = beta m + g; m, or g + beta m with Nesterov's."""

    beta: float = 0.9
    nesterov: bool = False
    m: NDArray | None = None  # [d]

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        return self.step(g)

    def step(self, g: NDArray) -> NDArray:
        """What a step with ``g [d]`` moves at learning rate 1."""
        self.m = g if self.m is None else self.beta * self.m + g
        return g + self.beta * self.m if self.nesterov else self.m


@dataclass
class Adam(Rule):
    """m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps): Kingma and Ba, ICLR 2015."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    t: int = 0
    m: NDArray | None = None  # [d]
    v: NDArray | None = None  # [d]

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        if self.m is None or self.v is None:
            self.m, self.v = np.zeros_like(g), np.zeros_like(g)
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * (g * g)
        root = np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps
        return self.m / (1 - self.beta1**self.t) / root


@dataclass
class DelayedNesterov(Rule):
    """Every update moves the model by g / N; momentum is renewed and applied once in N updates.

        D += g
        m <- beta m + D / N, (1 - c N + c) beta m + g / N, D = 0       at every N-th update
        c beta m + g / N                                               at the others

    N = 1 is Nesterov's momentum for any c.  With c = 0 the N updates of a block together are one
    Nesterov step on their mean.
    """

    beta: float = 0.9
    n: int | None = 4  # N; None: the number of workers
    c: float = 0.0  # in [0, 1/N]: the share of momentum applied at each update
    t: int = 0
    m: NDArray | float = 0.0  # [d]
    total: NDArray | float = 0.0  # D, [d]

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        self.n = self.n or server.n
        return self.step(g)

    def step(self, g: NDArray) -> NDArray:
        """What an update ``g [d]`` moves at learning rate 1; N must be known."""
        n = self.n
        assert n is not None
        self.total = self.total + g
        self.t += 1
        if self.t % n:
            return (self.c * self.beta) * self.m + g / n if self.c else g / n
        self.m = self.beta * self.m + self.total / n
        self.total = 0.0
        return ((1 - self.c * n + self.c) * self.beta) * self.m + g / n


@dataclass
class Compensate(Rule):
    """g + strength g * g * (x_now - x_given): DC-ASGD's first-order correction of a stale g.

    Zheng et al., ICML 2017; here of whatever workers send, as in arXiv:2401.09135.
    """

    strength: float

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        return g + self.strength * (g * g * (server.x - update.x))
