"""Who computes jobs somewhere else: the contract between a server run and what carries it.

    backend.submit(order); ...; for event in backend.collect(timeout_s): ...

The run says what is to be computed; the backend moves it to a process that has the task, has a
``Runner`` there compute it, and brings the answer back, once or not at all.  When results count is
not its business: see ``runtime.server.remote``.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression import Message
from offbeat.runtime.base.tensors import fetch, finite, joined, keep_freed
from offbeat.workers.compressed import SENT, Compressed
from offbeat.workers.tasks.contract import Task, guarded
from offbeat.workers.work import Gradient, Kept, Work, updated

ALONE_BYTES = 2**20  # models this large are computed one by one


class JobRequest(NamedTuple):
    """A job as the process that computes it needs it."""

    serial: int
    """Its number among all jobs of the run; an answer names it."""
    worker: int
    """Whose job it is, 0..n-1; a worker's orders are computed in the order of submission."""
    shard: int
    draw: int
    steps: int
    step: int
    """The server step of the model: orders of one step mostly have one model (see ``x``)."""
    x: NDArray
    """The model ``[d]``, never changed; the same object where it is the same model."""
    kept: Kept | None
    """Rows ``[1, ...]`` that its worker keeps, where its process may not have them; else None."""


class JobResult(NamedTuple):
    """What came of an order."""

    serial: int
    loss: float | None
    """Not a number where loss or payload is not finite; None where nobody said what it is."""
    payload: NDArray | bytes
    """``[d]``, or the compressor's frame that stands for it."""
    kept: Kept
    """Rows ``[1, ...]`` that the worker keeps from now on; but for h of compressed work."""
    spent_s: float
    """Real seconds that were spent computing."""
    nbytes: int = 0
    """Of the frame, where ``payload`` was one and is read already."""


class Gone(NamedTuple):
    """A worker's process is gone, and all it had been given with it."""

    worker: int
    why: str
    """Part of a sentence: "its process was killed"."""


class Back(NamedTuple):
    """A worker has a process again, which knows nothing."""

    worker: int


class Failed(NamedTuple):
    """The task's or the work's own code raised."""

    serial: int
    why: str
    """The traceback."""


ComputeEvent = JobResult | Gone | Back | Failed


class ComputeBackend(ABC):
    """Processes that compute.

    A worker that is not there at the beginning is ``Gone`` at the first ``collect``.  After
    ``Gone`` the orders it had are forgotten: what is still wanted is submitted again after
    ``Back``, or to another.
    """

    @abstractmethod
    def submit(self, order: JobRequest) -> None:
        """Have it computed; does not block."""

    def cancel(self, serial: int) -> None:  # noqa: B027 - it may be computed in vain
        """Its answer is not wanted any more; one that comes all the same is no error."""

    @abstractmethod
    def collect(self, timeout_s: float) -> Sequence[ComputeEvent]:
        """What happened, waiting for at most so long where nothing has; 0 does not wait.

        Raises:
            ComputeError: nobody is left to compute.
        """

    def saving(self) -> None:  # noqa: B027 - most are nobody else's
        """The run's state is about to be saved.

        Raises:
            Fenced: the run is another process's by now.
        """

    def checkpointed(self, step: int) -> None:  # noqa: B027 - most need not know
        """All that arrived up to ``step`` is on the disk."""

    def ended(self, reason: str) -> None:  # noqa: B027 - most need not know
        """The run has ended, as ``Result.reason`` says; ``close`` follows."""

    @abstractmethod
    def close(self) -> None:
        """End every process it began; may be called twice."""


class Runner:
    """Computes orders, on the worker's side.

    Args:
        task: whose gradients.
        work: what a worker does with a job.
    """

    def __init__(self, task: Task, work: Work) -> None:
        keep_freed()
        self.task, self.work = guarded(task), work
        self._kept: dict[int, Kept] = {}  # on the task's device, if that is elsewhere
        self._apart = getattr(task, "apart", False)

    def compute(self, orders: Sequence[JobRequest]) -> list[JobResult]:
        """Answers to ``orders``, at once where models are small and the workers differ."""
        alone = orders[0].x.nbytes >= ALONE_BYTES or (
            type(self.work) is not Gradient and len({o.worker for o in orders}) < len(orders)
        )
        groups = [[order] for order in orders] if alone else [list(orders)]
        return [answer for group in groups for answer in self._batch(group)]

    def _batch(self, orders: list[JobRequest]) -> list[JobResult]:
        began_s = time.perf_counter()
        x = np.array([o.x for o in orders]) if len(orders) > 1 else orders[0].x[None]
        shard, draw, steps = np.array([(o.shard, o.draw, o.steps) for o in orders]).T
        if self._apart:
            x = self.task.load(x)  # type: ignore[attr-defined]
        mine = [self._keeps(order) for order in orders]
        kept = {  # copies: of a job that fails nothing is kept
            name: joined([row[name] for row in mine])
            if name != SENT or len(mine) > 1
            else mine[0][name]
            for name in mine[0]
        }
        losses, payloads, message = rows(self.task, self.work, x, shard, draw, steps, kept)
        sent = fetch(payloads) if message is None else message.encode()
        told = {name: fetch(held) for name, held in kept.items() if name != SENT}
        spent_s = (time.perf_counter() - began_s) / len(orders)
        answers = []
        for j, (order, loss) in enumerate(zip(orders, losses, strict=True)):
            if kept:
                self._kept[order.worker] = {name: held[j : j + 1] for name, held in kept.items()}
            row = {name: held[j : j + 1] for name, held in told.items()}
            answers.append(JobResult(order.serial, loss, sent[j], row, spent_s))
        return answers

    def _keeps(self, order: JobRequest) -> Kept:
        if order.kept is None and order.worker in self._kept:
            return self._kept[order.worker]
        kept = self.work.keep(1, order.x) if order.kept is None else order.kept
        if not self._apart:
            return kept
        work, load = self.work, self.task.load  # type: ignore[attr-defined]
        there = {name for name, row in kept.items() if row.ndim > 1}
        if isinstance(work, Compressed) and not work.there(self.task):
            there -= {SENT}
        return {name: load(row) if name in there else row for name, row in kept.items()}


def rows(
    task: Task, work: Work, x: NDArray, shard: NDArray, draw: NDArray, steps: NDArray, kept: Kept
) -> tuple[list[float], NDArray, Message | None]:
    """Losses and payloads ``[k, d]`` of k jobs, and the message that travels in their stead.

    Payloads are tensors where x is.  The loss of what is not finite is not a number.
    """
    message = None
    if type(work) is Gradient:
        losses, payloads = task.gradient(x, shard, draw)
    elif isinstance(work, Compressed):
        losses, payloads, message = work.coded(task, x, shard, draw, steps, kept)
    else:
        losses, payloads = updated(work, task, x, shard, draw, steps, kept)
    told = losses.tolist()
    if not (math.isfinite(sum(told)) and finite(payloads)):
        good = np.isfinite(fetch(payloads)).all(axis=1) & np.isfinite(told)
        told = np.where(good, told, np.nan).tolist()
    return told, payloads, message
