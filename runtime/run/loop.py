"""What every run needs around its events: stop rules, evaluations, checkpoints, signals."""

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from offbeat.runtime.base.errors import ConfigError, Diverged, nearest
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.run.checkpoint import Attempts
from offbeat.runtime.run.records import Records
from offbeat.workers.tasks.contract import Task, guarded

PROGRESS_EVERY_S = 0.1
MOST_AT_ONCE = 1_000_000  # arrivals without virtual time going on
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Save = Callable[[dict[str, Any]], None]


def stands_still(time_s: float, jobs: int) -> ConfigError:
    """What is wrong where ``jobs`` jobs took no time."""
    return ConfigError(
        f"virtual time stands still at {time_s:.6g} s: {jobs:,} jobs took no time; give the fleet "
        "a speed law with positive times"
    )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Without heed to Ctrl-C and SIGTERM: what is closed by half is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop(ABC):
    """One run, whatever makes its events.

    Args:
        task: what is evaluated.
        records: where everything is written.
        stop: when to end.
        evaluate: when to evaluate.
        save: called with the state of the run to write a checkpoint, or None.
        save_every_s: wall seconds between checkpoints; the first ones are sooner.
        max_failed_saves: with so many in a row the run ends; its first and its last one must not
            fail at all.
        progress: called now and then with the fraction of the run that is done.
    """

    def __init__(
        self,
        task: Task,
        records: Records,
        *,
        stop: Stop,
        evaluate: Evaluate,
        save: Save | None = None,
        save_every_s: float = math.inf,
        max_failed_saves: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.task, self.records, self.stop, self.evaluate = guarded(task), records, stop, evaluate
        self._save, self._progress = save, progress
        self._saves = Attempts(max_failed_saves, save_every_s)
        self._started = False
        self._next_step = self._next_s = self._next_gradients = math.inf  # of evaluation
        self._alarm_s = self._next_save_s = self._wall_end_s = math.inf  # wall clock
        self._interrupted = False
        self._moved = 0.0, 0  # time and arrivals when it was last seen that time goes on
        self._judged: dict[str, float] = {}  # the last row that was compared with the targets

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps or rounds done."""

    @property
    @abstractmethod
    def time_s(self) -> float:
        """Virtual seconds so far."""

    @property
    def gradients(self) -> int:
        """Gradients in the results that arrived."""
        return self.records.arrivals

    @property
    @abstractmethod
    def x(self) -> np.ndarray:
        """The model ``[d]``."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Facts about the run for its summary."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of all that outlives the run: processes, sockets; may be called twice."""

    def outstanding(self) -> list[int]:
        """The step that each job still out was given."""
        return []

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The whole run as a tree of plain values and arrays."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` answered."""

    @abstractmethod
    def _start(self) -> None:
        """What comes before the first event."""

    @abstractmethod
    def _measured(self) -> dict[str, float]:
        """A row of metrics of this moment."""

    @abstractmethod
    def _sound(self) -> bool:
        """Whether the state is finite and worth a checkpoint."""

    def run(self) -> tuple[str, dict[str, float]]:
        """Run to the end; answers why it ended, and a row of metrics measured there."""
        # Overflow is told in one sentence, at the arrival it spoils, instead of in warnings.
        with self._interruptible(), np.errstate(over="ignore", invalid="ignore"):
            if not self._started:
                self._started = True
                self._start()
                self._look()
                self._checkpoint()
            began_s = time.monotonic()
            self._alarm_s = began_s
            self._wall_end_s = began_s + (self.stop.wall_s or math.inf)
            self._next_save_s = began_s + self._saves.wait_s
            self._moved = self.time_s, self.records.arrivals
            reason = self._loop()
            final = self._measured()
            self._checkpoint()
        return reason, final

    @abstractmethod
    def _loop(self) -> str:
        """Events until a stop rule is met; answers which."""

    def _check_time(self) -> None:
        """Refuse a run in which so many jobs take no time at all."""
        time_s, arrivals = self._moved
        if self.records.arrivals - arrivals >= MOST_AT_ONCE:
            if self.time_s == time_s:
                raise stands_still(time_s, MOST_AT_ONCE)
            self._moved = self.time_s, self.records.arrivals

    def _alarm(self) -> str | None:
        """Look up from the work: at the wall clock, at signals, at the checkpoint that is due."""
        now_s = time.monotonic()
        if self._interrupted:
            return "interrupted"
        if now_s >= self._wall_end_s:
            return "wall time"
        if now_s >= self._next_save_s:
            with self._saves.bear():
                self._checkpoint()
            self._next_save_s = time.monotonic() + self._saves.wait_s
        if self._progress is not None:
            self._progress(self._fraction())
        self._alarm_s = min(self._next_save_s, self._wall_end_s, now_s + PROGRESS_EVERY_S)
        return None

    def _reached(self) -> str | None:
        """The stop rule that is met, if any."""
        stop = self.stop
        if stop.targets and (metric := self._hit()) is not None:
            return f"target {metric}"
        if stop.steps is not None and self.step >= stop.steps:
            return "steps"
        if stop.seconds is not None and self.time_s >= stop.seconds:
            return "seconds"
        if stop.gradients is not None and self.gradients >= stop.gradients:
            return "gradients"
        return None

    def _hit(self) -> str | None:
        """The target that the last evaluation has reached, if any."""
        row, own = self.records.metrics[-1], metrics.own(self.task)
        if row is self._judged:
            return None
        self._judged = row
        for metric, level in self.stop.targets.items():
            if metric not in row and "loss" in row:  # else nobody has reported one yet
                known = nearest(metric, metrics.directed(row, own))
                raise ConfigError(f'stop.{metric}: this run has no metric "{metric}"{known}')
            if metric in row and metrics.at(row[metric], level, metrics.better(metric, own)):
                return metric
        return None

    def _fraction(self) -> float:
        parts = [
            self.step / (self.stop.steps or math.inf),
            self.time_s / (self.stop.seconds or math.inf),
            self.gradients / (self.stop.gradients or math.inf),
        ]
        return min(1.0, max(parts))

    def _look(self) -> None:
        """Evaluate, record, and set the next time to do so."""
        every, every_s = self.evaluate.steps, self.evaluate.seconds
        self.records.add(self._measured())
        if every is not None:
            self._next_step = (self.step // every + 1) * every
        if every_s is not None:
            now_s = self.time_s
            count = now_s // every_s
            marks = ((count + more) * every_s for more in (0, 1, 2))  # rounding may need one more
            soonest_s = math.nextafter(
                now_s, math.inf
            )  # where marks are closer than seconds can be
            self._next_s = next((mark_s for mark_s in marks if mark_s > now_s), soonest_s)

        if self.evaluate.gradients is not None:
            passed = self.gradients // self.evaluate.gradients
            self._next_gradients = (passed + 1) * self.evaluate.gradients

    def _evaluated(self, x: np.ndarray) -> dict[str, float]:
        """The task's facts at ``x [d]``, which are finite."""
        facts = self.task.evaluate(x)
        if not math.isfinite(facts.get("loss", 0.0)):  # it may have to be reported first
            raise Diverged(
                f"the loss is not finite at step {self.step} ({self.time_s:.6g} s); "
                "take a smaller step size or clip"
            )
        return facts

    # -- Interruption and checkpoints ----------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends the loop after the current event; a second one at once."""
        if self._save is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            self._interrupted, self._alarm_s = True, 0.0
            restore()

        before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        try:
            yield
        finally:
            restore()

    def _checkpoint(self) -> None:
        if self._save is not None and self._sound():
            self._save(self.state())
