"""Cells as Ray tasks, on this machine or a cluster."""

import math
import time
from collections.abc import Generator, Sequence
from typing import Any

from offbeat.runtime.on_ray.start import load, start
from offbeat.runtime.studies.pool import LOOK_S, Function, Outcome, attempt, one_thread


def tasks(
    function: Function, work: Sequence[Any], jobs: int, limit_s: float = math.inf, where: str = ""
) -> Generator[tuple[int, Outcome], None, None]:
    """See ``Engine``; ``where`` is the address of a cluster, else Ray is begun here."""
    ray = load()
    session = start(where or "local")
    task = ray.remote(num_cpus=1, max_retries=0)(_run)
    running: dict[Any, tuple[int, float]] = {}  # reference -> index, when it was handed out
    todo = iter(range(len(work)))
    try:
        while True:
            while len(running) < jobs and (index := next(todo, None)) is not None:
                running[task.remote(function, work[index])] = index, time.monotonic()
            if not running:
                return
            ready, _ = ray.wait(list(running), timeout=LOOK_S)
            for reference in ready:
                index, _ = running.pop(reference)
                try:
                    yield index, ray.get(reference)
                except ray.exceptions.RayError as error:  # its process died
                    *_, last = str(error).strip().splitlines()
                    yield index, (None, f"{type(error).__name__}: {last}")
            for reference, (index, since_s) in list(running.items()):
                if time.monotonic() - since_s > limit_s:
                    ray.cancel(reference, force=True)
                    del running[reference]
                    yield index, (None, f"took longer than {limit_s:g} s")
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        session.stop()


def _run(function: Function, item: Any) -> Outcome:
    one_thread()
    return attempt(function, item)
