"""Workers whose jobs a backend computes: under the virtual clock, or as they really come in."""

import logging
import math
import time
from heapq import heappop, heappush
from typing import Any

from numpy.typing import NDArray

from offbeat.algorithms.compression import decode
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.compute.backend import (
    ComputeBackend,
    ComputeEvent,
    Failed,
    Gone,
    JobRequest,
    JobResult,
)
from offbeat.runtime.compute.jobs import Job, Joined, Left, More, Timer, TraceNote
from offbeat.runtime.server.virtual import VirtualWorkers
from offbeat.workers.compressed import SENT
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Work

log = logging.getLogger("offbeat")
LOOK_S = 0.1  # seconds after which a wait is interrupted for signals and checkpoints
MOST_FAILURES = 3  # of one job, before the run is given up


class RemoteWorkers(VirtualWorkers):
    """Time is virtual: the same run, to the bit, as with ``VirtualWorkers``.

    A job is handed to the backend as soon as its input is known, long before its result is due.

    Args:
        task, fleet, timing, work, x: see ``VirtualWorkers``.
        backend: who computes.
    """

    def __init__(
        self,
        task: Task,
        fleet: Fleet,
        timing: Timing,
        work: Work,
        x: NDArray,
        backend: ComputeBackend,
    ) -> None:
        super().__init__(task, fleet, timing, work, x)
        self.backend = backend
        self._sent: dict[int, Job] = {}  # serial -> job whose answer is awaited
        self._unaware = set(range(self.n))  # whose process may not have what the worker keeps
        self._report = getattr(task, "report", None)  # of losses that only workers know
        self._failures: dict[int, int] = {}  # serial of what is awaited -> how often it raised
        self.failures = self.restarts = 0

    _COUNTERS = *VirtualWorkers._COUNTERS, "failures", "restarts"

    def facts(self) -> dict[str, int]:
        """See ``VirtualWorkers``; times that jobs raised, and that processes were replaced."""
        return super().facts() | {"failures": self.failures, "restarts": self.restarts}

    def ended(self, reason: str) -> None:
        self.backend.ended(reason)

    def state(self) -> dict[str, Any]:
        self.backend.saving()
        return super().state()

    def close(self) -> None:
        self.backend.close()

    def take(self, worker: int, x: NDArray, step: int, more: More | None = None) -> None:
        super().take(worker, x, step, more)
        self._send()

    def _compute(self, due: Job) -> None:
        self._send()
        while due.payload is None:
            for event in self.backend.collect(LOOK_S):
                self._hear(event)

    def _send(self) -> None:
        """Hand over what can be computed: of workers that keep something, only what runs."""
        waiting = []
        for job in self._missing:
            if job.dropped:
                continue
            if self._kept and job.order < 0:
                waiting.append(job)
            else:
                self._submit(job)
        self._missing = waiting

    def _submit(self, job: Job) -> None:
        kept = None
        if self._kept and job.worker in self._unaware:
            mine = slice(job.worker, job.worker + 1)
            kept = {name: held[mine].copy() for name, held in self._kept.items()}
            self._unaware.discard(job.worker)
        self._sent[job.serial] = job
        order = JobRequest(
            job.serial, job.worker, job.shard, job.draw, job.steps, job.step, job.x, kept
        )
        self.backend.submit(order)

    def _drop(self, job: Job) -> None:
        if self._sent.pop(job.serial, None) is not None:
            self.backend.cancel(job.serial)
            self._failures.pop(job.serial, None)
        if self._kept:  # its process may have gone on from what was never accepted
            self._unaware.add(job.worker)
        super()._drop(job)

    def _hear(self, event: ComputeEvent) -> None:
        if isinstance(event, JobResult):
            if (job := self._sent.pop(event.serial, None)) is not None:  # else it was dropped
                self._failures.pop(event.serial, None)
                job.loss, job.spent_s = event.loss, event.spent_s
                self._receive(job, event)
                if self._report is not None and event.loss is not None:
                    self._report(event.loss)
                self._answered(job)
        elif isinstance(event, Failed):
            self._failed(event)
        elif isinstance(event, Gone):
            self._gone(event)
        else:
            self._back(event.worker)

    def _receive(self, job: Job, answer: JobResult) -> None:
        """Take what was sent for ``job``, and make of it what its worker made of it, too."""
        payload, job.nbytes, kept = answer.payload, answer.nbytes, answer.kept
        if isinstance(payload, bytes):
            payload, job.nbytes = decode([payload], job.x.size).dense(), len(payload)
        if SENT in self._kept:
            payload = self._kept[SENT][job.worker] + payload
            kept = kept | {SENT: payload[None]}
        job.payload = payload
        if kept:
            job.kept = kept
        if self._byte_s:
            self._charge(job)

    def _answered(self, job: Job) -> None:
        """The payload of ``job`` is here."""

    def _failed(self, event: Failed) -> None:
        if (job := self._sent.get(event.serial)) is None:
            return
        self.failures += 1
        count = self._failures[event.serial] = self._failures.get(event.serial, 0) + 1
        said = f"job {job.number} of worker {job.worker} (shard {job.shard}, draw {job.draw}"
        if count >= MOST_FAILURES:
            raise ComputeError(
                f"{said}, model of step {job.step}) failed {count} times; the last time with\n"
                f"{event.why}"
            )
        if count == 1:
            log.warning("%s) failed and is tried again:\n%s", said, event.why)
        self._unaware.add(job.worker)
        self._submit(job)

    def _gone(self, event: Gone) -> None:
        """A process is gone, and its orders: they are given to the next."""

    def _back(self, worker: int) -> None:
        """A new process: it is given again what its predecessor had."""
        self.restarts += 1
        self._unaware.add(worker)
        for job in sorted(self._sent.values(), key=lambda job: job.serial):
            if job.worker == worker:
                self._submit(job)


class LiveWorkers(RemoteWorkers):
    """Time is real: results count in the order in which they come.

    A worker whose speed is emulated is never waited for, nor slowed down: its result is withheld
    until the time has passed that its speed law and its links would have taken.

    Args:
        task, fleet, timing, work, x, backend: see ``RemoteWorkers``.
        pace: real seconds a second of this run; all its times are in the latter.
    """

    real = True

    def __init__(
        self,
        task: Task,
        fleet: Fleet,
        timing: Timing,
        work: Work,
        x: NDArray,
        backend: ComputeBackend,
        pace: float = 1.0,
    ) -> None:
        super().__init__(task, fleet, timing, work, x, backend)
        self._pace, self._measured = pace, fleet.law().measured
        self._waits = fleet.on_outage == "pause"  # jobs wait for their worker's return
        self._came: list[Left | Joined | TraceNote] = []  # to be told, oldest first
        self._without: set[int] = set()  # workers whose process is gone, and may be back
        self._began_s, self._before_s = time.monotonic(), 0.0

    def clock_s(self) -> float:
        """Seconds of this run up to this moment."""
        return self._before_s + (time.monotonic() - self._began_s) / self._pace

    def reach(self, mark_s: float) -> None:
        self.now_s = max(self.now_s, min(mark_s, self.clock_s()))

    def idle(self) -> bool:
        return super().idle() and not (self._sent or self._came or self._without)

    def pop(self, before_s: float) -> Job | Left | Joined | Timer | TraceNote | None:
        """The next event, waiting for it for a little while; None where none came by then."""
        heap = self._heap
        look_s = time.monotonic() + LOOK_S
        while True:
            while heap and heap[0][2].dropped:
                heappop(heap)
            now_s = self.clock_s()
            ready_s = heap[0][0] if heap else math.inf
            if self._came:
                self._tick(now_s)
                return self._happen(self._came.pop(0))
            if self._change_s <= min(ready_s, now_s):
                event = self._change()
                self._tick(now_s)
                return event
            if ready_s <= now_s:
                self._tick(now_s)
                return self._deliver(heappop(heap)[2])
            left_s = look_s - time.monotonic()
            if before_s <= now_s or left_s <= 0:
                return None
            until_s = min(ready_s, self._change_s, before_s)
            for heard in self.backend.collect(min(left_s, (until_s - now_s) * self._pace)):
                self._hear(heard)

    def _tick(self, now_s: float) -> None:
        """No two events share a time, so that a trace tells their order."""
        self.now_s = max(now_s, math.nextafter(self.now_s, math.inf))

    def _deliver(self, job: Job) -> Job:
        worker = job.worker
        job.time_s = self.now_s
        if self._measured or job.late:
            job.end_s = job.time_s
        if self._measured:
            job.start_s = max(job.start_s, job.end_s - job.spent_s / self._pace)
        self._free_s[worker] = job.end_s
        self.outstanding -= 1
        self._running[worker] = None
        if not self.plain:
            self._arrived(job)
        if queue := self._queues.get(worker):
            self._start(queue.popleft(), job.end_s)
            self._send()
        return job

    def _start(self, job: Job, start_s: float) -> None:
        """Its result is due when its worker would have it at the server."""
        free_s = self._free_s[job.worker]
        job.start_s, job.end_s, job.time_s = self._plan(
            job.worker, job.number, job.assigned_s, free_s, job.steps
        )
        if self._measured:
            job.end_s = math.inf  # nobody knows
        self._running[job.worker] = job
        job.order, job.late = self._order, False
        self._order += 1
        if job.payload is not None:
            if self._byte_s:
                self._charge(job)
            self._answered(job)

    def _answered(self, job: Job) -> None:
        if job.order < 0:  # its turn comes later
            return
        now_s = self.clock_s()
        job.late = now_s > job.time_s
        heappush(self._heap, (max(now_s, job.time_s), job.order, job))

    # -- Processes that come and go --------------------------------------------------------------

    def _gone(self, event: Gone) -> None:
        self._without.add(event.worker)
        self._came.append(TraceNote({"event": "gone", "worker": event.worker, "why": event.why}))
        if not self._waits:
            self._came.append(Left(event.worker, []))

    def _back(self, worker: int) -> None:
        super()._back(worker)
        self._without.discard(worker)
        back = TraceNote({"event": "back", "worker": worker})
        self._came.append(back if self._waits else Joined(worker))

    def _happen(self, event: Left | Joined | TraceNote) -> Left | Joined | TraceNote | None:
        if isinstance(event, Left):
            return self._leave(event.worker)
        if isinstance(event, Joined):
            return self._return(event.worker)
        return event

    def _leave(self, worker: int) -> Left | None:
        """See ``VirtualWorkers``; its process may be gone and its outage go on, both at once."""
        return None if worker in self._away else super()._leave(worker)

    def _return(self, worker: int) -> Joined | None:
        """See ``VirtualWorkers``; it is back when neither keeps it away."""
        if worker not in self._away or worker in self._without or self._is_out(worker):
            return None
        return super()._return(worker)

    def _is_out(self, worker: int) -> bool:
        past = reversed(self._changes[: self._next_change])
        return next((not back for _, back, whose in past if whose == worker), False)

    def _unfinished(self, worker: int) -> list[Job]:
        """See ``VirtualWorkers``; what was not answered in time is not on its way either."""
        done = [j for j in self._jobs_of(worker) if j.order >= 0 and j.payload is not None]
        sent = [j for j in done if j.end_s <= self.now_s and not j.late]
        return [j for j in self._jobs_of(worker) if j not in sent]

    # -- Checkpoints ---------------------------------------------------------------------------

    def restore(self, state: dict[str, Any]) -> None:
        """See ``VirtualWorkers``: what was being computed is computed again, by new processes."""
        super().restore(state)
        self._began_s, self._before_s = time.monotonic(), self.now_s
        self._heap.clear()
        for job in self.running():
            job.late = False
            if job.payload is not None:
                self._answered(job)
        for event in self.backend.collect(0.0):  # whose process is not there
            self._hear(event)
        self._came += [Joined(worker) for worker in sorted(self._away)]  # whose was not, but is
        self._send()
