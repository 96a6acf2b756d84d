"""Gradients of a gossip run under the virtual clock, computed by a backend."""

from itertools import count

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.base.registry import Spec
from offbeat.runtime.compute.backend import Back, ComputeBackend, Failed, JobRequest, JobResult
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Kept, Work

COLLECT_S = 1.0  # between looks at whether anybody is left


class FarmedWork:
    """``work``, row by row on the processes of ``backend``: the same numbers."""

    spec: Spec | None = None

    def __init__(self, work: Work, backend: ComputeBackend) -> None:
        self.steps, self.backend = work.steps, backend
        self._keep = work.keep
        self._serials = count()

    def keep(self, n: int, x: NDArray) -> Kept:
        return self._keep(n, x)

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        orders = {}
        for row, *job in zip(x, worker.tolist(), draw.tolist(), steps.tolist(), strict=True):
            i, drawn, many = job
            serial = next(self._serials)
            orders[serial] = JobRequest(serial, i, i, drawn, many, 0, row, None)
            self.backend.submit(orders[serial])
        first = next(iter(orders), 0)
        losses, found = np.empty(len(x), x.dtype), np.empty_like(x)
        while orders:
            for event in self.backend.collect(COLLECT_S):
                if isinstance(event, JobResult) and event.serial in orders:
                    del orders[event.serial]
                    losses[event.serial - first] = event.loss
                    found[event.serial - first] = event.payload
                elif isinstance(event, Failed):
                    raise ComputeError(f"a node's gradient failed with\n{event.why}")
                elif isinstance(event, Back):  # its process knows nothing of what it was given
                    for order in orders.values():
                        if order.worker == event.worker:
                            self.backend.submit(order)
        return losses, found
