"""Ringmaster ASGD: The First Asynchronous SGD with Optimal Time Complexity.

Maranjyan, Tyurin, Richtarik, ICML 2025 (arXiv:2501.16168).  Asynchronous SGD that discards
gradients of delay R or more and restarts their workers; optionally it stops such work at once
instead of waiting for it.  For workers that share one distribution: with unlike data the
threshold silences slow workers and *raises* the error floor.  The paper's choice
R = max(1, ceil(sigma^2 / eps)) is UNVERIFIED here.
"""

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.runtime.base.registry import Count, Positive


class Ringmaster(Algorithm):
    """Delay threshold, with or without stopping stale work."""

    def __init__(self, lr: float, threshold: int, stop_stale: bool) -> None:
        self.lr, self.threshold, self.stop_stale = lr, threshold, stop_stale
        self.given: list[tuple[int, int]] = []  # (step, worker) of every job, oldest first
        self.newest: dict[int, int] = {}  # worker -> step of its newest job

    def start(self, server: Server) -> None:
        for worker in range(server.n):
            self._assign(server, worker)

    def arrive(self, server: Server, update: Update) -> None:
        """Apply what is fresh enough; restart the worker at the newest point."""
        if server.step - update.step < self.threshold:
            server.apply(self.lr * update.payload)
        self._assign(server, update.worker)
        if self.stop_stale:
            self._stop(server)

    def lost(self, server: Server, worker: int) -> None:
        self.newest.pop(worker, None)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        for _ in range(lost):
            self._assign(server, worker)

    def _assign(self, server: Server, worker: int) -> None:
        server.assign(worker)
        if self.stop_stale:
            self.given.append((server.step, worker))
            self.newest[worker] = server.step

    def _stop(self, server: Server) -> None:
        """Restart every worker whose point has become too old."""
        while self.given and server.step - self.given[0][0] >= self.threshold:
            step, worker = self.given.pop(0)
            if self.newest.get(worker) == step:
                for _ in range(server.cancel(worker)):
                    self._assign(server, worker)


@ALGORITHMS.register("ringmaster")
def ringmaster(
    *, lr: Positive = 0.1, threshold: Count = 10, stop_stale: bool = False
) -> Ringmaster:
    """Ringmaster ASGD: gradients of delay ``threshold`` or more are discarded, or stopped early."""
    return Ringmaster(lr, threshold, stop_stale)
