"""Work for the processes of studies, good and bad; a task that is made in Python."""

import os
import signal
import time

from offbeat.workers.tasks import quadratic


def work(item):
    kind, value = item
    if kind == "raise":
        raise ValueError(f"cannot do {value}")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(60)
    return value**2


class Scored:
    """A quadratic with two scores of its own: one that rises to 1, one that falls to 0."""

    def __init__(self, better):
        self._task, self.better, self.spec = quadratic(3, workers=4), better, None
        self.workers, self.dim = 4, self._task.dim

    def initial(self, seed):
        return self._task.initial(seed)

    def gradient(self, x, worker, draw):
        return self._task.gradient(x, worker, draw)

    def evaluate(self, x):
        away = self._task.evaluate(x)["distance2"]
        return {"loss": away, "auc": 1 / (1 + away), "miss": away / (1 + away)}
