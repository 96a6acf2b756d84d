"""Training loops of the user's own on Ray actors: a thread of the actor runs each.

A loop on Ray does not come by itself, as one does over a network: the run names the function, and
its actors call it, which are placed, watched and replaced like all others.  In it
``offbeat.join("ray", model, optimizer)`` is the run, as elsewhere.
"""

import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base import shapes
from offbeat.runtime.base.errors import ComputeError, ConfigError, StorageError
from offbeat.runtime.base.tensors import finite
from offbeat.runtime.compute.backend import JobRequest, JobResult, Runner
from offbeat.runtime.compute.flat import Flat, fit
from offbeat.runtime.compute.source import HERE, ActorSource, called
from offbeat.runtime.on_ray.start import last_line
from offbeat.runtime.run.checkpoint import write_whole
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import OwnLoop, Work

if TYPE_CHECKING:
    from offbeat.runtime.experiment.engines import Ray
    from offbeat.runtime.experiment.experiment import Experiment

END_S = 10.0  # for loops to end by themselves, once their run is over
JOIN_S = 600.0  # for a loop to come as far as offbeat.join, with its data and model
ADDRESS = "ray"
Came = Callable[[int, JobResult | Exception], None]


class Loops:
    """The loops of an actor, one a worker, begun with its first job.

    Args:
        work: whose loop.
        came: called with a worker and what came of its job: an answer, or why there is none.
    """

    def __init__(self, work: OwnLoop, came: Came) -> None:
        self._loop, self._came = called(work.loop), came
        self._desks: dict[int, ActorSource] = {}
        self._threads: dict[int, threading.Thread] = {}

    def give(self, order: JobRequest) -> None:
        """A job for its worker's loop."""
        worker = order.worker
        if worker not in self._desks:
            self._desks[worker] = ActorSource(lambda answer: self._came(worker, answer))
            run = threading.Thread(target=self._run, args=(worker,), name="loop", daemon=True)
            self._threads[worker] = run
            self._desks[worker].put(order)
            run.start()
        else:
            self._desks[worker].put(order)

    def _run(self, worker: int) -> None:
        desk = self._desks[worker]
        try:
            HERE.set(desk)
            self._loop(ADDRESS)
            said = "the loop ended before its run did"
        except BaseException:  # of the user's code: whoever waits for the answer is told
            said = traceback.format_exc()
        if not desk.over:
            del self._desks[worker]  # the next job begins it again
            self._came(worker, ComputeError(said))

    def end(self) -> None:
        """The run is over: let the loops know, and end."""
        for desk in self._desks.values():
            desk.end()
        end_s = time.monotonic() + END_S
        for thread in self._threads.values():
            thread.join(max(0.0, end_s - time.monotonic()))


class LoopRunner(Runner):
    """Has loops compute orders, one at a time.

    Args:
        task, work: see ``Runner``.
    """

    def __init__(self, task: Task, work: OwnLoop) -> None:
        super().__init__(task, work)
        self._answers: queue.SimpleQueue[JobResult | Exception] = queue.SimpleQueue()
        self.loops = Loops(work, lambda worker, came: self._answers.put(came))

    def compute(self, orders: Sequence[JobRequest]) -> list[JobResult]:
        return [self._one(order) for order in orders]

    def _one(self, order: JobRequest) -> JobResult:
        self.loops.give(order)
        came = self._answers.get()
        if isinstance(came, Exception):
            raise came
        assert not isinstance(came.payload, bytes)
        sound = finite(came.payload) and math.isfinite(came.loss or 0.0)
        return came if sound else came._replace(loss=np.nan)


def runner(task: Task, work: Work) -> Runner:
    """What computes orders in an actor."""
    return LoopRunner(task, work) if isinstance(work, OwnLoop) else Runner(task, work)


# -- For the driver --------------------------------------------------------------------------------


class Seen(BaseException):
    """The loop's model was: its function is left at once."""


class Scout(ActorSource):
    """A desk at which nobody works."""

    def seat(self, flat: Flat) -> ActorSource:
        """Look at the parameters."""
        self.seen = shapes.write(flat.shapes), flat.values()
        raise Seen


def scouted(work: OwnLoop) -> tuple[str, NDArray]:
    """Names and shapes of a loop's model, and the model ``[d]``: it is run until it joins."""
    scout = Scout(lambda answer: None)

    def look() -> None:
        HERE.set(scout)
        called(work.loop)(ADDRESS)

    try:
        copy_context().run(look)
    except Seen:
        return scout.seen
    raise ConfigError(f'own-loop: the loop ended without offbeat.join("{ADDRESS}", ...)')


def farewell(ray: Any, actors: Sequence[Any], group: str) -> None:
    """Let the loops of ``actors`` end by themselves, if they do soon."""
    told = [actor.end.options(concurrency_group=group).remote() for actor in actors]
    if told:
        ray.wait(told, num_returns=len(told), timeout=END_S)


def meet(ray: Any, experiment: "Experiment", options: "Ray", folder: Path | None = None) -> None:
    """Have the run begin at the loops' model, which one of them is asked for on a machine of Ray.

    Args:
        ray: the module.
        experiment: of loops, or not.
        options: of its actors.
        folder: of the run.

    Raises:
        ConfigError: it does not say which loop; the loop fails, or does not join; its model is not
            the experiment's.
        ComputeError: its process dies.
    """
    work = experiment.work
    if not isinstance(work, OwnLoop):
        return
    if not work.loop:
        raise ConfigError(
            'engine = "ray": its actors run the loop: name it, as work = '
            "\"own-loop(loop='module:function')\""
        )
    needs = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    asked = ray.remote(scouted).options(**needs, resources=options.resources).remote(work)
    try:
        text, x = ray.get(asked, timeout=JOIN_S)
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(
            f"own-loop: the loop did not join within {JOIN_S:g} s; does it wait for something, or "
            "is the cluster full?"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise ConfigError(
            f"own-loop: the loop fails before it joins: {last_line(error)}\n{error}"
        ) from None
    except ray.exceptions.RayError as error:
        raise ComputeError(f"own-loop: the loop's process dies: {last_line(error)}") from None
    fit(experiment, shapes.read(text), x)
    if folder is not None:
        try:
            write_whole(folder / shapes.FILE, text.encode())
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
