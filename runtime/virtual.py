"""Workers under a virtual clock.

A heap of (arrival, order of start, job) decides what happens next: earlier first, and of two
results that arrive at the same instant the one whose job *started* first.  A worker has a FIFO
queue; its next job starts the instant the last one ends.

Gradients are computed lazily.  A job's input is fixed when it is handed out, so nothing is
computed until a result is due that is missing; then every outstanding job is computed in one
batch.  The trajectory is that of one-at-a-time evaluation, the cost that of a batch.
"""

import math
from collections import defaultdict, deque
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.tasks.contract import Task

STACK_BYTES = 2**22  # models stacked for one batched call
ALONE_BYTES = 2**20  # models this large are computed one by one, when due
NEVER: Any = math.inf, 0, None  # what an empty heap would have on top


@final
class Job:
    """One assigned computation, and after it its result; what a method sees as ``Update``."""

    __slots__ = (
        "assigned_s",
        "dropped",
        "end_s",
        "loss",
        "number",
        "order",
        "payload",
        "serial",
        "start_s",
        "step",
        "time_s",
        "worker",
        "x",
    )
    x: Any  # the model [d]; None once dropped
    payload: Any
    loss: float
    order: int  # of start, among all jobs: breaks ties
    start_s: float
    end_s: float
    time_s: float

    def __init__(
        self, serial: int, worker: int, number: int, x: NDArray, step: int, assigned_s: float
    ) -> None:
        self.serial, self.worker, self.number = serial, worker, number
        self.x, self.step, self.assigned_s = x, step, assigned_s
        self.payload = None
        self.order = -1  # not started
        self.dropped = False


class Left(NamedTuple):
    """A worker went away; ``jobs`` are what it had not finished."""

    worker: int
    jobs: list[Job]


class Joined(NamedTuple):
    """A worker is back."""

    worker: int


class VirtualWorkers:
    """All workers of a fleet: takes jobs, answers events in order of virtual time.

    Args:
        task: computes the results.
        fleet: the workers' availability.
        timing: the times of their jobs.
    """

    def __init__(self, task: Task, fleet: Fleet, timing: Timing) -> None:
        self.task, self._plan, self._finish = task, timing.plan, timing.finish
        n = self.n = fleet.workers
        self.now_s = 0.0
        self.outstanding = 0
        self.peak = 0  # most jobs outstanding at a time
        self.lost = self.reassigned = self.cancelled = 0
        self._serial = self._order = 0
        self._numbers = [0] * n
        self._free_s = [0.0] * n
        self._heap: list[tuple[float, int, Job]] = []
        self._popped = False  # the first entry is used up: the next one takes its place
        self._stale = 0  # jobs dropped since the heap was last swept
        self._running: list[Job | None] = [None] * n
        self._queues: defaultdict[int, deque[Job]] = defaultdict(deque)  # of who has had one
        self._missing: list[Job] = []  # outstanding jobs not computed yet, oldest first
        self._held = 0  # rows computed since memory was last made compact
        # Outages that cost jobs: (time, 0 down / 1 up, worker), and who is away.
        self.reassigns = fleet.on_outage == "reassign"
        self._changes: list[tuple[float, int, int]] = []
        self._next_change = 0
        self._away: set[int] = set()
        self._stranded: list[tuple[NDArray, int]] = []  # jobs with nobody there to take them
        windows = fleet.windows()
        if fleet.on_outage != "pause":
            spans = [(w, span) for w, mine in windows.items() for span in mine]
            changes = [(span[back], back, w) for w, span in spans for back in (0, 1)]
            self._changes = sorted(c for c in changes if c[0] < math.inf)
        self._await_change()

    def take(self, worker: int, x: NDArray, step: int) -> None:
        """Queue a job for ``worker``, or for who stands in for it while it is away."""
        self.outstanding = outstanding = self.outstanding + 1
        if outstanding > self.peak:
            self.peak = outstanding
        if worker in self._away:
            here = self._least_loaded()
            if here is None:
                self._stranded.append((x, step))
                return
            worker = here
        number = self._numbers[worker]
        self._numbers[worker] = number + 1
        job = Job(self._serial, worker, number, x, step, self.now_s)
        self._serial += 1
        self._missing.append(job)
        if self._running[worker] is None:
            self._start(job)
        else:
            self._queues[worker].append(job)

    def _start(self, job: Job) -> None:
        worker, now_s = job.worker, self.now_s
        if self._finish is not None:  # no link: it starts now, and arrives when it ends
            job.start_s = now_s
            job.end_s = time_s = self._finish(worker, job.number, now_s)
        else:
            job.start_s, job.end_s, time_s = self._plan(
                worker, job.number, job.assigned_s, self._free_s[worker]
            )
            self._free_s[worker] = job.end_s
            # A link delivers in order: nothing arrives before what was sent earlier.
            time_s = max(time_s, now_s)
        job.time_s = time_s
        self._running[worker] = job
        job.order = order = self._order
        self._order = order + 1
        if self._popped:
            self._popped = False
            heapreplace(self._heap, (time_s, order, job))
        else:
            heappush(self._heap, (time_s, order, job))

    def pop(self, before_s: float) -> Job | Left | Joined | None:
        """The next event, a result with its payload; None where none happens before then."""
        heap = self._heap
        if self._popped:
            self._popped = False
            heappop(heap)
        while heap and heap[0][2].dropped:
            heappop(heap)
        time_s, _, job = heap[0] if heap else NEVER
        if self._change_s < time_s:
            ahead = self._changes[self._next_change]
            return self._change(*ahead) if ahead[0] < before_s else None
        if time_s >= before_s:
            return None
        self._popped = True
        if job.payload is None:
            self._compute(job)
        self.now_s = time_s
        worker = job.worker
        self.outstanding -= 1
        self._running[worker] = None
        if queue := self._queues.get(worker):
            self._start(queue.popleft())
        return job

    def idle(self) -> bool:
        """Whether nothing is left to happen; ask after ``pop`` answered None."""
        return min(self._change_s, self._heap[0][0] if self._heap else math.inf) == math.inf

    def cancel(self, worker: int) -> int:
        """Drop every outstanding job of ``worker``; answers how many there were."""
        jobs = self._jobs_of(worker)
        for job in reversed(jobs):
            self._drop(job)
        self.cancelled += len(jobs)
        return len(jobs)

    def has_job(self, worker: int) -> bool:
        """Whether ``worker`` has anything to do."""
        return self._running[worker] is not None

    def running(self) -> list[Job]:
        """The jobs that are being computed."""
        return [job for job in self._running if job is not None]

    def jobs(self) -> list[Job]:
        """Every outstanding job, oldest first."""
        found = [job for worker in range(self.n) for job in self._jobs_of(worker)]
        return sorted(found, key=lambda job: job.serial)

    def _jobs_of(self, worker: int) -> list[Job]:
        running = self._running[worker]
        return ([] if running is None else [running]) + list(self._queues.get(worker, ()))

    def _drop(self, job: Job) -> None:
        """Take an outstanding job back; if it was running, the next in the queue starts."""
        job.dropped = True
        job.x = job.payload = None  # its entry in the heap may stay for long
        self.outstanding -= 1
        worker, queue = job.worker, self._queues[job.worker]
        if self._running[worker] is not job:
            queue.remove(job)
            return
        self._running[worker] = None
        self._free_s[worker] = min(self._free_s[worker], self.now_s)
        if queue:
            self._start(queue.popleft())
        self._stale += 1
        if self._stale > len(self._heap) // 2 + 64 and not self._popped:
            self._stale = 0
            self._heap = [entry for entry in self._heap if not entry[2].dropped]
            heapify(self._heap)

    # -- Results ------------------------------------------------------------------------------

    def _compute(self, due: Job) -> None:
        """Compute every missing result, or only the one that is due where models are large."""
        if due.x.nbytes >= ALONE_BYTES:
            self._missing = [job for job in self._missing if job is not due and not job.dropped]
            self._batch([due])
            return
        jobs, self._missing = self._missing, []
        if self.cancelled or self._away or self._next_change:
            jobs = [job for job in jobs if not job.dropped]
        rows = max(1, STACK_BYTES // due.x.nbytes)
        for first in range(0, len(jobs), rows):
            self._batch(jobs[first : first + rows])
        # A slow worker's row keeps its whole batch in memory: now and then, free the batches.
        self._held += len(jobs)
        if self._held > 4 * self.outstanding + 64:
            self._held = 0
            for job in chain(self._running, *self._queues.values()):
                if job is not None and job.payload is not None:
                    job.payload = job.payload.copy()

    def _batch(self, jobs: list[Job]) -> None:
        x = np.array([job.x for job in jobs]) if len(jobs) > 1 else jobs[0].x[None]
        worker = np.array([job.worker for job in jobs])
        draw = np.array([job.number for job in jobs])
        rows, payloads = self.task.gradient(x, worker, draw)
        losses, flat = rows.tolist(), payloads.reshape(-1)
        if not math.isfinite(flat.dot(flat) + sum(losses)):
            # Not a number marks the rows that are not finite; their arrival stops the run.
            good = np.isfinite(payloads).all(axis=1) & np.isfinite(rows)
            losses = np.where(good, rows, np.nan).tolist()
        for job, loss, payload in zip(jobs, losses, payloads, strict=True):
            job.loss, job.payload = loss, payload

    # -- Outages ------------------------------------------------------------------------------

    def _change(self, time_s: float, back: int, worker: int) -> Left | Joined:
        """A worker leaves or returns."""
        self.now_s = time_s
        self._next_change += 1
        self._await_change()
        if back:
            self._away.discard(worker)
            stranded, self._stranded = self._stranded, []
            self.outstanding -= len(stranded)
            for x, step in stranded:
                self.take(worker, x, step)
            return Joined(worker)
        self._away.add(worker)
        # What is computed and on its way still arrives.
        jobs = [j for j in self._jobs_of(worker) if j.order < 0 or j.end_s > time_s]
        for job in reversed(jobs):
            self._drop(job)
        return Left(worker, jobs)

    def _await_change(self) -> None:
        ahead = self._changes[self._next_change :]
        self._change_s = ahead[0][0] if ahead else math.inf

    def _least_loaded(self) -> int | None:
        here = [w for w in range(self.n) if w not in self._away]
        return min(here, key=lambda w: (len(self._jobs_of(w)), w), default=None)

    def relieve(self) -> bool:
        """Take back the newest waiting job from the longest queue, if there is one."""
        longest = max(range(self.n), key=lambda w: (len(self._queues[w]), -w))
        if not self._queues[longest]:
            return False
        self._drop(self._queues[longest][-1])
        return True

    # -- Checkpoints ---------------------------------------------------------------------------

    _COUNTERS = (
        *("now_s", "outstanding", "peak", "lost", "reassigned", "cancelled"),
        *("_serial", "_order", "_held", "_next_change", "_numbers", "_free_s"),
    )

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values and arrays; equal models are kept once."""
        jobs = self.jobs()
        models = {id(x): x for x in [j.x for j in jobs] + [x for x, _ in self._stranded]}
        at = {key: index for index, key in enumerate(models)}
        return {
            "counters": {key: getattr(self, key) for key in self._COUNTERS},
            "away": sorted(self._away),
            "models": list(models.values()),
            "stranded": [[at[id(x)], step] for x, step in self._stranded],
            "jobs": [
                {
                    "model": at[id(job.x)],
                    **{key: getattr(job, key) for key in Job.__slots__
                       if key not in ("x", "dropped") and hasattr(job, key)},
                }
                for job in jobs
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self._away = set(state["away"])
        self._await_change()
        models = state["models"]
        for x in models:
            x.flags.writeable = False
        self._stranded = [(models[at], step) for at, step in state["stranded"]]
        for saved in state["jobs"]:
            fields = dict(saved)
            x = models[fields.pop("model")]
            job = Job(0, 0, 0, x, 0, 0.0)
            for key, value in fields.items():
                setattr(job, key, value)
            if job.payload is None:
                self._missing.append(job)
            if job.order < 0:
                self._queues[job.worker].append(job)
            else:
                self._running[job.worker] = job
                heappush(self._heap, (job.time_s, job.order, job))
