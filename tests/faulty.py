"""Tasks with faults of their own, which leave a mark when they happen."""

import os
import signal
import time
from pathlib import Path

from offbeat.workers.tasks import quadratic


class Faulty:
    """A quadratic; some of its gradients do something else first, each as often as it may.

    Args:
        faults: (worker, draw) -> what happens ("die", "raise" or "sleep"), and how often at most.
        marks: a folder in which each fault that happened leaves a file.
    """

    spec = None

    def __init__(self, marks, faults, workers=8, dim=5):
        self.inner = quadratic(dim, workers=workers, noise=0.3, seed=2)
        self.workers, self.dim = workers, dim
        self.marks, self.faults = Path(marks), faults

    def initial(self, seed):
        return self.inner.initial(seed)

    def evaluate(self, x):
        return self.inner.evaluate(x)

    def gradient(self, x, worker, draw):
        for place in zip(worker.tolist(), draw.tolist(), strict=True):
            if place in self.faults:
                self._happen(place, *self.faults[place])
        return self.inner.gradient(x, worker, draw)

    def _happen(self, place, what, most):
        for number in range(most):
            mark = self.marks / f"{what}-{place[0]}-{place[1]}-{number}"
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                continue
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise ZeroDivisionError(f"division at {place}")
            time.sleep(1.0)

    def happened(self, what):
        return len(list(self.marks.glob(f"{what}-*")))
