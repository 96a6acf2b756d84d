"""What a compressed update costs: CPU of a job at its worker and at its server, and bytes sent.

Float32 Gaussian gradients of a million entries, which the worker is given; models do not travel
here.  The worker's part is the job from the order to what is to be sent, the server's from what
came to the update that a method sees.  Medians of CPU time of this process, one thread; encodings
and pieces of an uncompressed update would come on top of its row.
"""

import math
import statistics
import time
from typing import Any

import numpy as np
from common import arguments, finish, where
from numpy.typing import NDArray

from offbeat.runtime.base.registry import Spec
from offbeat.runtime.compute.backend import ComputeBackend, ComputeEvent, JobRequest, Runner
from offbeat.runtime.server.remote import RemoteWorkers
from offbeat.workers.compressed import compressed
from offbeat.workers.fleet import Fleet
from offbeat.workers.work import Work, gradient

D = 1_000_000
WORKS = {
    "gradient": gradient(),
    "identity": compressed("identity"),
    "topk(0.01)": compressed("topk(0.01)"),
    "topk(0.01), no feedback": compressed("topk(0.01)", feedback=False),
    "scaled-sign": compressed("scaled-sign"),
    "contractive(qsgd(4))": compressed("contractive(qsgd(4))"),
}
MOST_MS = 10.0  # of top-k, at both ends together
MOST_BYTES = D * 4 / 75


class Given:
    """A task whose gradients are there already."""

    spec: Spec | None = None
    workers, dim = 1, D

    def __init__(self) -> None:
        self._g = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)

    def initial(self, seed: int) -> NDArray:
        """Zero."""
        return np.zeros(D, np.float32)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """One of four."""
        return np.ones(1), self._g[draw % 4]

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """Nothing."""
        return {}


class Idle(ComputeBackend):
    """Keeps the last order."""

    order: JobRequest

    def submit(self, order: JobRequest) -> None:
        self.order = order

    def collect(self, timeout_s: float) -> list[ComputeEvent]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing."""


def cost(work: Work, jobs: int) -> tuple[float, float, int]:
    """Milliseconds at the worker and at the server, and bytes, of a job."""
    task, fleet, backend = Given(), Fleet(workers=1), Idle()
    x = task.initial(0)
    x.flags.writeable = False
    server = RemoteWorkers(task, fleet, fleet.timing(0, 0), work, x, backend)
    runner = Runner(task, work)
    spent: tuple[list[float], list[float]] = [], []
    for step in range(jobs):
        server.take(0, x, step)
        times = [time.process_time()]
        (answer,) = runner.compute([backend.order])
        times.append(time.process_time())
        server._hear(answer)
        server.pop(math.inf)
        times.append(time.process_time())
        for mine, first, last in zip(spent, times[:-1], times[1:], strict=True):
            mine.append(1e3 * (last - first))
    payload: Any = answer.payload
    nbytes = len(payload) if isinstance(payload, bytes) else payload.nbytes
    return statistics.median(spent[0]), statistics.median(spent[1]), nbytes


def main() -> None:
    """See the module."""
    options = arguments(str(__doc__).splitlines()[0])
    print(f"d = {D:,}, float32; {where()}\n")
    print(f"{'update':28}{'worker ms':>10}{'server ms':>10}{'bytes':>12}")
    figures: dict[str, Any] = {}
    for name, work in WORKS.items():
        worker_ms, server_ms, nbytes = cost(work, 20 if options.quick else 100)
        print(f"{name:28}{worker_ms:10.2f}{server_ms:10.2f}{nbytes:12,}")
        figures[name] = {"worker_ms": worker_ms, "server_ms": server_ms, "bytes": nbytes}
    top = figures["topk(0.01)"]
    finish(
        figures,
        {
            "top-k takes its worker and its server 10 ms at most": top["worker_ms"]
            + top["server_ms"]
            <= MOST_MS,
            "one percent is a 75th of the bytes": top["bytes"] <= MOST_BYTES,
        },
    )


if __name__ == "__main__":
    main()
