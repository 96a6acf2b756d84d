"""What if: a recorded trace predicts how long other methods, graphs or fleets would have taken.

The recorded seconds of each worker's jobs are run through again in their order, from a place drawn
for each prediction, under the virtual clock; further workers take after the recorded ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from offbeat.algorithms.gossip import Gossip
from offbeat.algorithms.server import Algorithm
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError, Diverged, nearest
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import MADE_BY_HAND
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.experiment.experiment import Experiment, make_fleet, make_part
from offbeat.runtime.report import recorded
from offbeat.runtime.report.scenes import assigned
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.folders import check_same, check_trace
from offbeat.runtime.run.records import column, read_trace
from offbeat.runtime.studies import cell, judge
from offbeat.runtime.studies.judge import Target
from offbeat.runtime.studies.table import median
from offbeat.topologies import Topology
from offbeat.workers.speeds import Law, Recorded, recorded_times
from offbeat.workers.tasks import Task

LONGEST = 10.0  # recorded lengths that a prediction is given to reach the target
LOOKS = 200  # evaluations in a recorded length


@dataclass(frozen=True)
class Prediction:
    """How long a candidate takes to the target.

    Args:
        name: its method, and its topology.
        workers: in its fleet.
        seconds: of each prediction; infinity where the target was not reached.
        recorded: whether it is what was recorded.
    """

    name: str
    workers: int
    seconds: list[float]
    recorded: bool = False

    @property
    def middle(self) -> float:
        """The median."""
        found = median(self.seconds)
        return math.inf if found is None else found


def predict(
    folder: Path,
    algorithms: Sequence[str | Algorithm | Gossip] = (),
    topologies: Sequence[str | Topology] = (),
    workers: Sequence[str] = (),
    target: Mapping[str, float] | None = None,
    seeds: int = 3,
    task: Task | str | None = None,
) -> tuple[Target, float, list[Prediction]]:
    """The target, the recorded seconds to it, and predictions: of what was recorded, then others.

    Args:
        folder: a recorded run.
        algorithms, topologies: candidates, as ``run`` takes them; all combinations are tried, and
            what is not named stays as it was recorded.
        workers: sizes of the fleet, as "16", "+2" or "-1".
        target: a metric and its level, ``{"accuracy": 0.9}``; where None, the mean loss of the
            recorded run's last fifth.
        seeds: predictions of each candidate.
        task: needed where the recorded one was made in Python.

    Raises:
        ConfigError: nothing recorded, a target that was not reached, or a candidate that cannot be.
    """
    table: Any = recorded.settings(folder)
    if not (folder / "trace.jsonl").exists() or not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: has no trace; run with record.trace = true")
    if checkpoint.exist(folder / "checkpoint"):
        _check(folder, table, task)
    rows = recorded.rows(folder / "metrics.jsonl")
    goal, better = _goal(folder, rows, target, task or table["task"])
    came_s = _came(folder, rows, goal, better)
    if task is not None:
        table["task"] = task
    elif table["task"]["name"].startswith(MADE_BY_HAND):
        raise ConfigError(
            f"{folder}: its task, {table['task']['name']}, was made in Python and can be computed "
            "there alone: offbeat.runtime.report.whatif.predict(folder, task=...)"
        )
    was = table["fleet"]["workers"]
    sizes = [_size(text, was) for text in workers] or [was]
    none: list[Any] = [None]
    candidates = [*product([*algorithms] or none, [*topologies] or none, sizes)]
    if not table["algorithm"]["name"].startswith(MADE_BY_HAND):
        candidates.insert(0, (None, None, was))
    elif not algorithms:
        raise ConfigError(f"{folder}: its method was made in Python; name others to be tried")
    times = recorded_times(folder, was)
    fleet = replace(
        make_fleet({k: v for k, v in table["fleet"].items() if k != "speeds"}),
        stragglers="",
        outages=[],
        latency_s=_latency(folder, table),
    )
    found = []
    for method, topology, size in dict.fromkeys(candidates):
        changed = _changed(table, method, topology, size, goal, rows[-1]["time_s"])
        seconds = []
        for seed in range(seeds):
            mine = replace(fleet, workers=size, speeds=_law(times, size, seed))
            settings = {**changed, "fleet": mine, "seed": (table["seed"] + 1 + seed) % 2**32}
            seconds.append(_seconds(cell.one(settings), goal))
        name = str(recorded.spec(table["algorithm"])) if method is None else _named(method)
        name = name if topology is None else f"{name}, {_named(topology)}"
        as_it_was = (method, topology, size) == (None, None, was)
        found.append(Prediction(name, size, seconds, as_it_was))
    return goal, came_s, found


def _check(folder: Path, table: Mapping[str, Any], task: Task | str | None) -> None:
    """Refuse records, and settings as far as a file holds them, that are not those of the run."""
    state = api.checkpointed(folder)
    check_trace(folder, state)
    made: dict[str, Any] = {} if task is None else {"task": task}
    if MADE_BY_HAND not in json.dumps({**table, **dict.fromkeys(made)}):
        apart = ("stop.", *(f"{key}." for key in made))
        check_same(folder, state, api.load_experiment(folder, **made), apart=apart)


def _came(folder: Path, rows: Sequence[dict[str, Any]], goal: Target, better: str) -> float:
    """The recorded seconds to the target."""
    curve = {key: [row.get(key) for row in rows] for key in ("time_s", goal.metric)}
    found = metrics.reached(curve, goal.metric, goal.level, better)
    if "time_s" in found:
        return found["time_s"]
    values = [value for value in curve[goal.metric] if value is not None]
    best = (max if better == metrics.HIGHER else min)(values)
    raise ConfigError(
        f"{folder}: did not reach {goal.metric} {goal.level:g}; its best is {best:.6g}"
    )


def _goal(
    folder: Path, rows: Sequence[dict[str, Any]], target: Mapping[str, float] | None, task: Any
) -> tuple[Target, str]:
    """The target, and which way it is better."""
    if target is None:
        losses = [row["loss"] for row in rows if "loss" in row]
        if not losses:
            raise ConfigError(f"{folder}: has no loss; name a target, as accuracy=0.9")
        target = {"loss": metrics.tail(losses)}
    goal = judge.target(target)
    own = task.get("better", {}) if isinstance(task, Mapping) else metrics.own(task)
    better = metrics.better(goal.metric, own)
    if not any(goal.metric in row for row in rows):
        meant = nearest(goal.metric, metrics.directed(rows[-1] if rows else (), own))
        raise ConfigError(f'{folder}: has no metric "{goal.metric}"{meant}')
    return goal, better


def _named(candidate: Any) -> str:
    if isinstance(candidate, str):
        return candidate
    return str(candidate.spec or type(candidate).__name__)


def _size(text: str, recorded: int) -> int:
    try:
        size = int(text) + (recorded if text[:1] in ("+", "-") else 0)
    except ValueError:
        raise ConfigError(f'workers: cannot read "{text}"; write 16, +2 or -1') from None
    if size < 1:
        raise ConfigError(f"workers: {text} leaves none of the {recorded}")
    return size


def _changed(
    table: dict[str, Any], method: Any, topology: Any, size: int, goal: Target, length_s: float
) -> dict[str, Any]:
    """The settings of a candidate, without its fleet and seed."""
    made = {k: v for k, v in table.items() if k not in ("engine", "clock", "pace", "fleet")}
    if method is not None:
        made["algorithm"] = method
    if isinstance(table["task"], Mapping):
        made["task"] = {**table["task"], "workers": size}
    if topology is not None:
        made["topology"] = topology
    elif "topology" in table:
        made["topology"] = {k: v for k, v in table["topology"].items() if k != "n"}
    made["stop"] = {"seconds": LONGEST * length_s, goal.metric: goal.level}
    made["evaluate"] = {"seconds": length_s / LOOKS}
    made["record"] = {"trace": False}
    return made


def _law(times: Sequence[Sequence[float]], size: int, seed: int) -> Law:
    """The recorded times, each worker's from a place of its own."""
    begun = []
    for worker in range(size):
        mine = times[worker % len(times)]
        start = int(rng(seed, "what if", worker).integers(len(mine)))
        begun.append([*mine[start:], *mine[:start]])
    return Law(1.0, lambda means, seed: Recorded(begun))


def _latency(folder: Path, table: dict[str, Any]) -> float:
    """Seconds of a message: the fleet's under a virtual clock, measured under a real one."""
    trace = read_trace(folder / "trace.jsonl")
    engine = make_part(ENGINES, table["engine"])
    real = table.get("clock", engine.clocks[0]) == "real"
    if not real or "topology" in table or not len(trace):
        return float(table["fleet"].get("latency_s", 0.0))
    up = column(trace, "time_s") - column(trace, "end_s")
    down = column(trace, "start_s") - assigned(trace)
    return max(0.0, float(np.median(up) + np.median(down[down >= 0])) / 2)


def _seconds(experiment: Experiment, goal: Target) -> float:
    """Virtual seconds until ``experiment`` is at its target."""
    try:
        return api.execute(experiment).time_to(goal.metric, goal.level)
    except Diverged:
        return math.inf


def shown(goal: Target, recorded_s: float, found: Sequence[Prediction]) -> Table:
    """The predictions beside what was recorded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "",
        "workers",
        f"seconds to {goal.metric} {goal.level:.4g}",
        "least",
        "most",
        "of recorded",
    ):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    table.add_row("recorded", "", f"{recorded_s:,.4g}", "", "", "100%")
    for one in found:
        name = f"{one.name} (as recorded)" if one.recorded else one.name
        if one.middle == math.inf:
            table.add_row(name, str(one.workers), "not reached")
            continue
        ends = (f"{end:,.4g}" for end in (one.middle, min(one.seconds), max(one.seconds)))
        table.add_row(name, str(one.workers), *ends, f"{one.middle / recorded_s:.0%}")
    return table
