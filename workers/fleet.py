"""A fleet: how many workers, how fast, over which links, and when they are away."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, Fraction, Natural, NonNegative, Positive, settings
from offbeat.workers.speeds import (
    BLOCK,
    MOST_S,
    Clock,
    Constant,
    Law,
    Paused,
    parse,
    recorded_workers,
)

Delay = Annotated[float, Field(ge=0, le=MOST_S, allow_inf_nan=False)]
TRACED = "trace:"  # what a fleet from records begins with
Rate = Annotated[float, Field(ge=1 / MOST_S, allow_inf_nan=False)]


@settings
class Outage:
    """Worker ``worker`` is away from ``from_s`` to ``to_s``; without ``to_s``, for ever."""

    worker: Natural
    from_s: NonNegative
    to_s: Positive | None = None


@settings
class Fleet:
    """The workers' side of time.

    Args:
        workers: n.
        speeds: a speed law, as text (``"lognormal(1.0)"``, ``"1..10"``), a number, a list with
            one number a worker, or a ``Law``.
        stragglers: ``"2x10"`` makes the last two workers ten times slower.
        latency_s: seconds a message takes, each way.
        bandwidth: bytes a second of each worker's link; None is infinite.
        jitter_s: mean of an exponential delay on top, each way.
        loss: probability that a message is lost, of gossip.
        outages: when workers are away.
        on_outage: what becomes of the jobs of a worker that goes away.  "pause": they wait and
            go on; "lose": they are gone, and the worker gets a job when it is back; "reassign":
            each is handed, with the newest model, to the available worker that has the fewest.
    """

    workers: Count = 10
    speeds: Any = 1.0
    stragglers: str = ""
    latency_s: Delay = 0.0
    bandwidth: Rate | None = None
    jitter_s: Delay = 0.0
    loss: Fraction = 0.0
    outages: list[Outage] = Field(default_factory=list)
    on_outage: Literal["pause", "lose", "reassign"] = "pause"

    def __post_init__(self) -> None:
        """Read everything once, so that mistakes surface here."""
        self.law().clock(self.workers, 0, self.factors())
        self.windows()

    def law(self) -> Law:
        """The speed law."""
        if isinstance(self.speeds, Law):
            return self.speeds
        if isinstance(self.speeds, bool) or not isinstance(self.speeds, int | float | str | list):
            raise ConfigError(f"speeds: {self.speeds!r} is no speed law; write its text")
        return parse(self.speeds)

    def factors(self) -> NDArray:
        """``[n]`` slowdowns of the stragglers, 1 for the others."""
        factors = np.ones(self.workers)
        if self.stragglers:
            match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*", self.stragglers)
            if match is None or not float(match[2]):
                raise ConfigError(
                    f'stragglers: cannot read "{self.stragglers}"; write 2x10 for two workers '
                    "ten times slower"
                )
            if (count := int(match[1])) > self.workers:
                raise ConfigError(f"stragglers: {count} of {self.workers} workers")
            factors[self.workers - count :] = float(match[2])
        return factors

    def windows(self) -> dict[int, list[tuple[float, float]]]:
        """Worker -> its outage windows, sorted, in seconds."""
        windows: dict[int, list[tuple[float, float]]] = {}
        for outage in sorted(self.outages, key=lambda o: (o.worker, o.from_s)):
            end = np.inf if outage.to_s is None else outage.to_s
            mine = windows.setdefault(outage.worker, [])
            if outage.worker >= self.workers:
                raise ConfigError(
                    f"outages: there is no worker {outage.worker}; they are 0..{self.workers - 1}"
                )
            if end <= outage.from_s or (mine and mine[-1][1] >= outage.from_s):
                raise ConfigError(
                    f"outages: worker {outage.worker} from {outage.from_s} s to {end} s is empty "
                    "or overlaps another of its windows"
                )
            mine.append((outage.from_s, float(end)))
        return windows

    def timing(self, seed: int, model_bytes: int, sized: bool = False) -> "Timing":
        """The times of this fleet's jobs, each message carrying ``model_bytes`` bytes.

        With ``sized``, only what goes to workers does; what comes back is as large as it turns out.
        """
        clock = self.law().clock(self.workers, seed, self.factors())
        if self.on_outage == "pause" and self.outages:
            clock = Paused(clock, self.windows())
        message_s = self.latency_s + (model_bytes / self.bandwidth if self.bandwidth else 0.0)
        timing = Timing(clock, seed, message_s, self.jitter_s, self.workers)
        if sized and self.bandwidth:
            timing.up_s, timing.byte_s = self.latency_s, 1 / self.bandwidth
        return timing

    @staticmethod
    def parse(text: str) -> "Fleet":
        """A fleet from its short text: workers, speed law, then ``key=value``.

        Or ``trace:PATH``, the workers of a recorded run (its folder), or of a CSV of their times.

        >>> str(Fleet.parse("16 lognormal(1.0) stragglers=2x10"))
        '16 lognormal(1.0) stragglers=2x10'
        """
        if text.startswith(TRACED):
            path = Path(text.removeprefix(TRACED).strip()).expanduser().resolve()
            return Fleet(workers=recorded_workers(path), speeds=f"trace({str(path)!r})")
        words = text.split(" ")
        try:
            options: dict[str, Any] = {"workers": int(words[0])}
        except ValueError:
            raise ConfigError(
                f'cannot read the fleet "{text}"; write "16 lognormal(1.0) stragglers=2x10"'
            ) from None
        law, *rest = re.split(r"\s+(?=[a-z_]+=[^()]*(?:\s|$))", " " + " ".join(words[1:]))
        if law.strip():
            options["speeds"] = law.strip()
        for pair in rest:
            key, _, value = pair.partition("=")
            number = re.fullmatch(r"[\d.]+(e[+-]?\d+)?", value)
            options[key.strip()] = float(value) if number else value.strip()
        return Fleet(**options)

    def __str__(self) -> str:
        law = self.law()
        words = [str(self.workers), str(law.spec) if law is self.speeds else str(self.speeds)]
        for key in ("stragglers", "latency_s", "bandwidth", "jitter_s", "loss"):
            if value := getattr(self, key):
                words.append(f"{key}={value}")
        if self.outages:
            words.append(f"outages={len(self.outages)} on_outage={self.on_outage}")
        return " ".join(words)


@dataclass
class Timing:
    """Start, end and arrival of jobs; a pure function of seed, worker, number and start.

    Where ``byte_s`` is not 0, each byte of a result takes so long on top of the arrival planned.
    """

    byte_s = 0.0

    clock: Clock
    seed: int
    message_s: float
    jitter_s: float
    workers: int

    def __post_init__(self) -> None:
        """See the fields."""
        self.up_s = self.message_s
        self._blocks: dict[int, tuple[int, list[list[float]]]] = {}
        linked = self.message_s > 0 or self.jitter_s > 0
        # Without links a job starts when it is its turn and arrives when it ends: no plan needed.
        self.finish = None if linked else self.clock.finish

    def plan(
        self, worker: int, number: int, assigned_s: float, free_s: float, steps: int = 1
    ) -> tuple[float, float, float]:
        """(start, end, arrival at the server) of a job assigned then, the worker free since."""
        down, up = self.message_s, self.up_s
        if self.jitter_s:
            extra = self._jitter(worker, number)
            down, up = down + extra[0], up + extra[1]
        start = max(assigned_s + down, free_s)
        end = self.clock.finish(worker, number, start, steps)
        return start, end, end + up

    def finish_all(self, number: int, start_s: NDArray, steps: int = 1) -> NDArray:
        """``[n]``: when each worker ends its job ``number`` begun at ``start_s [n]``."""
        if type(self.clock) is Constant:
            return start_s + steps * self.clock.means
        finish = self.clock.finish
        ends = [finish(worker, number, s, steps) for worker, s in enumerate(start_s.tolist())]
        return np.array(ends, float)

    def jitters(self, number: int) -> NDArray | float:
        """``[n]`` extra seconds of what each worker sends after its job ``number``, or 0."""
        if not self.jitter_s:
            return 0.0
        return np.array([self._jitter(worker, number)[1] for worker in range(self.workers)])

    def _jitter(self, worker: int, number: int) -> list[float]:
        block, at = divmod(number, BLOCK)
        if self._blocks.get(worker, (-1, []))[0] != block:
            generator = rng(self.seed, "jitter", worker, block)
            drawn = generator.exponential(self.jitter_s, (BLOCK, 2)).tolist()
            self._blocks[worker] = block, drawn
        return self._blocks[worker][1][at]
