"""From an experiment to the loop that runs it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.base.logs import tell
from offbeat.runtime.compute.backend import ComputeBackend
from offbeat.runtime.compute.farmed import FarmedWork
from offbeat.runtime.experiment.engines import Ray, Virtual, Zmq
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.pairs import Pairs
from offbeat.runtime.gossip.replayed import RecordedClock, RecordedTiming
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.loop import Loop
from offbeat.runtime.run.records import Records
from offbeat.runtime.server.loop import ServerLoop
from offbeat.runtime.server.remote import LiveWorkers, RemoteWorkers
from offbeat.runtime.server.virtual import VirtualWorkers
from offbeat.workers.compressed import Compressed
from offbeat.workers.tasks.contract import Guarded, guarded
from offbeat.workers.work import Work

Progress = Callable[[float], None]


def loop(
    experiment: Experiment,
    folder: Path | None,
    progress: Progress | None,
    trace: NDArray | None = None,
) -> Loop:
    """What runs ``experiment``; with its jobs timed as in ``trace``, if there is one."""
    e = experiment

    identity = e.identity() if folder is not None else {}

    def save(state: dict[str, Any]) -> None:
        assert folder is not None
        state["experiment"] = identity
        try:
            checkpoint.write(folder / "checkpoint", state["records"]["flushed"], state)
            tell("saved", f"saved a checkpoint of step {state['step']}", step=state["step"])
        except OSError as error:
            kept = checkpoint.exist(folder / "checkpoint")
            raise StorageError(
                f"{folder / 'checkpoint'}: cannot be written ({error.strerror}); "
                + ("the last checkpoint is intact" if kept else "nothing is saved yet")
                + ": make room or mend the rights, then resume the run"
            ) from None

    records = Records(e.fleet, folder, e.record.trace, e.record.nodes)
    around: dict[str, Any] = {
        "stop": e.stop,
        "evaluate": e.evaluate,
        "seed": e.seed,
        "save": None if folder is None else save,
        "save_every_s": e.record.save_every_s,
        "max_failed_saves": e.record.max_failed_saves,
        "progress": progress,
    }
    try:
        return _loop(e, folder, records, around, trace)
    except BaseException:
        records.close()
        raise


def _loop(
    e: Experiment,
    folder: Path | None,
    records: Records,
    around: dict[str, Any],
    trace: NDArray | None,
) -> Loop:
    """The loop of ``e`` on the engine it names, or in this process where it follows a trace."""
    if trace is None:
        _try_out(e)
    if isinstance(e.algorithm, Gossip):
        if trace is not None:
            return _gossip(e, records, around, None, trace)
        if (loop := _live_gossip(e, records, around)) is not None:
            return loop
        backend = _backend(e, folder)
        try:
            return _gossip(e, records, around, backend, None)
        except BaseException:
            if backend is not None:
                backend.close()
            raise
    x = e.task.initial(e.seed)
    algorithm = copy.deepcopy(e.algorithm)
    if trace is not None:
        workers = VirtualWorkers(e.task, e.fleet, RecordedTiming(trace), e.work, x)
        return ServerLoop(e.task, algorithm, workers, records, **around)
    sized = isinstance(e.work, Compressed)
    jobs = e.task, e.fleet, e.fleet.timing(e.seed, int(x.nbytes), sized), e.work, x
    if (backend := _backend(e, folder)) is None:
        return ServerLoop(e.task, algorithm, VirtualWorkers(*jobs), records, **around)
    try:
        workers = LiveWorkers(*jobs, backend, e.pace) if e.real else RemoteWorkers(*jobs, backend)
        return ServerLoop(e.task, algorithm, workers, records, **around)
    except BaseException:
        backend.close()
        raise


def _backend(e: Experiment, folder: Path | None) -> ComputeBackend | None:
    """Who computes the jobs of ``e``; None: this process."""
    backend: ComputeBackend | None = e.engine.backend(e, folder)
    if backend is None and isinstance(e.engine, Ray):
        from offbeat.runtime.on_ray.server import RayBackend

        return RayBackend(e, e.engine, folder)
    if backend is None and isinstance(e.engine, Zmq):
        from offbeat.runtime.on_zeromq.server import ZmqBackend

        return ZmqBackend(e, e.engine, folder)
    return backend


def _live_gossip(e: Experiment, records: Records, around: dict[str, Any]) -> Loop | None:
    """The loop of live nodes of ``e``; None: this process runs them, under the virtual clock."""
    loop: Loop | None = e.engine.gossip(e, records, **around)
    if loop is None and e.real and isinstance(e.engine, Ray):
        from offbeat.runtime.on_ray.gossip import RayGossip

        return RayGossip(e, e.engine, records, **around)
    if loop is None and e.real and isinstance(e.engine, Zmq):
        from offbeat.runtime.on_zeromq.gossip import ZmqGossip

        return ZmqGossip(e, e.engine, records, **around)
    return loop


def _try_out(e: Experiment) -> None:
    """Have a task of the user's own show that its jobs repeat, if it can be computed here."""
    if isinstance(task := guarded(e.task), Guarded):
        try:
            task.repeat(e.seed)
        except Exception as error:
            # Where others compute, they may have what this machine lacks.
            if isinstance(error, ConfigError) or isinstance(e.engine, Virtual):
                raise


def _gossip(
    e: Experiment,
    records: Records,
    around: dict[str, Any],
    backend: ComputeBackend | None,
    trace: NDArray | None,
) -> Loop:
    """The loop of a gossip method in this process, whose gradients a backend may compute."""
    assert isinstance(e.algorithm, Gossip)
    assert e.topology is not None
    parts = e.task, e.algorithm, e.topology, e.fleet
    timing = e.fleet.timing(e.seed, 0)
    if trace is not None:
        timing.clock = RecordedClock(trace)
    work: Work = e.work if backend is None else FarmedWork(e.work, backend)
    if e.asynchronous:
        return Pairs(*parts, timing, records, work=work, **around)
    return Rounds(*parts, timing, records, work=work, replicas=e.replicas, **around)
