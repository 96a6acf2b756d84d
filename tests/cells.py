"""Work for the processes of studies, good and bad."""

import os
import signal
import time


def work(item):
    kind, value = item
    if kind == "raise":
        raise ValueError(f"cannot do {value}")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(60)
    return value**2
