"""The loop that runs a server method, whatever makes its updates arrive.

    algorithm.start(server)
    for update in workers: algorithm.arrive(server, update)

The rest is what a run needs around it: evaluations and stop rules between arrivals, records,
checkpoints, outages.
"""

import copy
import math
import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.server import Algorithm, Update
from offbeat.runtime import trees
from offbeat.runtime.errors import ConfigError, Diverged
from offbeat.runtime.randomness import rng
from offbeat.runtime.records import ROWS_HELD, Records
from offbeat.runtime.settings import Evaluate, Stop
from offbeat.runtime.virtual import Job, Joined, Left, More, Timer, VirtualWorkers
from offbeat.workers.tasks.contract import Task

PROGRESS_EVERY_S = 0.1
MOST_AT_ONCE = 1_000_000  # arrivals without virtual time going on
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ServerState:
    """The facade through which a method acts; see ``offbeat.algorithms.server.Server``."""

    __slots__ = ("_records", "_seed", "_workers", "n", "step", "steps", "x")

    def __init__(self, x: NDArray, workers: VirtualWorkers, records: Records, seed: int) -> None:
        x.flags.writeable = False
        self.x, self.step, self._seed = x, 0, seed
        self.n, self._workers, self._records = workers.n, workers, records
        self.steps = workers.work.steps

    @property
    def outstanding(self) -> int:
        """Jobs handed out and not yet back."""
        return self._workers.outstanding

    def apply(self, delta: NDArray) -> None:
        """x <- x - delta; one step."""
        x = self.x - delta
        x.setflags(write=False)  # jobs in flight hold it
        self.x = x
        self.step += 1

    def assign(self, worker: int, like: Update | None = None, **job: Any) -> None:
        """Queue a job for ``worker``."""
        if worker.__class__ is not int or not 0 <= worker < self.n:  # numpy's integers will do
            worker = operator.index(worker)
            if not 0 <= worker < self.n:
                raise ConfigError(f"the method assigned worker {worker}; they are 0..{self.n - 1}")
        if job:
            self._assign(worker, like, **job)
        elif like is None:
            self._workers.take(worker, self.x, self.step)
        else:
            self._workers.take(worker, like.x, like.step)

    def _assign(
        self,
        worker: int,
        like: Update | None,
        *,
        steps: int | None = None,
        shard: int | None = None,
        at: NDArray | None = None,
        since_s: float | None = None,
    ) -> None:
        """Queue a job that says more than the model it begins with."""
        if steps is not None and steps < 1:
            raise ConfigError(f"the method assigned {steps} local steps; a job has at least one")
        if self._workers.plain and (steps or 1) > 1:
            raise ConfigError(
                f"the method assigned {steps} local steps to workers that compute one gradient a "
                'job; give work = "local-steps(adamw, steps=50)"'
            )
        if shard is not None and not 0 <= shard < self.n:
            raise ConfigError(f"the method assigned shard {shard}; they are 0..{self.n - 1}")
        x, step = (self.x, self.step) if like is None else (like.x, like.step)
        if at is not None:
            x = at
            x.flags.writeable = False
        self._workers.take(worker, x, step, More(steps, shard, since_s))

    def after(self, seconds: float, token: int = 0) -> None:
        """Have the method's ``timer`` called with ``token`` when so many seconds have passed."""
        if seconds < math.inf:
            self._workers.after(max(0.0, seconds), token)

    @property
    def sizes(self) -> NDArray:
        """``[n]``: how much data each shard has."""
        return np.asarray(getattr(self._workers.task, "sizes", np.ones(self.n)))

    def cancel(self, worker: int) -> int:
        """Drop every outstanding job of ``worker``; answers how many there were."""
        return self._workers.cancel(worker)

    def speed(self, worker: int) -> float:
        """Observed jobs per busy second; 0 before the first result."""
        return self._records.speed(worker)

    def rng(self, purpose: str, index: int = 0) -> np.random.Generator:
        """The generator at address (run seed, purpose, index)."""
        return rng(self._seed, purpose, 0, index)


class Engine:
    """One run.

    Args:
        task, algorithm, workers, records: the parts; the algorithm's state is changed.
        stop: when to end.
        evaluate: when to evaluate.
        seed: of the run.
        save: called with the state of the run to write a checkpoint, or None.
        save_every_s: wall seconds between checkpoints.
        progress: called now and then with the fraction of the run that is done.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        workers: VirtualWorkers,
        records: Records,
        *,
        stop: Stop,
        evaluate: Evaluate,
        seed: int,
        save: Callable[[dict[str, Any]], None] | None = None,
        save_every_s: float = math.inf,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.task, self.algorithm, self.workers, self.records = task, algorithm, workers, records
        self.stop, self.evaluate = stop, evaluate
        self.server = ServerState(task.initial(seed), workers, records, seed)
        self._save, self._save_every_s = save, save_every_s
        self._progress = progress
        self._started = False
        self._blank = copy.deepcopy(algorithm)  # what a resumed run would fill with the state
        self._lost: dict[int, int] = {}  # worker that is away -> jobs it lost
        self._next_step = self._next_s = self._next_gradients = math.inf  # of evaluation
        self._alarm_s = math.inf  # wall clock: look up from the work
        self._interrupted = False

    # -- The loop -----------------------------------------------------------------------------

    def run(self) -> tuple[str, dict[str, float]]:
        """Run to the end; answers why it ended, and a row of metrics measured there."""
        # Overflow is told in one sentence, at the arrival it spoils, instead of in warnings.
        with self._interruptible(), np.errstate(over="ignore", invalid="ignore"):
            if not self._started:
                self._started = True
                self.algorithm.start(self.server)
                self._look()
                self._checkpoint()
            reason = self._loop()
            final = self._measured()
            self._checkpoint()
        return reason, final

    def _loop(self) -> str:
        server, workers, records = self.server, self.workers, self.records
        arrive, rows, clock = self.algorithm.arrive, records.rows, time.monotonic
        pop = workers.pop
        began_s = clock()
        wall_end_s = began_s + (self.stop.wall_s or math.inf)
        next_save_s = began_s + self._save_every_s
        self._alarm_s = began_s
        stuck = workers.now_s, records.arrivals  # when it was last seen that time goes on
        while True:
            if reason := self._reached():
                return reason
            # Until one of these is met, nothing but arrivals needs attention.
            mark_step = min(self.stop.steps or math.inf, self._next_step)
            mark_s = min(self.stop.seconds or math.inf, self._next_s)
            mark = min(self.stop.gradients or math.inf, self._next_gradients) - self._gradients()
            most_rows = min(ROWS_HELD, len(rows) + mark / workers.most_steps)
            while True:
                event = pop(mark_s)
                if type(event) is not Job:
                    if isinstance(event, Timer):
                        self.algorithm.timer(server, event.token)
                    elif event is not None:
                        self._outage(event)  # flushes the rows that most_rows counts
                    break
                if event.loss != event.loss:
                    self._diverged(event)
                rows.append(
                    (event.time_s, event.worker, event.number, event.step, server.step,
                     event.start_s, event.end_s)
                )  # fmt: skip
                arrive(server, event)
                if server.step >= mark_step or len(rows) >= most_rows:
                    break
                if clock() >= self._alarm_s:
                    break
            if event is None:
                if workers.idle():
                    return "idle"
                workers.now_s = mark_s
            if len(rows) >= most_rows:
                records.flush()
            if (
                server.step >= self._next_step
                or workers.now_s >= self._next_s
                or self._gradients() >= self._next_gradients
            ):
                self._look()
            if records.arrivals - stuck[1] >= MOST_AT_ONCE:
                if workers.now_s == stuck[0]:
                    raise ConfigError(
                        f"virtual time stands still at {stuck[0]:.6g} s: {MOST_AT_ONCE:,} jobs "
                        "took no time; give the fleet a speed law with positive times"
                    )
                stuck = workers.now_s, records.arrivals
            now_s = clock()
            if now_s >= self._alarm_s:
                if self._interrupted:
                    return "interrupted"
                if now_s >= wall_end_s:
                    return "wall time"
                if now_s >= next_save_s:
                    self._checkpoint()
                    next_save_s = clock() + self._save_every_s
                if self._progress is not None:
                    self._progress(self._fraction())
                self._alarm_s = min(next_save_s, wall_end_s, now_s + PROGRESS_EVERY_S)

    def _reached(self) -> str | None:
        """The stop rule that is met, if any."""
        stop = self.stop
        if stop.loss is not None and self.records.metrics[-1]["loss"] <= stop.loss:
            return "target loss"
        if stop.steps is not None and self.server.step >= stop.steps:
            return "steps"
        if stop.seconds is not None and self.workers.now_s >= stop.seconds:
            return "seconds"
        if stop.gradients is not None and self._gradients() >= stop.gradients:
            return "gradients"
        return None

    def _gradients(self) -> int:
        """Gradients in the results that arrived: one each, or as many as local steps."""
        return self.records.arrivals + self.workers.extra

    def _fraction(self) -> float:
        parts = [
            self.server.step / (self.stop.steps or math.inf),
            self.workers.now_s / (self.stop.seconds or math.inf),
            self._gradients() / (self.stop.gradients or math.inf),
        ]
        return min(1.0, max(parts))

    def _look(self) -> None:
        """Evaluate, record, and set the next time to do so."""
        every, every_s = self.evaluate.steps, self.evaluate.seconds
        self.records.add(self._measured())
        if every is not None:
            self._next_step = (self.server.step // every + 1) * every
        if every_s is not None:
            now_s = self.workers.now_s
            count = int(now_s / every_s)
            while (next_s := count * every_s) <= now_s:  # rounding may need one more
                count += 1
            self._next_s = next_s
        if self.evaluate.gradients is not None:
            passed = self._gradients() // self.evaluate.gradients
            self._next_gradients = (passed + 1) * self.evaluate.gradients

    def _measured(self) -> dict[str, float]:
        """A row of metrics of this moment."""
        facts = self.task.evaluate(self.server.x)
        if not math.isfinite(facts["loss"]):
            raise Diverged(
                f"the loss is not finite at step {self.server.step} ({self.workers.now_s:.6g} s); "
                "take a smaller step size or clip"
            )
        return self.records.row(self.workers, self.server.step, facts)

    def _outage(self, event: Left | Joined) -> None:
        workers, server = self.workers, self.server
        self.records.outage(workers, event)
        if isinstance(event, Joined):
            if lost := self._lost.pop(event.worker, 0):
                self.algorithm.joined(server, event.worker, lost)
            if not workers.has_job(event.worker) and workers.relieve():
                server.assign(event.worker)
            return
        if not workers.reassigns:
            workers.lost += len(event.jobs)
            self._lost[event.worker] = len(event.jobs)
        for job in event.jobs:
            if workers.reassigns:
                workers.reassigned += 1
                self._again(event.worker, job)
            else:
                self.algorithm.lost(server, event.worker)

    def _again(self, worker: int, job: Job) -> None:
        """Assign the like of ``job``, with the newest model."""
        steps = None if self.workers.plain else job.steps
        shard = None if job.shard == job.worker else job.shard  # whoever takes it has data too
        self.server.assign(worker, steps=steps, shard=shard)

    def _diverged(self, job: Job) -> None:
        raise Diverged(
            f"the gradient or loss of worker {job.worker}'s job {job.number} is not finite, at "
            f"step {self.server.step} ({job.time_s:.6g} s), computed at the model of step "
            f"{job.step}; take a smaller step size or clip"
        )

    # -- Interruption and checkpoints ----------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends the loop after the current arrival; a second one at once."""
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
        if self._save is not None and np.isfinite(self.server.x).all():
            state = self.state()
            trees.load(self._blank, state["algorithm"])  # could it be read back?
            self._save(state)

    def state(self) -> dict[str, Any]:
        """The whole run as a tree of plain values and arrays."""
        return {
            "x": self.server.x,
            "step": self.server.step,
            "next_step": self._next_step,
            "next_s": self._next_s,
            "next_gradients": self._next_gradients,
            "gradients": self._gradients(),
            "workers": self.workers.state(),
            "records": self.records.state(),
            "algorithm": trees.dump(self.algorithm),
            "lost": trees.dump(self._lost),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        self._started = True
        self.server.x, self.server.step = state["x"], state["step"]
        self.server.x.flags.writeable = False
        self.workers.restore(state["workers"])
        self.records.restore(state["records"])
        trees.load(self.algorithm, state["algorithm"])
        self._lost = trees.load(None, state["lost"])
        self._next_step, self._next_s = state["next_step"], state["next_s"]
        self._next_gradients = state["next_gradients"]
