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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression import Message
from offbeat.runtime.compute.backend import ALONE_BYTES, rows
from offbeat.runtime.compute.jobs import Job, Joined, Left, More, Timer, TraceNote
from offbeat.workers.compressed import Compressed
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.tasks.contract import Task, guarded
from offbeat.workers.work import Gradient, Work

STACK_BYTES = 2**22  # models stacked for one batched call
NEVER: Any = math.inf, 0, None  # what an empty heap would have on top


class VirtualWorkers:
    """All workers of a fleet: takes jobs, answers events in order of virtual time.

    Args:
        task: what is minimised.
        fleet: the workers' availability.
        timing: the times of their jobs.
        work: what they do with a job.
        x: a model ``[d]``, for what they keep between jobs.
    """

    real = False  # time is virtual

    def __init__(self, task: Task, fleet: Fleet, timing: Timing, work: Work, x: NDArray) -> None:
        self.task, self._plan, self._finish = guarded(task), timing.plan, timing.finish
        n = self.n = fleet.workers
        self.work, self.plain = work, type(work) is Gradient
        self.coded = isinstance(work, Compressed)
        inner = work.work if isinstance(work, Compressed) else work
        self.single = type(inner) is Gradient  # one gradient a job
        self.uploaded = 0  # bytes of the compressed updates that arrived
        self._byte_s = timing.byte_s
        self._kept = work.keep(n, x)
        self.extra = 0  # gradients in the results that arrived, beyond one each
        self.most_steps = work.steps  # of a job so far
        # Samples of each shard that jobs were given; until a job is anything but one gradient of
        # its worker's own data, the jobs' numbers say the same (and nothing is spent on it).
        self._drawn: list[int] | None = None if self.plain else [0] * task.workers
        self._timers: list[tuple[float, int, int]] = []  # heap of (time, order, token)
        self._follows = False  # a trace, which says when timers rang
        self._left: dict[tuple[float, int], list[int]] = {}  # what was not finished, says a trace
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
        self._spare: list[int] = []  # who came back to find nothing to do
        # Jobs with nobody there to take them: the arguments of ``take``.
        self._stranded: list[tuple[NDArray, int, More | None]] = []
        windows = fleet.windows()
        if fleet.on_outage != "pause":
            spans = [(w, span) for w, mine in windows.items() for span in mine]
            changes = [(span[back], back, w) for w, span in spans for back in (0, 1)]
            self._changes = sorted(c for c in changes if c[0] < math.inf)
        self._await_change()

    def take(self, worker: int, x: NDArray, step: int, more: More | None = None) -> None:
        """Queue a job for ``worker``, or for who stands in for it while it is away."""
        self.outstanding = outstanding = self.outstanding + 1
        if outstanding > self.peak:
            self.peak = outstanding
        if worker in self._away:
            here = self._least_loaded()
            if here is None:
                self._stranded.append((x, step, more))
                return
            worker = here
        if self._spare:  # a job that would wait is for one of them
            if worker not in self._spare and self._running[worker] is not None:
                worker = self._spare[0]
            self._spare = [w for w in self._spare if w != worker]
        number = self._numbers[worker]
        self._numbers[worker] = number + 1
        job = Job(self._serial, worker, number, x, step, self.now_s)
        if more is not None or self._drawn is not None:
            self._address(job, more or More())
        self._serial += 1
        self._missing.append(job)
        if self._running[worker] is None:
            self._start(job, job.assigned_s)
        else:
            self._queues[worker].append(job)

    def _address(self, job: Job, more: More) -> None:
        """Say what is more to a job than its worker's next gradient."""
        if self._drawn is None:
            self._drawn = self._numbers + [0] * (self.task.workers - self.n)
            self._drawn[job.worker] -= 1  # this job's own
        if more.shard is not None:
            job.shard = more.shard
        if more.since_s is not None:
            job.assigned_s = more.since_s
        job.steps = more.steps or self.work.steps
        job.draw = self._drawn[job.shard]
        self._drawn[job.shard] += job.steps
        self.most_steps = max(self.most_steps, job.steps)

    def _start(self, job: Job, start_s: float) -> None:
        worker, now_s = job.worker, self.now_s
        if self._finish is not None:  # no link: it starts at once, and arrives when it ends
            job.start_s = start_s
            job.end_s = time_s = self._finish(worker, job.number, start_s, job.steps)
            if start_s < now_s:  # it was given a start in the past
                time_s = max(time_s, now_s)
        else:
            job.start_s, job.end_s, time_s = self._plan(
                worker, job.number, job.assigned_s, self._free_s[worker], job.steps
            )
            self._free_s[worker] = job.end_s
            # A link delivers in order: nothing arrives before what was sent earlier.
            time_s = max(time_s, now_s)
        job.time_s = time_s
        self._running[worker] = job
        job.order = order = self._order
        self._order = order + 1
        if self._byte_s:
            self._charge(job)
            time_s = job.time_s
        if self._popped:
            self._popped = False
            heapreplace(self._heap, (time_s, order, job))
        else:
            heappush(self._heap, (time_s, order, job))

    def _charge(self, job: Job) -> None:
        """Have ``job`` arrive when its update is sent, once it began and its size is known."""
        if job.order >= 0 and job.payload is not None:
            sent_s = self._plan(job.worker, job.number, job.assigned_s, job.start_s, job.steps)[2]
            job.time_s = max(job.time_s, sent_s + job.nbytes * self._byte_s)

    def after(self, seconds: float, token: int) -> None:
        """Answer ``Timer(token)`` when so many seconds have passed, behind results due then."""
        if self._follows:
            return
        self._order += 1
        heappush(self._timers, (self.now_s + seconds, self._order, token))
        self._await_change()

    def pop(self, before_s: float) -> Job | Left | Joined | Timer | TraceNote | None:
        """The next event, a result with its payload; None where none happens before then."""
        heap = self._heap
        if self._popped:
            self._popped = False
            heappop(heap)
        while True:
            while heap and heap[0][2].dropped:
                heappop(heap)
            time_s, order, job = heap[0] if heap else NEVER
            if self._change_s < time_s:
                return self._change() if self._change_s < before_s else None
            if time_s >= before_s:
                return None
            if job.payload is None:
                self._compute(job)
            if job.time_s <= time_s:
                break
            heapreplace(heap, (job.time_s, order, job))  # so long its update is under way
        self._popped = True
        self.now_s = time_s
        worker = job.worker
        self.outstanding -= 1
        self._running[worker] = None
        if queue := self._queues.get(worker):
            self._start(queue.popleft(), time_s)
        if not self.plain:
            self._arrived(job)
        return job

    def reach(self, mark_s: float) -> None:
        """Time goes on to ``mark_s``; ask after ``pop`` answered None."""
        self.now_s = mark_s

    def facts(self) -> dict[str, int]:
        """What became of jobs."""
        return {key: getattr(self, key) for key in ("lost", "reassigned", "cancelled")}

    def ended(self, reason: str) -> None:
        """The run has ended; see ``ComputeBackend``."""

    def close(self) -> None:
        """The run is over."""

    def follow(self, events: list[dict[str, Any]], rung: list[dict[str, Any]] | None) -> None:
        """Have workers leave and return as ``events`` say, and timers ring as ``rung`` does."""
        told = [e for e in events if e["event"] in ("left", "joined")]
        self._changes = [(e["time_s"], int(e["event"] == "joined"), e["worker"]) for e in told]
        self._left = {(e["time_s"], e["worker"]): e["jobs"] for e in told if "jobs" in e}
        if rung is not None:
            self._timers = [(e["time_s"], order, e["token"]) for order, e in enumerate(rung)]
            self._follows = True
        self._await_change()

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
            self._start(queue.popleft(), self.now_s)
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
        if self._kept:  # a queued job needs what its worker will keep of the one before it
            self._missing = [job for job in jobs if job.order < 0]
            jobs = [job for job in jobs if job.order >= 0]
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
                    if hasattr(job, "kept"):
                        job.kept = {name: row.copy() for name, row in job.kept.items()}

    def _batch(self, jobs: list[Job]) -> None:
        x = np.array([job.x for job in jobs]) if len(jobs) > 1 else jobs[0].x[None]
        worker = np.array([job.shard for job in jobs])
        draw = np.array([job.draw for job in jobs])
        losses, payloads, message = self._work(jobs, x, worker, draw)
        for job, loss, payload in zip(jobs, losses, payloads, strict=True):
            job.loss, job.payload = loss, payload
        if message is not None:
            for job, nbytes in zip(jobs, message.sizes.tolist(), strict=True):
                job.nbytes = nbytes
                if self._byte_s:
                    self._charge(job)

    def _work(
        self, jobs: list[Job], x: NDArray, shard: NDArray, draw: NDArray
    ) -> tuple[list[float], NDArray, Message | None]:
        """Losses, updates ``[k, d]`` and their message; in each job what its worker shall keep."""
        if self.plain:
            return rows(self.task, self.work, x, shard, draw, draw, {})
        steps = np.array([job.steps for job in jobs])
        if jobs[0].x.nbytes >= ALONE_BYTES and not self.coded:
            # It is due: its worker's rows may change in place.
            mine = slice(jobs[0].worker, jobs[0].worker + 1)
            kept = {name: held[mine] for name, held in self._kept.items()}
            return rows(self.task, self.work, x, shard, draw, steps, kept)
        # It is ahead of its time, and leaves no trace if it is cancelled.
        worker = np.array([job.worker for job in jobs])
        kept = {name: held[worker] for name, held in self._kept.items()}
        losses, updates, message = rows(self.task, self.work, x, shard, draw, steps, kept)
        if kept:
            for j, job in enumerate(jobs):
                job.kept = {name: held[j : j + 1] for name, held in kept.items()}
        return losses, updates, message

    def _arrived(self, job: Job) -> None:
        """Count the gradients of a result, and keep what its worker shall keep."""
        self.extra += job.steps - 1
        if self.coded:
            self.uploaded += job.nbytes
        if hasattr(job, "kept"):
            for name, row in job.kept.items():
                self._kept[name][job.worker : job.worker + 1] = row
            del job.kept

    # -- Outages ------------------------------------------------------------------------------

    def _change(self) -> Left | Joined | Timer | None:
        """A worker leaves or returns, or a timer rings."""
        if self._timers and self._timers[0][0] <= self._change_s:
            self.now_s, _, token = heappop(self._timers)
            self._await_change()
            return Timer(token)
        time_s, back, worker = self._changes[self._next_change]
        self.now_s = time_s
        self._next_change += 1
        self._await_change()
        return self._return(worker) if back else self._leave(worker)

    def _leave(self, worker: int) -> Left | None:
        self._away.add(worker)
        self._spare = [w for w in self._spare if w != worker]
        jobs = self._unfinished(worker)
        for job in reversed(jobs):
            self._drop(job)
        return Left(worker, jobs)

    def _return(self, worker: int) -> Joined | None:
        self._away.discard(worker)
        stranded, self._stranded = self._stranded, []
        self.outstanding -= len(stranded)
        for waiting in stranded:
            self.take(worker, *waiting)
        return Joined(worker)

    def _unfinished(self, worker: int) -> list[Job]:
        """What a worker that goes away leaves; what is computed and on its way still arrives."""
        jobs, left = self._jobs_of(worker), self._left.get((self.now_s, worker))
        if left is not None:  # what was on its way when the run ended is not in its trace
            return [j for j in jobs if j.number in left]
        return [j for j in jobs if j.order < 0 or j.end_s > self.now_s]

    def _await_change(self) -> None:
        """Set when the next outage begins or ends, or the next timer rings."""
        ahead = self._changes[self._next_change :]
        times = [at[0][0] for at in (ahead, self._timers) if at]
        self._change_s = min(times, default=math.inf)

    def _least_loaded(self) -> int | None:
        here = [w for w in range(self.n) if w not in self._away]
        return min(here, key=lambda w: (len(self._jobs_of(w)), w), default=None)

    def relieve(self, worker: int) -> bool:
        """Take back the newest waiting job from the longest queue, if there is one.

        If not, the next job that would have to wait is for ``worker``.
        """
        longest = max(range(self.n), key=lambda w: (len(self._queues[w]), -w))
        if not self._queues[longest]:
            self._spare.append(worker)
            return False
        self._drop(self._queues[longest][-1])
        return True

    # -- Checkpoints ---------------------------------------------------------------------------

    _COUNTERS: tuple[str, ...] = (
        *("now_s", "outstanding", "peak", "lost", "reassigned", "cancelled"),
        *("_serial", "_order", "_held", "_next_change", "_numbers", "_free_s"),
        *("extra", "most_steps", "uploaded", "_drawn", "_kept", "_spare"),
    )

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values and arrays; equal models are kept once."""
        jobs = self.jobs()
        models = {id(x): x for x in [j.x for j in jobs] + [held[0] for held in self._stranded]}
        at = {key: index for index, key in enumerate(models)}
        return {
            "counters": {key: getattr(self, key) for key in self._COUNTERS},
            "away": sorted(self._away),
            "models": list(models.values()),
            "stranded": [[at[id(x)], step, more] for x, step, more in self._stranded],
            "timers": sorted(self._timers),
            "jobs": [
                {
                    "model": at[id(job.x)],
                    **{
                        key: getattr(job, key)
                        for key in Job.__slots__
                        if key not in ("x", "dropped") and hasattr(job, key)
                    },
                }
                for job in jobs
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` answered."""
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self._away = set(state["away"])
        self._timers = [(time_s, order, token) for time_s, order, token in state["timers"]]
        self._await_change()
        models = state["models"]
        for x in models:
            x.flags.writeable = False
        self._stranded = [
            (models[at], step, more and More(*more)) for at, step, more in state["stranded"]
        ]
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
