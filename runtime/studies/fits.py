"""Marks with fitted lines: what a table says along an axis of numbers."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from offbeat.runtime.experiment.metrics import METRICS
from offbeat.runtime.studies import table as tables

MOST_LINES = 12  # shown together at first
FIT = 3  # marks from which a line is fitted


def word(metric: str) -> str:
    """What an axis calls a metric."""
    return METRICS[metric].label if metric in METRICS else metric


def against(
    rows: dict[int, list[dict[str, Any]]],
    axes: Sequence[dict[str, Any]],
    settings: Sequence[dict[str, Any]],
    colour: int,
    metric: str | None,
) -> list[dict[str, Any]]:
    """Marks with fitted lines: rounds to the target against the gap, the floor against numbers.

    Args:
        rows: of the table, by setting.
        axes, settings, colour: see ``data``.
        metric: what the floor is of, if it is one that falls.
    """

    def gap(setting: int) -> float | None:
        gaps = [row["gap"] for row in rows[setting] if row.get("gap")]
        return float(np.median(gaps)) if gaps else None

    made = []
    keys = [axis["key"] for axis in axes]
    graphs = {at for at, key in enumerate(keys) if key.split(".")[0] == "topology"}
    graphs |= {at for at, key in enumerate(keys) if key == "fleet.workers"}
    if series := _series(rows, axes, settings, colour, graphs, gap, "steps_to_target"):
        made.append(
            {
                "id": "gap",
                "title": "Rounds to the target against the spectral gap",
                "x": "spectral gap",
                "y": "rounds to the target",
                "series": series,
            }
        )
    for at, axis in enumerate(axes):
        if metric is None or at == colour or len(axis["values"]) < 2:
            continue
        try:
            numbers = [float(value) for value in axis["values"]]
        except ValueError:
            continue
        x_of = partial(lambda at, numbers, s: numbers[settings[s]["at"][at]], at, numbers)
        if series := _series(rows, axes, settings, colour, {at}, x_of, "floor"):
            made.append(
                {
                    "id": f"floor-{at}",
                    "title": f"What is left against {axis['label']}",
                    "x": axis["label"],
                    "y": f"{word(metric)}, mean of the last fifth",
                    "series": series,
                }
            )
    return made


def _series(
    rows: dict[int, list[dict[str, Any]]],
    axes: Sequence[dict[str, Any]],
    settings: Sequence[dict[str, Any]],
    colour: int,
    along: set[int],
    x_of: Callable[[int], float | None],
    key: str,
) -> list[dict[str, Any]]:
    """Lines of settings that differ in nothing but the axes ``along``; none if none has a fit."""
    others = [at for at in range(len(axes)) if at not in along]
    free = [at for at in others if len(axes[at]["values"]) > 1]
    marks: dict[tuple[int, ...], list[tuple[Any, ...]]] = {}
    for at, setting in enumerate(settings):
        there = [row[key] for row in rows[at] if row.get(key) is not None]
        middle, along_x = tables.median([row.get(key) for row in rows[at]]), x_of(at)
        if middle and along_x:
            mine = marks.setdefault(tuple(setting["at"][i] for i in others), [])
            mine.append((along_x, middle, min(there), max(there), setting["name"]))
    series: list[dict[str, Any]] = []
    dashes: dict[tuple[int, ...], int] = {}
    for place, line in sorted(marks.items()):
        value = dict(zip(others, place, strict=True))
        name = " · ".join(filter(None, (axes[i]["short"][value[i]] for i in free)))
        rest = tuple(value[i] for i in free if i != colour)
        x, y, lo, hi, labels = map(list, zip(*line, strict=True))
        series.append(
            {
                "name": name or "run",
                "colour": value.get(colour, 0),
                "x": x,
                "y": y,
                "lo": lo,
                "hi": hi,
                "labels": labels,
                "fit": slope(x, y),
                "dash": dashes.setdefault(rest, len(dashes)),
            }
        )
    enough = any(len(set(drawn["x"])) >= FIT for drawn in series)
    return series if enough and len(series) <= MOST_LINES else []


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Least squares of log y on log x: slope, its standard error, and the ends of the line.

    >>> found = slope([0.1, 0.01, 0.001], [30.0, 300.0, 3000.0])
    >>> round(found["slope"], 6), round(found["error"], 6)
    (-1.0, 0.0)
    """
    if len(set(x)) < FIT:
        return None
    u, v = np.log(x), np.log(y)
    apart = u - u.mean()
    along = float(apart @ v / (apart @ apart))
    start = float(v.mean() - along * u.mean())
    left = v - start - along * u
    error = math.sqrt(max(0.0, float(left @ left)) / max(1, len(x) - 2) / float(apart @ apart))
    ends = [min(x), max(x)]
    line = [math.exp(start + along * math.log(end)) for end in ends]
    return {"slope": along, "error": error, "marks": len(x), "x": ends, "y": line}
