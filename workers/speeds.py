"""Speed laws: how long a job takes a worker, in virtual seconds.

``mean`` is a worker's seconds a job (a local step, where jobs have several): one number for all,
a list with one number a worker, or a range ``"1..10"`` spread evenly over the workers.  Times are
drawn, never measured: the time of a job is a function of (seed, worker, the worker's job number)
and, for laws that follow the clock, of the second at which it starts.
"""

import ast
import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import MADE_BY_HAND, NonNegative, Positive, Reads, Registry, Spec
from offbeat.runtime.base.tables import Table, natural, read_table, read_text, wholes
from offbeat.workers.work import WORK

SPEEDS = Registry("speed law")
MOST_S = 1e12  # a job's mean, in seconds
Duration = Annotated[float, Field(gt=0, le=MOST_S, allow_inf_nan=False)]
Seconds = Duration | list[Duration] | str
Per = Literal["job", "worker"]
FIRST_BLOCK, BLOCK = 16, 64  # durations drawn ahead a worker: at the start, later
Draw = Callable[[np.random.Generator, Any, Any], Any]  # (generator, means, size) -> seconds


class Clock(Protocol):
    """When jobs end."""

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        """The second at which ``worker`` ends its job ``number`` begun at ``start_s``.

        A job of several local steps takes so many times what a single gradient would take.
        """
        ...


class Law:
    """A speed law: ``clock`` makes it definite for a number of workers and a seed."""

    spec: Spec | None = None
    measured = False  # rather than emulated

    def __init__(self, mean: Seconds, make: Callable[[NDArray, int], Clock]) -> None:
        self.mean, self._make = mean, make

    def clock(self, workers: int, seed: int, factors: NDArray | None = None) -> Clock:
        """The clock of ``workers`` workers; ``factors [n]`` slow single ones down."""
        clock = self._make(seconds(self.mean, workers), seed)
        return clock if factors is None or (factors == 1).all() else Slowed(clock, factors)


def seconds(mean: Seconds, workers: int) -> NDArray:
    """``[n]`` seconds from one number, a list, or a range.

    >>> seconds("1..10", 4).tolist()
    [1.0, 4.0, 7.0, 10.0]
    >>> seconds([1.0, 2.0], 3)
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: 2 speeds are given for 3 workers; give one a worker
    """
    if isinstance(mean, str):
        low, dots, high = mean.partition("..")
        try:
            ends = float(low), float(high if dots else low)
        except ValueError:
            raise ConfigError(f'cannot read the seconds "{mean}"; write 2.5 or 1..10') from None
        if not (min(ends) > 0 and max(ends) <= MOST_S):
            raise ConfigError(f'the seconds "{mean}" must be positive and at most {MOST_S:g}')
        return np.linspace(*ends, workers)
    if isinstance(mean, list):
        if len(mean) != workers:
            raise ConfigError(
                f"{len(mean)} speeds are given for {workers} workers; give one a worker"
            )
        return np.array(mean, float)
    return np.full(workers, float(mean))


class Constant(Clock):
    """The same time for every job."""

    def __init__(self, means: NDArray) -> None:
        self.means, self._means = means, means.tolist()

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        return start_s + steps * self._means[worker]


class Slowed(Clock):
    """A clock some of whose workers take longer, by a factor, whatever the law."""

    def __init__(self, clock: Clock, factors: NDArray) -> None:
        self._finish, self._factors = clock.finish, factors.tolist()

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        end_s, factor = self._finish(worker, number, start_s, steps), self._factors[worker]
        return end_s if factor == 1.0 else start_s + factor * (end_s - start_s)


class Drawn(Clock):
    """Times drawn job by job: ``draw(generator, means, size)``, the means broadcast.

    The first jobs of all workers are drawn together, later ones a block and worker at a time.
    """

    def __init__(self, means: NDArray, seed: int, draw: Draw) -> None:
        self._means, self._seed, self._draw = means, seed, draw
        self._first: list[list[float]] = []  # the first block of every worker, once asked for
        self._times: list[list[float]] = [[]] * len(means)
        self._from = [0] * len(means)  # number of the first job in _times

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        at, times = number - self._from[worker], self._times[worker]
        if not 0 <= at < len(times):
            at, times = self._refill(worker, number)
        return start_s + steps * times[at]

    def _refill(self, worker: int, number: int) -> tuple[int, list[float]]:
        """Draw the block that has job ``number``; answers its place in it, and the block."""
        if number < FIRST_BLOCK:
            if not self._first:
                size = len(self._means), FIRST_BLOCK
                drawn = self._draw(rng(self._seed, "duration"), self._means[:, None], size)
                self._first = drawn.tolist()
            self._times[worker], self._from[worker] = self._first[worker], 0
            return number, self._first[worker]
        block, at = divmod(number - FIRST_BLOCK, BLOCK)
        generator = rng(self._seed, "duration", worker, block + 1)
        self._times[worker] = self._draw(generator, self._means.item(worker), BLOCK).tolist()
        self._from[worker] = number - at
        return at, self._times[worker]


class Changing(Clock):
    """Speed that changes with the hour: ``segments(worker)`` yields (length_s, slowdown).

    A job needs ``mean`` seconds of work a step; a segment of slowdown f gives 1/f seconds of work a
    second.
    """

    def __init__(
        self, means: NDArray, segments: Callable[[int], Iterator[tuple[float, float]]]
    ) -> None:
        self._means = means.tolist()
        self._segments = [segments(worker) for worker in range(len(means))]
        self._ends: list[list[float]] = [[] for _ in means]  # of the segments made so far
        self._slowdowns: list[list[float]] = [[] for _ in means]

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        ends, slowdowns = self._ends[worker], self._slowdowns[worker]
        work, now, at = steps * self._means[worker], start_s, bisect_right(ends, start_s)
        while True:
            while at == len(ends):
                length, slowdown = next(self._segments[worker])
                ends.append((ends[-1] if ends else 0.0) + length)
                slowdowns.append(slowdown)
                at += ends[-1] <= start_s
            if now + work * slowdowns[at] <= ends[at]:
                return now + work * slowdowns[at]
            work -= (ends[at] - now) / slowdowns[at]
            now, at = ends[at], at + 1


def _drawn(mean: Seconds, per: Per, draw: Draw) -> Law:
    """A law of draws, one a job or one a worker for good."""

    def make(means: NDArray, seed: int) -> Clock:
        if per == "job":
            return Drawn(means, seed, draw)
        return Constant(draw(rng(seed, "speed"), means, len(means)))

    return Law(mean, make)


@SPEEDS.register("constant")
def constant(mean: Seconds = 1.0) -> Law:
    """Every job of a worker takes the same time ("fixed" in AsGrad); also written 1..10 or 2.5."""
    return Law(mean, lambda means, seed: Constant(means))


@SPEEDS.register("list")
def listed(seconds: list[Duration]) -> Law:
    """One constant time a worker, given in full."""
    return Law(seconds, lambda means, seed: Constant(means))


@SPEEDS.register("lognormal")
def lognormal(sigma: NonNegative = 1.0, mean: Seconds = 1.0, per: Per = "job") -> Law:
    """mean exp(sigma N - sigma^2/2): the long right tail of shared machines."""
    return _drawn(mean, per, lambda g, m, size: m * g.lognormal(-(sigma**2) / 2, sigma, size))


@SPEEDS.register("exponential")
def exponential(mean: Seconds = 1.0, per: Per = "job") -> Law:
    """Memoryless: Exp(1/mean)."""
    return _drawn(mean, per, lambda g, m, size: g.exponential(m, size))


@SPEEDS.register("gamma")
def gamma(shape: Positive = 2.0, mean: Seconds = 1.0, per: Per = "job") -> Law:
    """Gamma of the given shape; the coefficient of variation is shape^-1/2."""
    return _drawn(mean, per, lambda g, m, size: g.gamma(shape, m / shape, size))


@SPEEDS.register("uniform")
def uniform(mean: Seconds = 1.0, offset: NonNegative = 1.0, per: Per = "job") -> Law:
    """U(0, mean) + offset; with offset 1 AsGrad's "uniform" (the expectation is mean/2 + 1)."""
    return _drawn(mean, per, lambda g, m, size: g.uniform(0, m, size) + offset)


@SPEEDS.register("poisson")
def poisson(mean: Seconds = 1.0, per: Per = "job") -> Law:
    """Poisson(mean), whole seconds and possibly 0 (AsGrad)."""
    return _drawn(mean, per, lambda g, m, size: 1.0 * g.poisson(m, size))


@SPEEDS.register("normal")
def normal(mean: Seconds = 1.0, offset: NonNegative = 1.0, per: Per = "job") -> Law:
    """|N(mean, mean^2)| + offset; with offset 1 AsGrad's "normal" (1.1666 mean + 1 expected)."""
    return _drawn(mean, per, lambda g, m, size: np.abs(g.normal(m, m, size)) + offset)


@SPEEDS.register("markov")
def markov(
    slowdown: Positive = 10.0,
    fast_s: Positive = 100.0,
    slow_s: Positive = 20.0,
    mean: Seconds = 1.0,
) -> Law:
    """Each worker alternates between fast and slow spells of exponential length (seconds)."""

    def make(means: NDArray, seed: int) -> Clock:
        def segments(worker: int) -> Iterator[tuple[float, float]]:
            index = 0
            while True:
                spells = rng(seed, "spell", worker, index).exponential(1.0, (BLOCK, 2))
                for fast, slow in spells.tolist():
                    yield fast * fast_s, 1.0
                    yield slow * slow_s, slowdown
                index += 1

        return Changing(means, segments)

    return Law(mean, make)


@SPEEDS.register("periodic")
def periodic(period_s: Positive = 100.0, slowdown: Positive = 3.0, mean: Seconds = 1.0) -> Law:
    """Half of each period normal, half slower; workers' phases are spread over the period."""

    def make(means: NDArray, seed: int) -> Clock:
        def segments(worker: int) -> Iterator[tuple[float, float]]:
            phase = period_s * worker / len(means)  # how far into its period it starts
            half = period_s / 2
            slow = phase >= half
            left = half - phase % half
            while True:
                yield left, slowdown if slow else 1.0
                slow, left = not slow, half

        return Changing(means, segments)

    return Law(mean, make)


def _traced(path: Path) -> Iterator[Path]:
    """What is read of a trace: it, and of a run what its jobs were."""
    yield (place := _trace_file(path))
    if place.suffix == ".jsonl":
        yield place.parent / "experiment.toml"


@SPEEDS.register("trace")
def trace(file: Annotated[str, Reads(files=_traced)]) -> Law:
    """Times from a run's folder or trace.jsonl, or CSV "worker,seconds" or "worker,start,end".

    A header names the columns, in any order: ``worker``, and ``seconds``, or ``start`` and ``end``
    or ``duration``.  A worker's jobs are in the order of their starts, where these are given, else
    of the rows.  Workers are numbered as in the file, from its first number on, or, where they
    have names, in the order of these.
    """
    path = Path(file).expanduser()
    return Law(1.0, lambda means, seed: Recorded(recorded_times(path, len(means))))


def recorded_times(path: Path, workers: int) -> list[list[float]]:
    """The seconds of a gradient in each worker's jobs, in their order; see ``trace``."""
    path = _trace_file(path)
    steps = _steps(path.parent / "experiment.toml") if path.suffix == JSONL else 1
    names, rows = _trace_rows(path)
    if isinstance(names, list) and len(names) != workers:
        raise ConfigError(
            f"{path}: has times of the {len(names)} workers {', '.join(names[:8])}"
            f"{', ...' * (len(names) > 8)}, and the fleet has {workers}"
        )
    times: list[list[float]] = [[] for _ in range(workers)]
    for line, worker, taken in rows:
        if not 0 <= worker < workers:
            raise ConfigError(f"{path} line {line}: there is no worker {_called(names, worker)}")
        if not 0 <= taken < np.inf:
            raise ConfigError(f"{path} line {line}: {taken:g} is not a time")
        times[worker].append(taken / steps)
    if short := [w for w, mine in enumerate(times) if not mine]:
        raise ConfigError(f"{path}: has no times for worker {_called(names, short[0])}")
    if not any(map(any, times)):
        raise ConfigError(f"{path}: all of its times are zero")
    return times


def recorded_workers(path: Path) -> int:
    """How many workers a trace has."""
    path = _trace_file(path)
    names, rows = _trace_rows(path)
    count = 1 + max((worker for _, worker, _ in rows), default=0)
    if count > max(1, len(rows)):
        raise ConfigError(
            f"{path}: has a worker {_called(names, count - 1)}, but not all before it"
        )
    return count


def _trace_file(path: Path) -> Path:
    return path / "trace.jsonl" if path.is_dir() else path


class Recorded(Clock):
    """Times read from a file, cycled."""

    def __init__(self, times: list[list[float]]) -> None:
        self._times = times

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        mine = self._times[worker]
        return start_s + steps * mine[number % len(mine)]


JSONL = ".jsonl"
COLUMNS = {
    "worker": ("worker", "node", "rank"),
    "seconds": ("seconds", "duration", "duration_s"),
    "start": ("start", "start_s"),
    "end": ("end", "end_s"),
}
ORDERS = ("worker", "seconds"), ("worker", "start", "end")  # without a header
TAKEN = "a trace has worker,seconds or worker,start,end or, below a header, worker,start,duration"


def _trace_rows(path: Path) -> tuple[list[str] | int, list[tuple[int, int, float]]]:
    """(line number, worker, seconds) of each row, jobs in order, and how workers are called.

    That is their names in order, or the number of the first of them.
    """
    text = read_text(path)
    if path.suffix != JSONL:
        return _table_rows(read_table(path, text).named(COLUMNS, TAKEN, *ORDERS))
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            if isinstance(row, list) and not isinstance(row[0], str):
                worker, rest = divmod(row[1], 1)  # peers write 1.0
                if rest:
                    raise ValueError
                rows.append((number, int(worker), row[6] - row[5]))
        except (ValueError, IndexError, TypeError):
            raise ConfigError(f'{path} line {number}: "{line[:40]}" is no worker,seconds') from None
    return 0, rows


def _called(names: list[str] | int, worker: int) -> object:
    return names + worker if isinstance(names, int) else names[worker]


def _table_rows(table: Table) -> tuple[list[str] | int, list[tuple[int, int, float]]]:
    """See ``_trace_rows``."""
    have = set(table.header) - {""}
    if have not in ({"worker", "seconds"}, *({"worker", "start", e} for e in ("end", "seconds"))):
        raise ConfigError(f"{table.path}: has the columns {', '.join(sorted(have))}; {TAKEN}")
    called = table.column("worker")
    names: list[str] | int = (known := sorted(set(called), key=natural))
    place = {name: at for at, name in enumerate(known)}
    workers = [place[name] for name in called]
    if (numbers := wholes(called)) is not None:
        names = min(numbers, default=0)
        workers = [n - names for n in numbers]
    start = np.array(table.numbers("start") if "start" in have else np.arange(len(called)), float)
    taken = np.array(table.numbers("end" if "end" in have else "seconds"))
    if "end" in have:
        taken = taken - start
    order = np.argsort(start, kind="stable").tolist()
    return names, [(table.lines[at], workers[at], taken.item(at)) for at in order]


def _steps(path: Path) -> int:
    """Local steps of each job of the run whose experiment.toml is at ``path``."""
    if not path.exists():
        return 1
    try:
        run = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    algorithm, work = run.get("algorithm"), run.get("work")
    if not isinstance(algorithm, dict) or not isinstance(work, dict):
        raise ConfigError(f"{path}: is beside a trace, but was not written by the run that made it")
    if algorithm.get("dylu"):
        raise ConfigError(
            f"{path.parent}: its jobs are of different numbers of local steps (dylu), which its "
            "trace does not have; record a run without"
        )
    return int(WORK.table(work).steps)


class Instant(Clock):
    """Jobs take no time of their own: what they really take is all."""

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        return start_s


@SPEEDS.register("real")
def real() -> Law:
    """As fast as the machines are: nothing is emulated; for a real clock only."""
    law = Law(1.0, lambda means, seed: Instant())
    law.measured = True
    return law


def parse(text: str | float | list[float]) -> Law:
    """A law from its text; numbers, lists and ranges are constant laws.

    >>> str(parse("1..10").spec)
    "constant(mean='1..10')"
    """
    if isinstance(text, str) and text.strip().startswith("["):
        try:
            text = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise ConfigError(f'cannot read the speeds "{text}"; write [1.0, 2.5, ...]') from None
    if isinstance(text, list):
        return listed(seconds=text)
    if isinstance(text, str) and text.startswith(MADE_BY_HAND):
        raise ConfigError(
            "the speed law was made in Python and no file can hold it; give the fleet there, as in "
            "offbeat.resume(folder, fleet=...)"
        )
    if isinstance(text, str) and not re.match(r"\s*[-+.\d]", text):
        return SPEEDS.parse(text)
    return constant(mean=text.strip() if isinstance(text, str) else float(text))


class Paused(Clock):
    """A clock whose workers stand still during their outage windows and then go on."""

    def __init__(self, clock: Clock, windows: dict[int, list[tuple[float, float]]]) -> None:
        self._clock, self._windows = clock, windows

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        windows = self._windows.get(worker)
        if windows is None:
            return self._clock.finish(worker, number, start_s, steps)
        awake_s = start_s - away(windows, 0.0, start_s)
        end_s = _wake(windows, self._clock.finish(worker, number, awake_s, steps))
        back_s = max((over for begin, over in windows if begin <= start_s < over), default=start_s)
        return max(end_s, back_s)  # a job of no time, begun in a window, would have ended before it


def away(windows: list[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Seconds of ``[start_s, end_s]`` that lie in the windows (sorted, disjoint)."""
    return sum(max(0.0, min(end_s, over) - max(start_s, begin)) for begin, over in windows)


def _wake(windows: list[tuple[float, float]], awake_s: float) -> float:
    """The second at which ``awake_s`` seconds outside the windows have passed."""
    passed = 0.0
    for begin, over in windows:
        if awake_s + passed <= begin:
            break
        passed += over - begin
    return awake_s + passed
