"""Decoupled DiLoCo, 2026 (arXiv:2604.21428).

Independent learners and a central syncer that merges as soon as a minimum quorum is there: after
K results a window of grace opens for those that are nearly done; then the mean of what came, each
weighted by the tokens it was trained on, is one outer step, and those that came start again from
the new model.  Learners that were not there go on undisturbed.  Read from summaries: UNVERIFIED.
The outer step is DiLoCo's; tokens are counted as local steps.  Left out, since what was at hand
does not determine them: how the window adapts, radial-directional averaging, and the fragments
in which the model is sent.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.algorithms.server.outer import Momentum
from offbeat.runtime.errors import ConfigError
from offbeat.runtime.registry import Count, Fraction, Positive


class DecoupledDiLoCo(Algorithm):
    """Quorum, grace, weighted merge."""

    def __init__(self, lr: float, momentum: float, quorum: int, grace_s: float) -> None:
        self.lr, self.quorum, self.grace_s = lr, quorum, grace_s
        self.outer = Momentum(momentum, nesterov=True)
        self.done: list[int] = []  # workers whose results wait for the merge
        self.total: NDArray | float = 0.0  # [d], sum of steps times updates
        self.tokens = 0  # sum of steps
        self.merges = 0

    def check(self, n: int) -> None:
        """A quorum can be met."""
        if self.quorum > n:
            raise ConfigError(
                f"decoupled-diloco: a quorum of {self.quorum}, but there are {n} workers"
            )

    def arrive(self, server: Server, update: Update) -> None:
        """Collect; at the quorum, open the window."""
        self.total = self.total + update.steps * update.payload
        self.tokens += update.steps
        self.done.append(update.worker)
        if not server.outstanding:
            self._merge(server)
        elif len(self.done) == self.quorum:
            server.after(self.grace_s, self.merges)

    def timer(self, server: Server, token: int) -> None:
        """The window is over, unless everybody came before."""
        if token == self.merges:
            self._merge(server)

    def lost(self, server: Server, worker: int) -> None:
        """Nobody is waited for in vain."""
        if self.done and not server.outstanding:
            self._merge(server)

    def _merge(self, server: Server) -> None:
        server.apply(self.lr * self.outer.step(np.asarray(self.total) / self.tokens))
        done, self.done, self.total, self.tokens = self.done, [], 0.0, 0
        self.merges += 1
        for worker in done:
            server.assign(worker)


@ALGORITHMS.register("decoupled-diloco")
def decoupled_diloco(
    *,
    lr: Positive = 0.7,
    momentum: Fraction = 0.9,
    quorum: Count = 2,
    grace_s: Annotated[float, Field(ge=0)] = 0.0,
) -> DecoupledDiLoCo:
    """Decoupled DiLoCo: an outer step with all results there, ``grace_s`` after the quorum-th."""
    return DecoupledDiLoCo(lr, momentum, quorum, grace_s)
