"""Asynchronous Local-SGD Training for Language Modeling.

Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato, 2024 (arXiv:2401.09135); the
synchronous baseline is DiLoCo, Douillard et al., 2023 (arXiv:2311.08105).  Workers make local
steps (``work = "local-steps(...)"``) and send what they moved, x_received - x_after; an outer
optimiser on the server takes it for a gradient.  Three parts, all of which compose:

*Windows*: the first result opens a window of ``grace_s``; all results in it are applied one by
one, then their workers start again together from one model.  A window that never ends is a
synchronous round.  *DyLU*: slower workers make fewer local steps.  *Delayed Nesterov*
(``outer.py``): momentum once in N updates, since momentum at every one overshoots: four like
updates in turn move 12.1 times as far as one, at beta 0.9, where one step on their mean moves 1.9.

The paper says neither how speeds are estimated nor what the window was; our choices are said
where they are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.method import (
    Buffer,
    DiscardStale,
    Method,
    Plan,
    Round,
    Rule,
    StalenessWeight,
    StepSize,
)
from offbeat.algorithms.server.outer import Adam, Compensate, DelayedNesterov, Momentum
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, Fraction, NonNegative, Positive

Grace = Annotated[float, Field(ge=0)]  # inf: until everybody is there
Outer = Literal["sgd", "momentum", "nesterov", "adam"]


@dataclass
class LocalUpdates:
    """DyLU: floor(H v / v_max) local steps, at least one, for a worker of speed v.

    Speeds are known, or estimated: the estimate of a worker's seconds a step is renewed at each
    of its results as the mean of the old estimate and the new observation, so that three quarters
    of a lasting change are in it after two rounds.  A worker not heard of makes H steps.
    """

    known: Sequence[float] | None = None  # seconds a step
    seconds: dict[int, float] = field(default_factory=dict)  # worker -> estimate

    def check(self, n: int) -> None:
        """One speed a worker."""
        if self.known is not None and len(self.known) != n:
            raise ConfigError(f"seconds: {len(self.known)} given for {n} workers; give one each")

    def observe(self, update: Update) -> None:
        """A result is in."""
        seen = max(update.end_s - update.start_s, 1e-12) / update.steps
        self.seconds[update.worker] = (self.seconds.get(update.worker, seen) + seen) / 2

    def steps(self, server: Server, worker: int) -> int:
        """Local steps of the worker's next job."""
        seconds = self.seconds if self.known is None else dict(enumerate(self.known))
        if worker not in seconds:
            return server.steps
        share = min(seconds.values()) / seconds[worker]
        return max(1, math.floor(share * server.steps + 1e-9))  # rounding costs nobody a step


@dataclass
class ShardSampling:
    """A shard is drawn with probability proportional to what it lags behind its share of the data.

    p_i ~ max(|D_i| / sum |D| - n_i / sum n, 0), n_i the local steps handed out on it: counted when
    they are handed out (the paper leaves that open), and p_i ~ |D_i| where none lags.
    """

    learned: list[int] = field(default_factory=list)  # n_i
    index: int = 0

    def next(self, server: Server, steps: int) -> int:
        """The shard of a job of so many steps."""
        sizes = server.sizes
        if not self.learned:
            self.learned = [0] * server.shards
        p = self.weights(sizes.tolist())
        shard = int(server.rng("shard", self.index).choice(server.shards, p=p / p.sum()))
        self.index += 1
        self.learned[shard] += steps
        return shard

    def weights(self, sizes: Sequence[int]) -> np.ndarray:
        """Unnormalised p ``[n]``; in whole numbers, so that balance is noticed."""
        data, done = sum(sizes), sum(self.learned)
        lag = [max(size * done - n * data, 0) for size, n in zip(sizes, self.learned, strict=True)]
        return np.array(lag if any(lag) else sizes, float)


@dataclass
class LookAhead:
    """x - lr beta m: where momentum alone would take the model next."""

    lr: float
    outer: Momentum

    def __call__(self, server: Server) -> NDArray:
        """The point ``[d]`` at which a job begins."""
        m = self.outer.m
        return server.x if m is None else server.x - (self.lr * self.outer.beta) * m


@dataclass
class Windows(Plan):
    """The first result opens a window; when it is over, those that came start again together.

    Args:
        grace_s: how long it is, from the first result; it does not slide.
        charged: whether workers wait the window out.  In the authors' simulator they do not: they
            start again as if at the last result in it, which no real server could know.
        local: DyLU, or None: H steps for all.
        shards: shard sampling, or None: every worker its own.
        ahead: where jobs begin, if not at the server's model.
    """

    grace_s: float = 0.0
    charged: bool = True
    local: LocalUpdates | None = None
    shards: ShardSampling | None = None
    ahead: LookAhead | None = None
    opened: int = 0  # windows so far
    done: list[int] = field(default_factory=list)  # workers whose results came in this one
    last_s: float = 0.0  # when the last result came

    def __post_init__(self) -> None:
        """See the fields."""
        self.any_shard = self.shards is not None

    def check(self, n: int) -> None:
        if self.local is not None:
            self.local.check(n)

    def start(self, server: Server) -> None:
        for worker in range(server.n):
            self._assign(server, worker)

    def arrived(self, server: Server, update: Update) -> None:
        if self.local is not None:
            self.local.observe(update)
        if not self.done:
            self.opened += 1
            if server.outstanding:
                server.after(self.grace_s, self.opened)
        self.done.append(update.worker)
        self.last_s = update.time_s
        if not server.outstanding:  # nobody is left to come
            self._close(server, None)

    def timer(self, server: Server, token: int) -> None:
        if token == self.opened and self.done:
            self._close(server, None if self.charged else self.last_s)

    def lost(self, server: Server) -> None:
        if not server.outstanding and self.done:
            self._close(server, None)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """See ``Plan``: it makes up for what it lost, from the newest model."""
        for _ in range(lost):
            self._assign(server, worker)

    def _close(self, server: Server, since_s: float | None) -> None:
        done, self.done = self.done, []
        if not server.outstanding:  # who stood in for another gives the job back
            idle = [worker for worker in range(server.n) if worker not in done]
            twice = [at for at, worker in enumerate(done) if worker in done[:at]]
            for at, worker in zip(twice, idle, strict=False):
                done[at] = worker
        for worker in done:
            self._assign(server, worker, since_s)

    def _assign(self, server: Server, worker: int, since_s: float | None = None) -> None:
        steps = None if self.local is None else self.local.steps(server, worker)
        shard = None if self.shards is None else self.shards.next(server, steps or server.steps)
        at = None if self.ahead is None else self.ahead(server)
        server.assign(worker, steps=steps, shard=shard, at=at, since_s=since_s)


def windows(
    grace_s: float, charged: bool, dylu: bool, seconds: list[float] | None, sample_shards: bool
) -> Windows:
    """The plan that a method's options ask for."""
    if seconds is not None and not dylu:
        raise ConfigError(
            "seconds are for dylu=true: the known seconds a local step of each worker"
        )
    return Windows(
        grace_s,
        charged,
        LocalUpdates(seconds) if dylu else None,
        ShardSampling() if sample_shards else None,
    )


def optimiser(outer: Outer, momentum: float) -> list[Rule]:
    """The outer optimiser's rule; SGD has none."""
    if outer == "adam":
        return [Adam(momentum)]
    return [] if outer == "sgd" else [Momentum(momentum, outer == "nesterov")]


@ALGORITHMS.register("local-sgd")
def local_sgd(*, lr: Positive = 1.0, sample_shards: bool = False) -> Method:
    """Synchronous Local-SGD: the mean of what all moved; lr = 1 averages the workers' models."""
    return Method(windows(math.inf, True, False, None, sample_shards), [Round(), StepSize(lr)])


@ALGORITHMS.register("diloco")
def diloco(
    *,
    lr: Positive = 0.7,
    outer: Outer = "nesterov",
    momentum: Fraction = 0.9,
    dylu: bool = False,
    seconds: list[Positive] | None = None,
    sample_shards: bool = False,
) -> Method:
    """DiLoCo: synchronous Local-SGD with an outer optimiser, a window that never ends."""
    plan = windows(math.inf, True, dylu, seconds, sample_shards)
    return Method(plan, [Round(), *optimiser(outer, momentum), StepSize(lr)])


@ALGORITHMS.register("async-local-sgd")
def async_local_sgd(
    *,
    lr: Positive = 0.7,
    outer: Outer = "nesterov",
    momentum: Fraction = 0.9,
    weight: Positive = 1.0,
    power: NonNegative = 0.0,
    discard: Count | None = None,
    compensation: NonNegative = 0.0,
    buffer: Count = 1,
    grace_s: Grace = 0.0,
    charged: bool = True,
    dylu: bool = False,
    seconds: list[Positive] | None = None,
    sample_shards: bool = False,
) -> Method:
    """Asynchronous Local-SGD with an outer optimiser at every update (or every ``buffer``).

    Args:
        lr, outer, momentum: the outer optimiser.
        weight: updates are multiplied by it.
        power: and by (1 + tau)^-power.
        discard: updates of this staleness or more are dropped.
        compensation: strength of delay compensation.
        buffer: updates whose mean is one outer step.
        grace_s, charged: see ``Windows``.
        dylu, seconds: dynamic local steps, with these known seconds a step, else estimated.
        sample_shards: each job draws its shard of the data.
    """
    rules: list[Rule] = []
    if discard is not None:
        rules.append(DiscardStale(discard))
    if compensation:
        rules.append(Compensate(compensation))
    if weight != 1.0:
        rules.append(StepSize(weight))
    if power:
        rules.append(StalenessWeight(power))
    if buffer > 1:
        rules.append(Buffer(buffer))
    rules += [*optimiser(outer, momentum), StepSize(lr)]
    return Method(windows(grace_s, charged, dylu, seconds, sample_shards), rules)


class Delayed(Method):
    """Delayed Nesterov, which checks c once N is known."""

    def __init__(self, plan: Plan, rule: DelayedNesterov, lr: float) -> None:
        super().__init__(plan, [rule, StepSize(lr)])

    def check(self, n: int) -> None:
        super().check(n)
        rule = self.rules[0]
        assert isinstance(rule, DelayedNesterov)
        if rule.c > 1 / (rule.n or n):
            raise ConfigError(
                f"delayed-nesterov: c={rule.c} is more than 1/{rule.n or n}, the share of momentum "
                "that each of the updates of a buffer can have"
            )


@ALGORITHMS.register("delayed-nesterov")
def delayed_nesterov(
    *,
    lr: Positive = 0.7,
    momentum: Fraction = 0.9,
    buffer: Count | None = None,
    c: NonNegative = 0.0,
    grace_s: Grace = 0.0,
    charged: bool = True,
    dylu: bool = False,
    seconds: list[Positive] | None = None,
    sample_shards: bool = False,
) -> Method:
    """Asynchronous Local-SGD with Delayed Nesterov: momentum once in ``buffer`` updates (None: n).

    The outer learning rate is the synchronous one.  The other arguments are those of
    ``async-local-sgd``.
    """
    plan = windows(grace_s, charged, dylu, seconds, sample_shards)
    return Delayed(plan, DelayedNesterov(momentum, buffer, c), lr)


@ALGORITHMS.register("look-ahead")
def look_ahead(
    *,
    lr: Positive = 0.1,
    momentum: Fraction = 0.9,
    grace_s: Grace = 0.0,
    charged: bool = True,
    dylu: bool = False,
    seconds: list[Positive] | None = None,
    sample_shards: bool = False,
) -> Method:
    """Asynchronous DiLoCo with momentum look-ahead (MLA): workers start from x - lr beta m.

    Pluralis, ICLR 2025 workshop on collaborative and decentralised learning.  Read from a summary,
    UNVERIFIED: that the outer step is then m = beta m + g, x - lr m is our reading, since the
    look-ahead is what Nesterov's adds to it.  The other arguments are those of ``async-local-sgd``.
    """
    outer = Momentum(momentum)
    plan = windows(grace_s, charged, dylu, seconds, sample_shards)
    plan.ahead = LookAhead(lr, outer)
    return Method(plan, [outer, StepSize(lr)])
