"""What if: a recorded trace predicts how long other methods, graphs or fleets would have taken.

The recorded seconds of each worker's jobs are run through again in their order, from a place drawn
for each prediction, under the virtual clock; further workers take after the recorded ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from offbeat.runtime import api, checkpoint
from offbeat.runtime.errors import ConfigError, Diverged
from offbeat.runtime.experiment import Experiment
from offbeat.runtime.folders import check_trace
from offbeat.runtime.randomness import rng
from offbeat.runtime.records import column, read_trace
from offbeat.runtime.studies import cell, report
from offbeat.runtime.studies.scenes import assigned
from offbeat.runtime.studies.table import median, reached
from offbeat.workers.speeds import Law, Recorded, recorded_times

LONGEST = 10.0  # recorded lengths that a prediction is given to reach the target
LOOKS = 200  # evaluations in a recorded length


@dataclass(frozen=True)
class Prediction:
    """How long a candidate takes to the target.

    Args:
        name: its method, and its topology.
        workers: in its fleet.
        seconds: of each prediction; infinity where the target was not reached.
    """

    name: str
    workers: int
    seconds: list[float]

    @property
    def middle(self) -> float:
        """The median."""
        found = median(self.seconds)
        return math.inf if found is None else found


def predict(
    folder: Path,
    algorithms: Sequence[str] = (),
    topologies: Sequence[str] = (),
    workers: Sequence[str] = (),
    loss: float | None = None,
    seeds: int = 3,
) -> tuple[float, float, list[Prediction]]:
    """The target, the recorded seconds to it, and predictions: of what was recorded, then others.

    Args:
        folder: a recorded run.
        algorithms, topologies: candidates by their text; all combinations are tried, and what is
            not named stays as it was recorded.
        workers: sizes of the fleet, as "16", "+2" or "-1".
        loss: the target; where None, the mean of the recorded run's last fifth.
        seeds: predictions of each candidate.

    Raises:
        ConfigError: nothing recorded, a target that was not reached, or a candidate that cannot be.
    """
    experiment = api.load_experiment(folder)
    if not (folder / "trace.jsonl").exists() or not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: has no trace; run with record.trace = true")
    if checkpoint.exist(folder / "checkpoint"):
        check_trace(folder, api.checkpointed(folder))
    rows = report.rows(folder / "metrics.jsonl")
    curve = {key: [row[key] for row in rows] for key in ("time_s", "loss", "step", "gradients")}
    if loss is None:
        loss = float(np.mean(curve["loss"][-max(1, len(rows) // 5) :]))
    recorded = reached(curve, "loss", loss).get("seconds_to_target")
    if recorded is None:
        least = min(curve["loss"], default=math.inf)
        raise ConfigError(f"{folder}: did not reach loss {loss:g}; its least is {least:.6g}")
    table = experiment.table()
    as_it_was = str(experiment.algorithm.spec)
    sizes = [experiment.fleet.workers, *(_size(text, experiment.fleet.workers) for text in workers)]
    graphs: list[str | None] = [*topologies] or [None]
    candidates: list[tuple[str, str | None, int]] = [(as_it_was, None, sizes[0])]
    candidates += product(algorithms or [as_it_was], graphs, sizes[1:] or sizes)
    times = recorded_times(folder, experiment.fleet.workers)
    latency_s = _latency(folder, experiment)
    found = []
    for method, topology, size in dict.fromkeys(candidates):
        changed = _changed(table, method, topology, size, loss, curve["time_s"][-1])
        seconds = []
        for seed in range(seeds):
            law = _law(times, size, seed)
            fleet = replace(
                experiment.fleet, workers=size, speeds=law, stragglers="", outages=[],
                latency_s=latency_s,
            )  # fmt: skip
            settings = {**changed, "fleet": fleet, "seed": (experiment.seed + 1 + seed) % 2**32}
            seconds.append(_seconds(cell.one(settings), loss))
        name = method if topology is None else f"{method}, {topology}"
        found.append(Prediction(name, size, seconds))
    return loss, recorded, found


def _size(text: str, recorded: int) -> int:
    try:
        size = int(text) + (recorded if text[:1] in ("+", "-") else 0)
    except ValueError:
        raise ConfigError(f'workers: cannot read "{text}"; write 16, +2 or -1') from None
    if size < 1:
        raise ConfigError(f"workers: {text} leaves none of the {recorded}")
    return size


def _changed(
    table: dict[str, Any],
    method: str,
    topology: str | None,
    size: int,
    loss: float,
    length_s: float,
) -> dict[str, Any]:
    """The settings of a candidate, without its fleet and seed."""
    made = {k: v for k, v in table.items() if k not in ("engine", "clock", "pace", "fleet")}
    made["algorithm"] = method
    made["task"] = {**table["task"], "workers": size}
    if topology is not None:
        made["topology"] = topology
    elif "topology" in table:
        made["topology"] = {k: v for k, v in table["topology"].items() if k != "n"}
    made["stop"] = {"seconds": LONGEST * length_s, "loss": loss}
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


def _latency(folder: Path, experiment: Experiment) -> float:
    """Seconds of a message: the fleet's under a virtual clock, measured under a real one."""
    trace = read_trace(folder / "trace.jsonl")
    if not experiment.real or experiment.topology is not None or not len(trace):
        return experiment.fleet.latency_s
    up = column(trace, "time_s") - column(trace, "end_s")
    down = column(trace, "start_s") - assigned(trace)
    return max(0.0, float(np.median(up) + np.median(down[down >= 0])) / 2)


def _seconds(experiment: Experiment, loss: float) -> float:
    """Virtual seconds until ``experiment`` has ``loss``."""
    try:
        result = api.execute(experiment)
    except Diverged:
        return math.inf
    curve = {key: result.column(key).tolist() for key in ("time_s", "loss", "step", "gradients")}
    return reached(curve, "loss", loss).get("seconds_to_target", math.inf)


def shown(loss: float, recorded: float, found: Sequence[Prediction]) -> Table:
    """The predictions beside what was recorded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "workers", f"seconds to loss {loss:.4g}", "least", "most", "of recorded"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    table.add_row("recorded", str(found[0].workers), f"{recorded:,.4g}", "", "", "100%")
    for one in found:
        name = f"{one.name} (as recorded)" if one is found[0] else one.name
        if one.middle == math.inf:
            table.add_row(name, str(one.workers), "not reached")
            continue
        ends = (f"{end:,.4g}" for end in (one.middle, min(one.seconds), max(one.seconds)))
        table.add_row(name, str(one.workers), *ends, f"{one.middle / recorded:.0%}")
    return table
