"""The loop that runs a server method, whatever makes its updates arrive.

    algorithm.start(server)
    for update in workers: algorithm.arrive(server, update)

The rest is what a run needs around it: stop rules between arrivals, records, checkpoints, outages.
"""

import copy
import math
import operator
import time
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.server import Algorithm, Update
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError, Diverged
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.tensors import keep_freed
from offbeat.runtime.compute.jobs import Job, Joined, Left, More, Timer, TraceNote
from offbeat.runtime.compute.private import Facade
from offbeat.runtime.run.loop import Loop
from offbeat.runtime.run.records import ROWS_HELD, Records
from offbeat.runtime.server.virtual import VirtualWorkers
from offbeat.workers.tasks.contract import Task, ours


class ServerState:
    """The facade through which a method acts; see ``offbeat.algorithms.server.Server``."""

    __slots__ = ("_records", "_seed", "_workers", "n", "shards", "step", "steps", "x")

    def __init__(self, x: NDArray, workers: VirtualWorkers, records: Records, seed: int) -> None:
        x.flags.writeable = False
        self.x, self.step, self._seed = x, 0, seed
        self.n, self._workers, self._records = workers.n, workers, records
        self.shards = workers.task.workers
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
        steps = None if steps is None else operator.index(steps)
        shard = None if shard is None else operator.index(shard)
        if steps is not None and steps < 1:
            raise ConfigError(f"the method assigned {steps} local steps; a job has at least one")
        if self._workers.single and (steps or 1) > 1:
            raise ConfigError(
                f"the method assigned {steps} local steps to workers that compute one gradient a "
                'job; give work = "local-steps(adamw, steps=50)"'
            )
        if shard is not None and not 0 <= shard < self.shards:
            raise ConfigError(f"the method assigned shard {shard}; they are 0..{self.shards - 1}")
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
        """``[shards]``: how much data each shard has."""
        return np.asarray(getattr(self._workers.task, "sizes", np.ones(self.shards)))

    @property
    def tensors(self) -> list[slice]:
        """Where each tensor of the model lies in ``x``; all of it, where the task does not say."""
        ends = accumulate(getattr(self._workers.task, "tensors", [self.x.size]), initial=0)
        return [slice(first, end) for first, end in pairwise(ends)]

    def cancel(self, worker: int) -> int:
        """Drop every outstanding job of ``worker``; answers how many there were."""
        return self._workers.cancel(worker)

    def speed(self, worker: int) -> float:
        """Observed jobs per busy second; 0 before the first result."""
        return self._records.speed(worker)

    def rng(self, purpose: str, index: int = 0) -> np.random.Generator:
        """The generator at address (run seed, purpose, index)."""
        return rng(self._seed, purpose, 0, index)


class ServerLoop(Loop):
    """One run of a server method.

    Args:
        task, algorithm, workers, records: the parts; the algorithm's state is changed.
        seed: of the run.
        around: see ``Loop``.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        workers: VirtualWorkers,
        records: Records,
        *,
        seed: int,
        **around: Any,
    ) -> None:
        super().__init__(task, records, **around)
        self.algorithm, self.workers = algorithm, workers
        self.server = ServerState(self.task.initial(seed), workers, records, seed)
        self._own = not ours(algorithm)
        self._facade: Any = Facade(self.server) if self._own else self.server  # for the method
        self._blank = copy.deepcopy(algorithm)  # what a resumed run would fill with the state
        self._lost: dict[int, int] = {}  # worker that is away -> jobs it lost

    # -- The loop -----------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.server.step

    @property
    def time_s(self) -> float:
        """Virtual seconds so far."""
        return self.workers.now_s

    @property
    def x(self) -> NDArray:
        """The model ``[d]``."""
        return self.server.x

    def facts(self) -> dict[str, Any]:
        """See ``Loop``: concurrency, and what became of jobs; who is still out."""
        workers = self.workers
        return {"concurrency": workers.peak, **workers.facts()}

    def run(self) -> tuple[str, dict[str, float]]:
        keep_freed()  # every step makes a new model: jobs in flight hold the one before
        reason, final = super().run()
        self.workers.ended(reason)
        return reason, final

    def close(self) -> None:
        self.workers.close()

    def outstanding(self) -> list[int]:
        return [job.step for job in self.workers.jobs()]

    def _start(self) -> None:
        self.algorithm.start(self._facade)

    def _other(self, event: Left | Joined | Timer | TraceNote | None) -> None:
        """Something happens that is no arrival."""
        workers, records = self.workers, self.records
        if isinstance(event, Timer):
            self.algorithm.timer(self._facade, event.token)
            if workers.real:  # else a replay knows
                rung = {"event": "timer", "token": event.token}
                records.note({"time_s": workers.now_s} | rung)
        elif isinstance(event, TraceNote):
            records.event(event.row, workers.now_s)
        elif event is not None:
            self._outage(event)  # flushes the rows that are held

    def _loop(self) -> str:
        server, workers, records = self.server, self.workers, self.records
        arrive, rows, clock = self.algorithm.arrive, records.rows, time.monotonic
        facade, own = self._facade, self._own
        pop = workers.pop
        while True:
            if reason := self._reached():
                return reason
            # Until one of these is met, nothing but arrivals needs attention.
            mark_step = min(self.stop.steps or math.inf, self._next_step)
            mark_s = min(self.stop.seconds or math.inf, self._next_s)
            mark = min(self.stop.gradients or math.inf, self._next_gradients) - self.gradients
            most_rows = min(ROWS_HELD, len(rows) + mark / workers.most_steps)
            while True:
                event = pop(mark_s)
                if type(event) is not Job:
                    self._other(event)
                    break
                if event.loss != event.loss:
                    self._diverged(event)
                rows.append(
                    (
                        event.time_s,
                        event.worker,
                        event.number,
                        event.step,
                        server.step,
                        event.start_s,
                        event.end_s,
                    )
                )
                if own:
                    event.x = event.x.copy()  # others may compute at it yet
                arrive(facade, event)
                if server.step >= mark_step or len(rows) >= most_rows:
                    break
                if clock() >= self._alarm_s:
                    break
            if event is None:
                if workers.idle():
                    return "idle"
                workers.reach(mark_s)
            if len(rows) >= most_rows:
                records.flush()
            if (
                server.step >= self._next_step
                or workers.now_s >= self._next_s
                or self.gradients >= self._next_gradients
            ):
                self._look()
            self._check_time()
            if clock() >= self._alarm_s and (reason := self._alarm()):
                return reason

    @property
    def gradients(self) -> int:
        """Gradients in the results that arrived: one each, or as many as local steps."""
        return self.records.arrivals + self.workers.extra

    def _measured(self) -> dict[str, float]:
        """A row of metrics of this moment."""
        return self.records.row(self.workers, self.step, self._evaluated(self.x))

    def _outage(self, event: Left | Joined) -> None:
        workers, server = self.workers, self.server
        self.records.outage(workers, event)
        if isinstance(event, Joined):
            self.algorithm.joined(self._facade, event.worker, self._lost.pop(event.worker, 0))
            if not workers.has_job(event.worker) and workers.relieve(event.worker):
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
                self.algorithm.lost(self._facade, event.worker)

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

    # -- Checkpoints ---------------------------------------------------------------------------

    def _sound(self) -> bool:
        return bool(np.isfinite(self.server.x).all())

    def _checkpoint(self) -> None:
        if self._save is not None and self._sound():
            trees.load(self._blank, trees.dump(self.algorithm))  # could it be read back?
        super()._checkpoint()

    def state(self) -> dict[str, Any]:
        """The whole run as a tree of plain values and arrays."""
        return {
            "x": self.server.x,
            "step": self.server.step,
            "next_step": self._next_step,
            "next_s": self._next_s,
            "next_gradients": self._next_gradients,
            "gradients": self.gradients,
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
