"""A method as a composition: a plan (who works next, and when) and a chain of update rules.

Rules are transformations of one update, in the manner of gradient transformations: each takes
what the one before it answered and returns it changed, or None where nothing is to be applied.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.base import completed
from offbeat.algorithms.server.contract import Algorithm, Server, Update
from offbeat.runtime.base.errors import ConfigError

FACTS = tuple(Update.__annotations__)


class Rule(Protocol):
    """One transformation of an update."""

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray | None:
        """``g [d]`` changed, or None: the update goes no further."""
        ...


class Plan(Protocol):
    """Who works next, and when; ``Schedule`` is one, ``Windows`` another.

    One of one's own needs ``start`` and ``arrived``; the rest has plain defaults.
    """

    any_shard: bool = False
    """See ``Algorithm``."""

    def check(self, n: int) -> None:
        """Raise ConfigError where n workers cannot follow it; by default any can."""
        return None

    @abstractmethod
    def start(self, server: Server) -> None:
        """Hand out the first jobs."""
        ...

    @abstractmethod
    def arrived(self, server: Server, update: Update) -> None:
        """One more result is in and has been applied."""
        ...

    def timer(self, server: Server, token: int) -> None:
        """The time it asked for has come; nothing by default."""
        return None

    def lost(self, server: Server) -> None:
        """One result will never come; nothing by default."""
        return None

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """A worker is back, ``lost`` of whose jobs were lost: it gets as many by default."""
        for _ in range(lost):
            server.assign(worker)


class Order(Protocol):
    """Who is next."""

    def next(self, server: Server, finisher: int) -> int:
        """The worker that gets the job which replaces one of ``finisher``'s."""
        ...


@dataclass
class Finisher(Order):
    """k_{t+1} = i_t: whoever is done gets the next job."""

    def next(self, server: Server, finisher: int) -> int:
        return finisher


@dataclass
class Uniform(Order):
    """k ~ Uniform{1..n}, with replacement, whether busy or not."""

    block: int = 0
    picks: list[int] = field(default_factory=list)  # drawn ahead, next one last

    def next(self, server: Server, finisher: int) -> int:
        if not self.picks:
            self.picks = server.rng("uniform", self.block).integers(server.n, size=1024).tolist()
            self.block += 1
        return self.picks.pop()


@dataclass
class Permuted(Order):
    """k = chi[p], p += 1, chi renewed after every ``period`` assignments (None: after n)."""

    period: int | None = None
    once: bool = False  # keep the first chi for ever
    index: int = 0
    chi: list[int] = field(default_factory=list)  # what is left of the permutation, next one last

    def next(self, server: Server, finisher: int) -> int:
        if not self.chi:
            address = 0 if self.once else self.index
            chi = server.rng("permutation", address).permutation(server.n)
            self.chi = chi[: self.period][::-1].tolist()
            self.index += 1
        return self.chi.pop()


@dataclass
class Schedule(Plan):
    """Hands out new jobs once ``wait`` results are in, all with the same model.

    Asynchronous: every worker has a job from the start, and each result is replaced by a job.
    Synchronous: ``wait`` jobs at the start, and ``wait`` new ones once all of them are back.
    Where jobs were lost, what is left to come is waited for, and no more.
    """

    order: Order
    wait: int | None = 1  # None: as many as there are workers
    synchronous: bool = False
    done: list[int] = field(default_factory=list)  # finishers since the last hand-out

    def check(self, n: int) -> None:
        """Waiting for more results than there are workers is refused."""
        if self.wait is not None and self.wait > n:
            raise ConfigError(
                f"the method waits for {self.wait} results, but there are {n} workers; "
                f"wait (or batch) can be at most {n}"
            )

    def start(self, server: Server) -> None:
        """Hand out the first jobs."""
        self.wait = self.wait or server.n
        if self.synchronous:
            self._hand_out(server)
        else:
            for worker in range(server.n):
                server.assign(worker)

    def arrived(self, server: Server, update: Update) -> None:
        """One more result is in and has been applied."""
        if self.wait == 1 and not self.synchronous:  # the common case, without the detour
            server.assign(self.order.next(server, update.worker))
            return
        self.done.append(update.worker)
        if len(self.done) == self.wait or not server.outstanding:
            self._hand_out(server)

    def lost(self, server: Server) -> None:
        """One result will never come."""
        if not server.outstanding and (self.done or self.synchronous):
            self._hand_out(server)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """A worker is back: its lost jobs are replaced; a synchronous round has done without."""
        if not self.synchronous:
            for _ in range(lost):
                server.assign(self.order.next(server, worker))

    def _hand_out(self, server: Server) -> None:
        finishers = [0] * (self.wait or 0) if self.synchronous else self.done
        self.done = []
        for worker in finishers:
            server.assign(self.order.next(server, worker))


class Method(Algorithm):
    """A server method made of a plan and update rules, applied in turn."""

    def __init__(self, schedule: Plan, rules: Sequence[Rule]) -> None:
        self.schedule, self.rules = completed(schedule, Plan), list(rules)
        self.any_shard = self.schedule.any_shard

    def check(self, n: int) -> None:
        self.schedule.check(n)

    def start(self, server: Server) -> None:
        self.schedule.start(server)

    def arrive(self, server: Server, update: Update) -> None:
        """Transform the update, step if anything is left of it, hand out the next jobs."""
        self._step(server, update, update.payload, self.rules)
        self.schedule.arrived(server, update)

    def _step(self, server: Server, update: Update, g: Any, rules: Sequence[Rule]) -> None:
        for rule in rules:
            g = rule(server, update, g)
            if g is None:
                return
        server.apply(g)

    def timer(self, server: Server, token: int) -> None:
        self.schedule.timer(server, token)

    def lost(self, server: Server, worker: int) -> None:
        """See ``Algorithm``; a round that waited for this job alone is over."""
        for at, rule in enumerate(self.rules):
            if isinstance(rule, Round) and rule.count and not server.outstanding:
                self._step(server, rule.last, rule.mean(), self.rules[at + 1 :])
        self.schedule.lost(server)

    def joined(self, server: Server, worker: int, lost: int) -> None:
        self.schedule.joined(server, worker, lost)


@dataclass
class StepSize(Rule):
    """lr g."""

    lr: float
    scale: NDArray | None = field(default=None, init=False)  # lr, []: faster than as a number

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        if self.scale is None or self.scale.dtype != g.dtype:
            self.scale = np.array(self.lr, g.dtype)
        return self.scale * g


@dataclass
class Clip(Rule):
    """g min(1, norm / ||g||)."""

    norm: float

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        length = float(np.linalg.norm(g))
        return g * (self.norm / length) if length > self.norm else g


@dataclass
class StalenessWeight(Rule):
    """s(tau) g with s = (1 + tau)^-power.

    With ``slope`` set, the hinge: s = 1 for tau <= grace, 1 / (slope (tau - grace) + 1) beyond.
    """

    power: float = 0.5
    slope: float | None = None
    grace: int = 0

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        tau = server.step - update.step
        if self.slope is None:
            return (1 + tau) ** -self.power * g
        return g if tau <= self.grace else g / (self.slope * (tau - self.grace) + 1)


@dataclass
class Buffer(Rule):
    """Nothing until ``size`` updates are in, then their mean."""

    size: int
    count: int = 0
    total: NDArray | None = None  # [d], sum of the updates so far

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray | None:
        self.total = g if self.total is None else self.total + g
        self.count += 1
        if self.count < self.size:
            return None
        mean, self.total, self.count = self.total / self.size, None, 0
        return mean


@dataclass
class Round(Rule):
    """Nothing until no job is out, then the mean of all that came: one step a barrier.

    The rules behind it are told of the last update of the round.
    """

    count: int = 0
    total: NDArray | None = None  # [d], sum of the updates so far
    last: Any = field(default_factory=SimpleNamespace)  # an Update, in fields for checkpoints

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray | None:
        self.total = g if self.total is None else self.total + g
        self.count += 1
        # The job that ends the round may be one that is lost.
        self.last = SimpleNamespace(**{name: getattr(update, name) for name in FACTS})
        return None if server.outstanding else self.mean()

    def mean(self) -> NDArray:
        """What came; the next round begins."""
        assert self.total is not None
        mean, self.total, self.count = self.total / self.count, None, 0
        return mean


@dataclass
class DiscardStale(Rule):
    """Nothing where tau >= threshold."""

    threshold: int

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray | None:
        return g if server.step - update.step < self.threshold else None
