"""Decoupled DiLoCo for Resilient Distributed Pre-training; Streaming DiLoCo is a corner of it.

Douillard et al., 2026 (arXiv:2604.21428); Streaming DiLoCo with overlapping communication,
Douillard et al., 2025 (arXiv:2501.18512).  The model is cut in P fragments, which take turns: in
each round a syncer merges one of them and makes its outer step.  Learners have jobs of H/P local
steps, where every fragment is to be merged once in H.  Between two of them a learner

    gives   what it moved the round's fragment by since it last took that one, once a round;
    takes   the fragments merged meanwhile, theta <- alpha theta + (1 - alpha) x (and gives after
            it, where the last merge has heard of all that it did);
    goes on from its own theta, for ``overlap`` jobs before it waits for a merge.

A round merges when all have given, or ``grace_s`` after the quorum has, whoever else has by then:
by the mean, weighted by tokens (counted in local steps since the learner last took the fragment),
or by radial-directional averaging of each tensor v, (sum w |v| / sum w) u/|u|, u = sum w v/|v|, of
which the length does not shrink where learners disagree.  With grace_s = None it waits as long as
nobody need stand still: max(0, overlap steps xi_step - xi_quorum), xi_step the slowest learner's
seconds a step and xi_quorum those that the quorum took.

From public summaries and re-implementations, not from the papers: UNVERIFIED.  Ours: tensors are
dealt out to the fragments in turn (a model of fewer is cut in equal runs), embeddings are merged
like all else, one fragment at a time is under way, messages are not compressed.  The virtual clock
has a learner hear from the syncer between jobs; on links of no latency, that costs nothing.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, Fraction, Natural, Positive

Merge = Literal["mean", "radial-directional"]


class Fragments(Algorithm):
    """See the module; ``quorum`` None is everybody."""

    def __init__(
        self,
        lr: float,
        momentum: float,
        quorum: int | None,
        grace_s: float | None,
        fragments: int,
        overlap: int,
        alpha: float,
        merge: Merge,
    ) -> None:
        self.lr, self.beta, self.quorum, self.grace_s = lr, momentum, quorum, grace_s
        self.fragments, self.overlap, self.alpha = fragments, overlap, alpha
        self.radial = merge == "radial-directional"
        self.parts: list[list[tuple[int, int]]] = []  # fragment -> (first, end) of its tensors
        self.m: Any = None  # [d], outer momentum
        # Of each learner:
        self.theta: list[NDArray] = []  # [d], its model; jobs that it does for another move it, too
        self.base: list[NDArray] = []  # [d], fragments as it took them last
        self.steps: list[list[int]] = []  # fragment -> its local steps since then
        self.due: list[list[int]] = []  # fragments it has still to take
        self.jobs: list[int] = []  # since it gave last
        self.given: list[bool] = []  # whether it has given in this round
        self.heard: list[bool] = []  # and in the one before
        self.step_s: list[float] = []  # seconds a step
        self.waiting: list[int] = []  # learners
        # Of the round:
        self.t = 0
        self.count = self.weight = 0  # who has given; sum of weights
        self.sums: list[Any] = []  # tensor -> sum w v, or sum w v/|v|
        self.lengths: list[float] = []  # tensor -> sum w |v|
        self.now_s = self.opened_s = self.closes_s = 0.0

    def check(self, n: int) -> None:
        """A quorum can be met."""
        if self.quorum is not None and self.quorum > n:
            raise ConfigError(f"a quorum of {self.quorum}, but there are {n} workers")
        if self.fragments == 1 and self.overlap and not self.alpha:
            raise ConfigError(
                "with one fragment and alpha=0, what is done in the overlap is thrown away; take "
                "more fragments, alpha=0.5 or overlap=0"
            )

    def start(self, server: Server) -> None:
        n, d, fragments = server.n, server.x.size, self.fragments
        if fragments > d:
            raise ConfigError(f"{fragments} fragments of a model of {d} parameters")
        tensors = [(part.start, part.stop) for part in server.tensors]
        if len(tensors) < fragments:
            tensors = list(pairwise(d * k // fragments for k in range(fragments + 1)))
        self.parts = [tensors[k::fragments] for k in range(fragments)]
        self.m = np.zeros_like(server.x)
        self.theta, self.base = [server.x] * n, [server.x] * n
        self.step_s, self.jobs = [0.0] * n, [0] * n
        self.steps, self.due = [[0] * fragments for _ in range(n)], [[] for _ in range(n)]
        self.given = [False] * n
        self._open()
        super().start(server)

    def arrive(self, server: Server, update: Update) -> None:
        """A learner is between two jobs."""
        i, self.now_s = update.worker, update.time_s
        self.step_s[i] = (update.end_s - update.start_s) / update.steps
        self.steps[i] = [steps + update.steps for steps in self.steps[i]]
        self.jobs[i] += 1
        self.theta[i] = self.theta[i] - update.payload
        weight = self.steps[i][self.t % self.fragments]
        if self.heard[i]:
            self._take(server, i)
        if not self.given[i]:
            self._give(server, i, weight)
        self._take(server, i)
        if self.jobs[i] >= self.overlap:
            self.waiting.append(i)
        else:
            server.assign(i, at=self.theta[i])
        self._check(server)

    def timer(self, server: Server, token: int) -> None:
        """The window is over, unless everybody came before."""
        if token == self.t:
            self.now_s = self.closes_s
            self._merge(server)

    def lost(self, server: Server, worker: int) -> None:
        """Nobody is waited for in vain."""
        self._check(server)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """It begins with the newest model."""
        self.theta[worker] = self.base[worker] = server.x
        self.due[worker] = []
        self.steps[worker] = [0] * self.fragments
        super().joined(server, worker, lost)

    def _open(self) -> None:
        """A round begins."""
        tensors = len(self.parts[self.t % self.fragments])
        self.heard, self.given = self.given, [False] * len(self.given)
        self.count = self.weight = 0
        self.sums, self.lengths = [0.0] * tensors, [0.0] * tensors
        self.opened_s = self.now_s

    def _take(self, server: Server, i: int) -> None:
        due, self.due[i] = self.due[i], []
        if not due:
            return
        theta, base = self.theta[i].copy(), self.base[i].copy()
        for p in due:
            for first, end in self.parts[p]:
                x, mine = server.x[first:end], theta[first:end]
                base[first:end] = x
                mine[:] = self.alpha * mine + (1 - self.alpha) * x
            self.steps[i][p] = 0
        self.theta[i], self.base[i] = theta, base

    def _give(self, server: Server, i: int, weight: int) -> None:
        for k, (first, end) in enumerate(self.parts[self.t % self.fragments]):
            v = self.base[i][first:end] - self.theta[i][first:end]
            if self.radial:
                length = float(np.linalg.norm(v))
                self.lengths[k] += weight * length
                v = v / (length or 1.0)
            self.sums[k] = self.sums[k] + weight * v
        self.weight += weight
        self.count += 1
        self.given[i], self.jobs[i] = True, 0
        if self.count == (self.quorum or server.n):
            self.closes_s = self.now_s + self._grace_s(server)
            server.after(self.closes_s - self.now_s, self.t)

    def _grace_s(self, server: Server) -> float:
        if self.grace_s is not None:
            return self.grace_s
        slack_s = self.overlap * server.steps * max(self.step_s)
        return max(0.0, slack_s - (self.now_s - self.opened_s))

    def _check(self, server: Server) -> None:
        """Merge where nobody is left to come."""
        if self.count and (self.count == server.n or not server.outstanding):
            self._merge(server)

    def _merge(self, server: Server) -> None:
        """The outer step of the round's fragment; those who waited for it go on."""
        p, step = self.t % self.fragments, np.zeros_like(server.x)
        for k, (first, end) in enumerate(self.parts[p]):
            g = self.sums[k] / self.weight
            if self.radial:
                g = g * (self.lengths[k] / (float(np.linalg.norm(self.sums[k])) or 1.0))
            m = self.m[first:end] = self.beta * self.m[first:end] + g
            step[first:end] = self.lr * (g + self.beta * m)
        server.apply(step)
        for due in self.due:
            if p not in due:
                due.append(p)
        self.t += 1
        self._open()
        waiting, self.waiting = self.waiting, []
        for i in waiting:
            self._take(server, i)
            server.assign(i, at=self.theta[i])


@ALGORITHMS.register("decoupled-diloco")
def decoupled_diloco(
    *,
    lr: Positive = 0.7,
    momentum: Fraction = 0.9,
    quorum: Count = 2,
    grace_s: Annotated[float, Field(ge=0)] | None = None,
    fragments: Count = 1,
    overlap: Natural = 0,
    alpha: Fraction = 0.0,
    merge: Merge = "radial-directional",
) -> Fragments:
    """Decoupled DiLoCo: outer steps of fragments, with whoever is there once a quorum is.

    Args:
        lr, momentum: of the outer Nesterov step.
        quorum: learners that a merge takes at least.
        grace_s: seconds it waits for more; None: as long as nobody need stand still.
        fragments: P.
        overlap: jobs that a learner goes on for without the merge of what it gave.
        alpha: its own share of what it takes.
        merge: how what learners moved becomes one.
    """
    return Fragments(lr, momentum, quorum, grace_s, fragments, overlap, alpha, merge)


@ALGORITHMS.register("streaming-diloco")
def streaming_diloco(
    *,
    lr: Positive = 0.7,
    momentum: Fraction = 0.9,
    fragments: Count = 4,
    overlap: Natural = 1,
    alpha: Fraction = 0.5,
) -> Fragments:
    """Streaming DiLoCo: fragments of the model take turns, and learners work on meanwhile."""
    return Fragments(lr, momentum, None, 0.0, fragments, overlap, alpha, "mean")
