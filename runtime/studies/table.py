"""The tidy table of a study: one row a cell, settings first, then what came of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offbeat.runtime.base.errors import ConfigError, StorageError, nearest
from offbeat.runtime.base.registry import Spec
from offbeat.runtime.experiment import metrics

REACHED = {"steps": "step", "seconds": "time_s", "gradients": "gradients", "bytes": "bytes"}


def row(line: dict[str, Any], target: Any) -> dict[str, Any]:
    """What came of a cell; see ``study.run`` for ``line``.

    ``floor`` is the mean of the target's metric (else the loss) over the last fifth of the
    evaluations, None if that is not finite; ``..._to_target`` is None where the run did not get
    there.
    """
    metric = target.metric if target is not None else "loss"
    made: dict[str, Any] = {"cell": line["cell"], "error": line.get("error")}
    if made["error"]:
        return made
    curve, final, own = line["curve"], line["final"], line.get("better", {})
    if target is not None and metric not in curve:
        raise ConfigError(f'target: runs have no metric "{metric}"{nearest(metric, curve)}')
    if line["topology"] is not None:
        made |= {"n": line["topology"]["n"], "gap": line["topology"]["gap"]}
    if target is not None:
        found = metrics.reached(curve, metric, target.level, metrics.better(metric, own))
        made |= {f"{name}_to_target": found.get(of) for name, of in REACHED.items() if of in curve}
    made |= {key: final[key] for key in final_columns(own) if key in final}
    floor = metrics.tail(curve[metric]) if metric in curve else math.nan
    made["floor"] = floor if math.isfinite(floor) else None
    return made | {"reason": line["reason"], "wall_s": line["wall_s"]}


def final_columns(own: Iterable[str]) -> list[str]:
    """What a row has of the end of a run, where it is known; ``own``: metrics of its task."""
    return [*metrics.COSTS, *metrics.QUALITIES, *own, *metrics.LOADS]


def text(key: str, value: Any) -> Any:
    """The value of axis ``key`` as a cell of a table: numbers as they are, the rest in words."""
    if value == "":
        return f"no {key.rpartition('.')[2]}"
    if isinstance(value, dict):
        options = {k: v for k, v in value.items() if k != "name"}
        return str(Spec(str(value.get("name", "")), options))
    return str(value) if isinstance(value, list) else value


def short(values: Sequence[str]) -> list[str]:
    """Texts without their arguments, where the names alone tell them apart.

    >>> short(["dsgd(lr=0.1)", "beer(lr=0.1)"]), short(["dsgd(lr=0.1)", "dsgd(lr=0.2)"])
    (['dsgd', 'beer'], ['dsgd(lr=0.1)', 'dsgd(lr=0.2)'])
    """
    names = [value.partition("(")[0] for value in values]
    return names if len({*names}) == len({*values}) else list(values)


def shorts(key: str, values: Sequence[str]) -> list[str]:
    """Values of axis ``key`` as they stand in a legend: numbers say what they are."""
    last = "n" if key == "fleet.workers" else key.rsplit(".", 1)[-1]
    said = [f"{last} {v}" if v.replace(".", "").replace("e-", "").isdigit() else v for v in values]
    return short(said) if len(said) > 1 else said


def name(axes: Mapping[str, Any]) -> str:
    """What a setting is called."""
    words = [shorts(key, [str(value)])[0] for key, value in axes.items()]
    return " · ".join(filter(None, words)) or "run"


def rows(study: Any, cells: Sequence[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table: for each cell its axes, its seed, and ``row``."""
    made = []
    for cell, line in cells:
        axes = {key: text(key, value) for key, value in cell.axes.items()}
        tuned = {"tuned_at_edge": study.edge(cell.axes)} if study.tune else {}
        made.append(axes | {"seed": cell.seed} | tuned | row(line, study.target))
    return made


def columns(table: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Column by column, in the order they first occur; None where a row has none."""
    names = dict.fromkeys(name for one in table for name in one)
    return {name: [one.get(name) for one in table] for name in names}


def write(table: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the table to ``path``: .parquet or .csv."""
    import pyarrow
    from pyarrow import csv, parquet

    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: a table is written as .csv or .parquet")
    made = {}
    for name, values in columns(table).items():
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:  # as of an axis with numbers and texts
            values = [None if value is None else str(value) for value in values]
        made[name] = pyarrow.array(values, pyarrow.string() if not kinds else None)
    whole = pyarrow.table(made)
    try:
        if path.suffix == ".csv":
            csv.write_csv(whole, path)
        else:
            parquet.write_table(whole, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from None
    return path


def grouped(
    table: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by their values of ``names``: what differs by the seed is together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in table:
        groups.setdefault(tuple(one.get(name) for name in names), []).append(one)
    return groups


def median(values: Sequence[float | None]) -> float | None:
    """The median; None where less than half of the values are there."""
    found = np.median([math.inf if value is None else value for value in values])
    return float(found) if math.isfinite(found) else None
