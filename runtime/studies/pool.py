"""Processes that run cells: one that fails, hangs or dies is an answer, not the end."""

import functools
import math
import multiprocessing
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, Protocol

from threadpoolctl import threadpool_limits

from offbeat.runtime.base.errors import ConfigError, nearest

Outcome = tuple[Any, str | None]  # the answer, or what went wrong
Function = Callable[[Any], Any]

CHUNK_S = 0.1  # seconds of work handed to a process at once
MOST_CHUNK = 64  # cells, whatever they take
AHEAD_BYTES = 2**15  # sent to a process that still works: what a pipe surely holds
LOOK_S = 0.5  # between two looks at the time limit
# Loaded once and shared by all processes, if this process has needed them.
PRELOADED = (
    "offbeat.runtime.studies.cell",
    "offbeat.runtime.commands.cli",
    "sklearn.datasets",
    "torch",
)


class CellRunner(Protocol):
    """Where cells run: answers (index, outcome) in any order."""

    def __call__(
        self, function: Function, work: Sequence[Any], jobs: int, limit_s: float
    ) -> Generator[tuple[int, Outcome], None, None]:
        """``function(work[index])`` for every index, ``jobs`` at a time, each in ``limit_s``."""
        ...


class Process:
    """One worker process and what it has been given, oldest first."""

    def __init__(self, context: Any, function: Function) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        # Without a main module to run again: a script need not guard itself, and is not waited for.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.given: deque[int] = deque()
        self.since_s = 0.0  # when the oldest was begun

    def give(self, chunk: Sequence[int], sent: bytes) -> None:
        """Hand out the cells ``chunk``, pickled as ``sent``."""
        if not self.given:
            self.since_s = time.monotonic()
        self.given.extend(chunk)
        self.pipe.send_bytes(sent)

    def end(self) -> int | None:
        """Kill it; answers its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def processes(
    function: Function, work: Sequence[Any], jobs: int, limit_s: float = math.inf
) -> Generator[tuple[int, Outcome], None, None]:
    """See ``CellRunner``; a process that dies or takes too long costs its cell, and is replaced."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOADED if name in sys.modules])
    todo = deque(range(len(work)))
    team = [Process(context, function) for _ in range(min(jobs, len(work)))]
    mean_s, began_s, done = CHUNK_S, time.monotonic(), 0
    try:
        while todo or any(one.given for one in team):
            for one in team:
                if todo and len(one.given) <= 1:
                    # The last ones one by one, so that all processes end together.
                    most = len(todo) // (4 * len(team))
                    size = max(1, min(MOST_CHUNK, int(CHUNK_S / mean_s), most))
                    chunk = [todo[at] for at in range(min(size, len(todo)))]
                    sent = pickle.dumps([(index, work[index]) for index in chunk])
                    if not one.given or len(sent) <= AHEAD_BYTES:
                        for _ in chunk:
                            todo.popleft()
                        one.give(chunk, sent)
            pipes = {one.pipe: at for at, one in enumerate(team)}
            for pipe in wait(pipes, LOOK_S):
                one = team[pipes[pipe]]
                try:
                    index, outcome = one.pipe.recv()
                except (EOFError, OSError):
                    code = one.end()
                    if one.given:
                        yield one.given.popleft(), (None, _died(code))
                    todo.extendleft(reversed(one.given))
                    team[pipes[pipe]] = Process(context, function)
                    continue
                one.given.remove(index)
                one.since_s = time.monotonic()
                done += 1
                mean_s = max(1e-6, (one.since_s - began_s) * len(team) / done)
                yield index, outcome
            for at, one in enumerate(team):
                if one.given and time.monotonic() - one.since_s > limit_s:
                    one.end()
                    yield one.given.popleft(), (None, f"took longer than {limit_s:g} s")
                    todo.extendleft(reversed(one.given))
                    team[at] = Process(context, function)
    finally:
        for one in team:
            one.end()


def _died(code: int | None) -> str:
    how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    return f"its process died ({how})"


def _serve(pipe: Connection, function: Function) -> None:
    """What a process does: cells from the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    one_thread()
    try:
        while True:
            for index, item in pickle.loads(pipe.recv_bytes()):
                pipe.send((index, attempt(function, item)))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone, or has no more to do


def attempt(function: Function, item: Any) -> Outcome:
    """``function(item)``, or what went wrong."""
    try:
        return function(item), None
    except Exception as error:  # whatever it is, it is this cell's
        return None, f"{type(error).__name__}: {error}"


def one_thread() -> None:
    """Keep this process to one core."""
    threadpool_limits(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def ray_tasks(
    function: Function, work: Sequence[Any], jobs: int, limit_s: float = math.inf, where: str = ""
) -> Generator[tuple[int, Outcome], None, None]:
    """See ``CellRunner``; ``where`` is the address of a cluster, else Ray is begun here."""
    from offbeat.runtime.on_ray.start import load, start

    ray = load()
    session = start(where or "local")
    task = ray.remote(num_cpus=1, max_retries=0)(_on_one_core)
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


def _on_one_core(function: Function, item: Any) -> Outcome:
    one_thread()
    return attempt(function, item)


def engine(text: str) -> CellRunner:
    """What runs cells: "processes", "ray", or "ray:ADDRESS" of a cluster.

    Raises:
        ConfigError: unknown.
    """
    name, _, where = text.partition(":")
    if name == "ray":
        return functools.partial(ray_tasks, where=where)
    if text != "processes":
        raise ConfigError(f'no engine of studies is called "{text}"{nearest(name, ENGINES)}')
    return processes


ENGINES = ("processes", "ray")
