"""Run, resume, replay: from a description to a result."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import tomli_w
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.algorithms.server import ALGORITHMS, Algorithm
from offbeat.runtime.api.launch import Progress, loop
from offbeat.runtime.base.errors import ConfigError, StorageError, nearest
from offbeat.runtime.base.logs import tell
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.engines import ENGINES, Engine
from offbeat.runtime.experiment.experiment import (
    Experiment,
    Record,
    make_fleet,
    make_part,
    make_settings,
    read,
    with_more,
)
from offbeat.runtime.experiment.settings import DEFAULT_STEPS, Evaluate, Stop
from offbeat.runtime.gossip.replayed import Replayed, of_peers, peers, read_inputs
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.folders import begun, check_same, check_trace, check_whole
from offbeat.runtime.run.loop import Loop, uninterrupted
from offbeat.runtime.run.records import TRACE_COLUMNS, Records, read_timers, read_trace
from offbeat.runtime.server.loop import ServerLoop
from offbeat.topologies import TOPOLOGIES, Topology, from_matrix, from_networkx, saved
from offbeat.topologies.saved import SAVED
from offbeat.workers.fleet import Fleet
from offbeat.workers.tasks import TASKS, Task
from offbeat.workers.work import WORK, Work

GRAPH = "graph.json"  # of a graph made in Python
DRAWN = {"picture.png", "report.html", "report-figures"}
# What a run folder holds.
WRITTEN = {
    *("experiment.toml", "metrics.jsonl", "trace.jsonl", "checkpoint", "summary.json"),
    *("server.json", "server.lock", "shapes.json", GRAPH),
    *DRAWN,
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What a run left.

    Args:
        experiment: what was run.
        reason: why it ended: "steps", "seconds", "gradients", "target loss" (or another metric),
            "wall time", "interrupted", or "idle" (nothing was left to arrive).
        x: the final model ``[d]``.
        metrics: one row an evaluation: time_s, step, gradients, loss, grad_norm, ...,
            staleness_mean, staleness_max, busy, outstanding.
        final: the same, at the end.
        histogram: staleness tau -> number of arrivals.
        facts: concurrency (most jobs outstanding at a time, tau_C), lost, reassigned, cancelled.
        outstanding: the step that each job still outstanding was given.
        events: outages.
        notes: sentences about the run, such as a damaged checkpoint that was skipped.
    """

    experiment: Experiment
    reason: str
    x: NDArray
    metrics: list[dict[str, float]]
    final: dict[str, float]
    histogram: NDArray
    facts: dict[str, int]
    outstanding: list[int]
    events: list[dict[str, Any]]
    notes: list[str]
    folder: Path | None
    _trace: NDArray | None

    @property
    def name(self) -> str:
        """The method's name."""
        spec = self.experiment.algorithm.spec
        return spec.name if spec is not None else type(self.experiment.algorithm).__name__

    @cached_property
    def trace(self) -> NDArray:
        """``[arrivals, 7]``: time_s, worker, job, read_step, step, start_s, end_s."""
        if self._trace is not None:
            return self._trace
        if self.folder is None or not self.experiment.record.trace:
            return np.empty((0, len(TRACE_COLUMNS)))
        return read_trace(self.folder / "trace.jsonl")

    def column(self, name: str) -> NDArray:
        """One column of the metrics, the final evaluation included; nan where it was not known."""
        rows = self.metrics
        if not rows or rows[-1]["gradients"] != self.final["gradients"]:
            rows = [*rows, self.final]
        return np.array([row.get(name, np.nan) for row in rows])

    def time_to(self, metric: str, level: float) -> float:
        """Seconds of the run until ``metric`` was at ``level`` or better; infinity: it never was.

        Between two evaluations as in a study's table; see ``metrics.reached``.

        Raises:
            ConfigError: the run has no such metric, or nobody says which way it is better.

        >>> result = run("logistic:digits", "shuffled(lr=0.5)", stop={"steps": 300})
        >>> 0 < result.time_to("accuracy", 0.5) < result.time_to("accuracy", 0.8) < 30
        True
        >>> result.time_to("accuracy", 1.1)
        inf
        """
        own = metrics.own(self.experiment.task)
        if metric not in self.final:
            known = nearest(metric, metrics.directed(self.final, own))
            raise ConfigError(f'the run has no metric "{metric}"{known}')
        curve = {key: self.column(key).tolist() for key in ("time_s", metric)}
        found = metrics.reached(curve, metric, level, metrics.better(metric, own))
        return found.get("time_s", math.inf)

    def plot(self, path: str | Path, *others: "Result") -> Path:
        """Write the picture: loss against virtual time and steps, and the workers' timelines.

        Args:
            path: whose ending says the format.
            others: results to compare this one with.
        """
        from offbeat.runtime.api.plots import picture

        return picture([self, *others], path)

    def __str__(self) -> str:
        numbers = {k: v for k, v in self.final.items() if not isinstance(v, list)}
        shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        return f"{self.name}: {shown} ({self.reason})"

    def __repr__(self) -> str:
        return f"<Result {self}>"


def run(
    task: Task | str | Mapping[str, Any],
    algorithm: Algorithm | Gossip | str | Mapping[str, Any],
    fleet: Fleet | str | Mapping[str, Any] | None = None,
    topology: Topology | nx.Graph | NDArray | str | Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    replicas: str = "links",
    work: Work | str | Mapping[str, Any] = "gradient",
    stop: Stop | Mapping[str, Any] | None = None,
    evaluate: Evaluate | Mapping[str, Any] | None = None,
    record: Record | Mapping[str, Any] | None = None,
    seed: int = 0,
    engine: Engine | str | Mapping[str, Any] = "virtual",
    clock: str | None = None,
    pace: float = 1.0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run one method on one task with one fleet.

    Args:
        task: a task, its text ("logistic:digits") or its table.
        algorithm: a method, its text ("shuffled(lr=0.5)") or its table; it is not changed.
        fleet: a fleet, its text ("16 lognormal(1.0)") or its table; one worker a share of the
            task, all equally fast, if absent.
        topology: of a gossip method, its text ("ring"), its table, a networkx graph, or
            W ``[n, n]``.
        mode, replicas: of gossip; see ``Experiment``.
        work: what a worker does with a job: "gradient", or
            "local-steps(adamw(lr=1e-3), steps=50)".
        stop: when to end; 5000 steps (rounds of gossip) if absent.
        evaluate: how often to evaluate; about a hundred times if absent.
        record: what to keep.
        seed: of everything that is drawn.
        engine: where gradients are computed; its text or table.
        clock, pace: see ``Experiment``.
        folder: a new folder for records and checkpoints; without one, all stays in memory.
        progress: called with the fraction done.

    Raises:
        ConfigError: before anything runs; Diverged; StorageError.

    >>> import offbeat
    >>> result = offbeat.run("quadratic(5)", "shuffled", "10 1..10", stop={"steps": 200})
    >>> result.reason, int(result.final["staleness_max"]) > 10
    ('steps', True)
    >>> offbeat.run("quadratic(5)", "shufled")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: no algorithm is called "shufled"; did you mean "shuffled"?
    """
    if fleet is None:
        workers = 10 if isinstance(task, str | Mapping) else task.workers
        made_fleet = Fleet(workers=workers)
    else:
        made_fleet = make_fleet(fleet)
    made_topology = None
    if topology is not None:
        made_topology = make_part(TOPOLOGIES, _graph(topology), n=made_fleet.workers, seed=seed)
        if fleet is None and isinstance(task, str | Mapping):
            made_fleet = Fleet(workers=made_topology.n)
    made_stop = make_settings(Stop, stop or {"steps": DEFAULT_STEPS})
    experiment = Experiment(
        task=make_part(TASKS, task, workers=made_fleet.workers, seed=seed),
        algorithm=make_part(ALGORITHMS, algorithm),
        fleet=made_fleet,
        topology=made_topology,
        mode=mode,
        replicas=replicas,
        work=make_part(WORK, work, seed=seed),
        stop=made_stop,
        evaluate=make_settings(Evaluate, evaluate)
        if evaluate is not None
        else Evaluate.sensible(made_stop),
        record=make_settings(Record, record or {}),
        seed=seed,
        engine=make_part(ENGINES, engine),
        clock=clock,
        pace=pace,
    )
    return execute(experiment, None if folder is None else Path(folder), progress=progress)


def _graph(given: Any) -> Any:
    """A topology of a networkx graph or W ``[n, n]``; whatever else as it is."""
    if isinstance(given, nx.Graph):
        return from_networkx(given)
    return from_matrix(given) if isinstance(given, np.ndarray) else given


def execute(
    experiment: Experiment, folder: Path | None = None, *, progress: Progress | None = None
) -> Result:
    """Run ``experiment`` from its beginning, recorded in ``folder`` if one is given."""
    if folder is not None:
        prepare(experiment, folder)
    return _finish(loop(experiment, folder, progress), experiment, folder)


def prepare(experiment: Experiment, folder: Path) -> None:
    """Make a run folder that ``resume`` will begin."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.suffix != checkpoint.PARTIAL for path in folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty; give a new folder, or resume the run")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    _record(experiment, folder)


def _record(experiment: Experiment, folder: Path) -> None:
    """Write experiment.toml, and beside it a graph that no text makes."""
    table, made = experiment.table(), experiment.topology
    if made is not None and saved.own(made):
        table["topology"] = {"name": SAVED, "path": GRAPH}
        _write(folder / GRAPH, saved.text(made))
    _write(folder / "experiment.toml", tomli_w.dumps(table))


def resume(
    folder: str | Path,
    *,
    task: Task | None = None,
    algorithm: Algorithm | Gossip | None = None,
    topology: Topology | nx.Graph | NDArray | None = None,
    work: Work | None = None,
    fleet: Fleet | None = None,
    engine: Engine | str | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | None = None,
    changed: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Go on with a run from its folder's newest good checkpoint; a finished run is only loaded.

    It ends with the bits of a run that was never interrupted.

    Args:
        folder: of the run.
        task, algorithm, topology, work, fleet: needed where the run was made with objects that no
            file can hold; a fixed graph is in the folder.
        engine: where gradients are computed from now on; the clock stays what it was.
        overrides: new ends, such as ``["stop.steps=20000"]``.
        changed: go on although settings, or files that they name, are not those of the run.
        progress: called with the fraction done.

    Raises:
        ConfigError: it is another experiment than it was; StorageError: records or checkpoints
            were changed, or are not there.
    """
    folder = Path(folder)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides or [])
    experiment = load_experiment(
        folder,
        task=task,
        algorithm=algorithm,
        topology=topology,
        work=work,
        fleet=fleet,
        changed=changed,
    )
    experiment = with_more(experiment, overrides)
    if engine is not None:
        clock = "real" if experiment.real else "virtual"
        experiment = replace(experiment, engine=make_part(ENGINES, engine), clock=clock)
    state, notes = None, list[str]()
    if checkpoint.exist(folder / "checkpoint"):
        state, notes = checkpoint.read(folder / "checkpoint")
        check_same(folder, state, experiment, changed=changed)
        if overrides and experiment.stop.steps and experiment.stop.steps < state["step"]:
            raise ConfigError(
                f"{folder}: stop.steps={experiment.stop.steps} is behind the run, which has "
                f"reached step {state['step']}"
            )
    elif there := begun(folder):  # else it was stopped before the first
        raise StorageError(
            f"{folder}: has no checkpoint to go on from, but {' and '.join(p.name for p in there)} "
            "of a run; bring its folder checkpoint back, or remove these to begin again"
        )
    if overrides or engine is not None or changed:
        _record(experiment, folder)
    return _finish(loop(experiment, folder, progress), experiment, folder, state, notes)


def replay(
    folder: str | Path,
    *,
    task: Task | None = None,
    algorithm: Algorithm | Gossip | None = None,
    topology: Topology | nx.Graph | NDArray | None = None,
    work: Work | None = None,
    fleet: Fleet | None = None,
) -> Result:
    """Run a recorded run again, in memory, with its arrivals as its trace has them.

    The result's model equals the recorded one bit for bit; ``offbeat replay`` compares them.  Peers
    that were started one by one are replayed together: ``folder`` is then that of all theirs.
    """
    folder = Path(folder)
    made: dict[str, Any] = {
        "task": task,
        "algorithm": algorithm,
        "topology": topology,
        "work": work,
        "fleet": fleet,
    }
    if parts := peers(folder):
        experiment = load_experiment(parts[0], **made)
        return _replay(experiment, of_peers(parts, experiment.fleet.workers)[0])
    experiment = load_experiment(folder, **made)
    if not checkpoint.exist(folder / "checkpoint"):
        raise ConfigError(f"{folder}: has not begun; there is nothing to replay")
    if not (folder / "trace.jsonl").exists():
        raise ConfigError(f"{folder}: has no trace.jsonl; run with record.trace = true")
    state = checkpointed(folder)
    check_same(folder, state, experiment)
    check_trace(folder, state)
    if experiment.real and isinstance(experiment.algorithm, Gossip):
        length = state["records"]["lengths"]["trace.jsonl"]
        return _replay(experiment, read_inputs(folder / "trace.jsonl", length))
    trace = read_trace(folder / "trace.jsonl")[: state["records"]["flushed"]]
    engine = loop(experiment, None, None, trace)
    if isinstance(engine, ServerLoop):
        rung = read_timers(folder / "trace.jsonl") if experiment.real else None
        engine.workers.follow(state["records"]["events"], rung)
    engine.stop = Stop(gradients=max(1, state["gradients"]))
    engine.run()
    if engine.step < state["step"]:  # steps that a timer made after the last arrival
        engine.stop = Stop(steps=state["step"])
    return _finish(engine, experiment, None)


def _replay(experiment: Experiment, inputs: dict[int, Any]) -> Result:
    """What gossip nodes were given, given to them again."""
    records = Records(experiment.fleet, None)
    e = experiment
    return _finish(Replayed(e, inputs, records, stop=e.stop, evaluate=e.evaluate), e, None)


def recorded(folder: Path) -> NDArray:
    """The model that a run in ``folder`` reached; see ``replay``."""
    if parts := peers(folder):
        n = load_experiment(parts[0]).fleet.workers
        models: NDArray = of_peers(parts, n)[1].mean(axis=0)
        return models
    model: NDArray = checkpointed(folder)["x"]
    return model


def checkpointed(folder: Path) -> dict[str, Any]:
    """The state in a run folder's newest good checkpoint; ``x [d]`` is the model."""
    return checkpoint.read(folder / "checkpoint")[0]


def load_experiment(folder: Path, *, changed: bool = False, **made: Any) -> Experiment:
    """The experiment of a run folder.

    Args:
        folder: of the run.
        changed: the files that it names may hold other things than they did.
        made: parts that no file can hold; see ``resume``.

    Raises:
        ConfigError: there is none, it was cut, or it cannot be.
    """
    path = folder / "experiment.toml"
    if not path.exists():
        raise ConfigError(f"{folder}: is no run folder (it has no experiment.toml)")
    check_whole(path)
    made |= {"topology": _graph(made.get("topology")), "files": {} if changed else None}
    return read(path, {key: value for key, value in made.items() if value is not None})[0]


def _write(path: Path, text: str) -> None:
    try:
        checkpoint.write_whole(path, text.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def _finish(
    engine: Loop,
    experiment: Experiment,
    folder: Path | None,
    state: dict[str, Any] | None = None,
    notes: list[str] | None = None,
) -> Result:
    """Run the engine to its end, from ``state`` if there is one, and gather the result."""
    records = engine.records
    try:
        if state is not None:
            engine.restore(state)
            text = f"goes on from the checkpoint of step {engine.step}"
            if (lost := records.lost) and experiment.real:
                text += f"; the {lost:,} or more results that came after it are lost"
            elif lost:
                text += f"; the {lost:,} or more results that came after it are computed again"
            tell("resumed", text, step=engine.step, skipped=notes or [], lost=lost)
        elif folder is not None:
            records.begin()
        reason, final = engine.run()
        tell("ended", f"the run has ended ({reason})", reason=reason)
    finally:
        with uninterrupted():
            records.close()
            engine.close()
    facts = engine.facts()
    result = Result(
        experiment=experiment,
        reason=reason,
        x=engine.x,
        metrics=records.metrics,
        final=final,
        histogram=records.histogram,
        facts=facts,
        outstanding=engine.outstanding(),
        events=records.events,
        notes=notes or [],
        folder=folder,
        _trace=records.trace() if folder is None else None,
    )
    if folder is not None:
        summary = {"reason": reason, **final, **facts, "histogram": records.histogram.tolist()}
        _write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return result
