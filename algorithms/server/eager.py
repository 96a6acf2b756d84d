"""Eager Updates for Overlapped Communication and Computation in DiLoCo.

Kale, Douillard, Donchev, 2025 (arXiv:2502.12996).  Nobody waits for the updates of a round while
they travel: with its own, which it has, and those that the others sent in the round before, each of
n workers makes the outer step itself, on a copy of the model and of the momentum that is its own:

    x_i <- x_i - lr Nesterov_i( g_i(t)/n + sum_{j != i} g_j(t-1)/n )

A worker that is done with round t waits for round t-1 to be complete, no more.  Read from a
summary, UNVERIFIED; our reading: the answer is the mean of the x_i.  The virtual clock has a worker
hear from the server between jobs, on links of no latency at once: compare steps, or free links.
"""

from typing import Any

from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.runtime.base.registry import Fraction, Positive


class Eager(Algorithm):
    """See the module."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.beta = lr, momentum
        self.x: list[NDArray] = []  # [d] each
        self.m: list[Any] = []  # [d] each, momentum
        self.last: list[Any] = []  # [d] each, the update that the worker used last
        self.rounds: list[int] = []  # updates of each worker so far
        self.sums: dict[int, Any] = {}  # round -> sum of its updates, [d]
        self.counts: dict[int, int] = {}  # round -> how many of them are in
        self.waiting: list[tuple[int, int, NDArray]] = []  # worker, round, update

    def start(self, server: Server) -> None:
        n = server.n
        self.x, self.m, self.last, self.rounds = [server.x] * n, [0.0] * n, [0.0] * n, [0] * n
        super().start(server)

    def arrive(self, server: Server, update: Update) -> None:
        """One more of its worker's round; whoever need not wait any longer makes its step."""
        i, g = update.worker, update.payload
        t = self.rounds[i]
        self.rounds[i] += 1
        self.sums[t], self.counts[t] = self.sums.get(t, 0.0) + g, self.counts.get(t, 0) + 1
        self.waiting.append((i, t, g))
        self._go(server)

    def lost(self, server: Server, worker: int) -> None:
        """Nobody is waited for in vain."""
        self._go(server)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """It goes on with its own model."""
        for _ in range(lost):
            server.assign(worker, at=self.x[worker])

    def _go(self, server: Server) -> None:
        """Whoever need not wait steps, all with one step of the answer."""
        n, held, self.waiting = server.n, self.waiting, []
        ready: list[tuple[int, int, NDArray]] = []
        for entry in held:
            t = entry[1]
            free = not t or self.counts.get(t - 1, 0) >= n or not server.outstanding
            (ready if free else self.waiting).append(entry)
        if not ready:
            return
        total: Any = 0.0
        for i, t, g in ready:
            mean = (g + self.sums.get(t - 1, 0.0) - self.last[i]) / n
            self.last[i] = g
            self.m[i] = self.beta * self.m[i] + mean
            step = self.lr * (mean + self.beta * self.m[i])
            self.x[i] = self.x[i] - step
            total = total + step
        server.apply(total / n)
        for i, _, _ in ready:
            server.assign(i, at=self.x[i])
        for t in [t for t in self.sums if t < min(self.rounds) - 1]:
            del self.sums[t], self.counts[t]


@ALGORITHMS.register("eager-diloco")
def eager_diloco(*, lr: Positive = 0.7, momentum: Fraction = 0.9) -> Eager:
    """DiLoCo whose workers step with their own new update and the others' last ones."""
    return Eager(lr, momentum)
