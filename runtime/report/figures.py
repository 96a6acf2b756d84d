"""The figures of a report as files: a PNG and an SVG of each."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offbeat.runtime.api.plots import COLOURS, legend, styles
from offbeat.runtime.base.errors import StorageError
from offbeat.runtime.experiment.metrics import HIGHER

MARKS = "os^Dvx+*"
APART = 3  # places in it between lines of one colour
DPI = 90
LONGEST = 60  # settings named on one axis
LEGEND = 14  # entries
TWO_DECADES = 30.0  # from which ratio on powers of ten are ticks enough


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures of ``data`` (see ``report.data``) into ``folder``; answers the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawers: dict[str, Callable[[], Any]] = {
        "progress": lambda: _progress(plt, data),
        "targets": lambda: _targets(plt, data),
        **{one["id"]: partial(_against, plt, one) for one in data["against"]},
        "graphs": lambda: _graphs(plt, data),
        "timeline": lambda: _timeline(plt, data),
        "staleness": lambda: _staleness(plt, data),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawer in drawers.items():
            if (figure := drawer()) is not None:
                for kind in ("png", "svg"):
                    figure.savefig(folder / f"{name}.{kind}", dpi=DPI)
                    written.append(folder / f"{name}.{kind}")
                plt.close(figure)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    return written


def band(
    data: dict[str, Any], setting: int, x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """x, and median, least and greatest y over the seeds of a setting."""
    runs = [r["c"] for r in data["runs"] if r["s"] == setting and x in r["c"] and y in r["c"]]
    if not runs:
        return None
    first, last = max(run[x][0] for run in runs), min(run[x][-1] for run in runs)
    grid = np.array(runs[0][x]) if len(runs) == 1 else np.linspace(first, last, 120)
    values = np.array([np.interp(grid, run[x], np.array(run[y], float)) for run in runs])
    return grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)


def _shown(data: dict[str, Any], every: bool = False) -> list[tuple[int, str, dict[str, Any]]]:
    """(setting, name, line style) of what the page shows at first, or of ``every`` setting."""
    axes = [{**axis, "first": None} if every else axis for axis in data["axes"]]
    free = [at for at, a in enumerate(axes) if len(a["values"]) > 1 and a["first"] is None]
    places: dict[tuple[int, ...], int] = {}
    found, drawn = [], []
    for at, one in enumerate(data["settings"]):
        if any(a["first"] not in (None, v) for a, v in zip(axes, one["at"], strict=True)):
            continue
        colour = one["at"][data["colour"]] if axes else 0
        others = tuple(one["at"][i] for i in free if i != data["colour"])
        drawn.append((colour, places.setdefault(others, len(places))))
        name = " · ".join(filter(None, (axes[i]["short"][one["at"][i]] for i in free)))
        found.append((at, name or one["name"]))
    return [(*one, line) for one, line in zip(found, styles(drawn), strict=True)]


def _fixed(data: dict[str, Any]) -> str:
    """What the settings that are shown have in common, and how many they are."""
    chosen = [a for a in data["axes"] if a["first"] is not None]
    if not chosen:
        return ""
    shown = {setting for setting, _, _ in _shown(data)}
    runs = sum(run["s"] in shown for run in data["runs"])
    words = ", ".join(f"{a['label']} {a['values'][a['first']]}" for a in chosen)
    return f"{words} (of the best setting): {runs} of {len(data['runs'])} runs"


def _progress(plt: Any, data: dict[str, Any]) -> Any:
    if not data["runs"] or not data["y"]:
        return None
    wide = len(data["x"])
    figure, panels = plt.subplots(
        1, wide, figsize=(1 + 4 * wide, 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    metric, columns = data["y"][0], data["columns"]
    for axes, x in zip(panels[0], data["x"], strict=True):
        unit = columns.get(x, {}).get("unit", 1)
        for setting, name, line in _shown(data):
            if (found := band(data, setting, x, metric)) is not None:
                grid, middle, low, high = found
                axes.plot(grid / unit, middle, label=name, **line)
                if (low < high).any():
                    axes.fill_between(grid / unit, low, high, color=line["color"], alpha=0.15, lw=0)
        values = [v for r in data["runs"] for v in r["c"].get(metric, []) if v is not None]
        falls = columns.get(metric, {}).get("better") != HIGHER
        axes.set_yscale("log" if falls and min(values, default=0) > 0 else "linear")
        if data["target"] is not None:
            axes.axhline(data["target"]["level"], color="0.5", ls=":", lw=1)
        axes.set_xlabel(columns.get(x, {}).get("label", x))
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel(columns.get(metric, {}).get("label", metric))
    if len(_shown(data)) <= LEGEND:
        legend(figure, panels[0, 0])  # where all are: bytes are not counted of every run
    if fixed := _fixed(data):
        figure.suptitle(fixed, fontsize=9)
    return figure


def _targets(plt: Any, data: dict[str, Any]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator

    keys = [m for m in data["measures"] if any(m["key"] in run["t"] for run in data["runs"])]
    every = len(data["settings"]) <= LONGEST
    shown = _shown(data, every)
    if not keys or not 2 <= len(shown) <= LONGEST:
        return None
    wide = [measure for measure in keys if measure["key"] != "gradients_to_target"]
    figure, panels = plt.subplots(
        1,
        len(wide),
        figsize=(2.5 + 2.6 * len(wide), 1.1 + 0.19 * len(shown)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, measure in zip(panels[0], wide, strict=True):
        unit, middles = measure.get("unit", 1), []
        for place, (setting, _, line) in enumerate(shown):
            mine = [run for run in data["runs"] if run["s"] == setting]
            there = [run["t"][measure["key"]] / unit for run in mine if measure["key"] in run["t"]]
            if 2 * len(there) < len(mine) or not there:
                continue
            middle = float(np.median([*there, *[math.inf] * (len(mine) - len(there))]))
            middles.append(middle)
            axes.plot([min(there), max(there)], [place] * 2, color=line["color"], lw=1)
            axes.plot([middle], [place], "o", color=line["color"], ms=5)
        if middles and min(middles) > 0 and max(middles) > 5 * min(middles):
            axes.set_xscale("log", subs=())
            subs = (1, 2, 5) if max(middles) < TWO_DECADES * min(middles) else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel(measure["label"].replace(", ", ",\n"), fontsize=8)
        axes.grid(alpha=0.25)
    panels[0, 0].set_yticks(range(len(shown)), [name for _, name, _ in shown], fontsize=7)
    panels[0, 0].invert_yaxis()
    target = data["target"]
    said = ""
    if target is not None:
        metric = data["columns"].get(target["metric"], {}).get("label", target["metric"])
        said = f"to {metric} {target['level']:g}"
    if fixed := ", ".join(filter(None, [said, "" if every else _fixed(data)])):
        figure.suptitle(fixed, fontsize=9)
    return figure


def _against(plt: Any, one: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    drawn = styles([(series["colour"], series["dash"] + 1) for series in one["series"]])
    for series, line in zip(one["series"], drawn, strict=True):
        fit, name = series["fit"], series["name"]
        if fit is not None:
            name += f": slope {fit['slope']:.2f} ± {fit['error']:.2f}"
            axes.plot(fit["x"], fit["y"], **{**line, "linewidth": 1})
        mark = MARKS[(series["colour"] + APART * series["dash"]) % len(MARKS)]
        axes.plot(series["x"], series["y"], mark, color=line["color"], ms=5, label=name)
    axes.set(xscale="log", yscale="log", xlabel=one["x"], ylabel=one["y"])
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left")
    return figure


def _staleness(plt: Any, data: dict[str, Any]) -> Any:
    shown = {setting: (name, line) for setting, name, line in _shown(data)}
    found = [one for one in data["staleness"] if one["s"] in shown]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for one in found:
        name, line = shown[one["s"]]
        label = f"{name} (mean {one['mean']:.3g})"
        axes.stairs(one["y"][:-1], one["x"], label=label, **line)
    axes.set(yscale="log", xlabel="staleness, steps", ylabel="share of results")
    axes.grid(alpha=0.25)
    if len(found) <= LEGEND:
        legend(figure, axes)
    return figure


def _timeline(plt: Any, data: dict[str, Any]) -> Any:
    shown: Sequence[dict[str, Any]] = data["timelines"][:6]
    if not shown:
        return None
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(9, 0.6 + 2.2 * len(shown)), squeeze=False, layout="constrained"
    )
    heights = ((0.8, -0.4), (0.35, -0.175), (0.25, 0.15))  # of what, and from where
    colours = (COLOURS[0], COLOURS[4], COLOURS[3])
    for axes, one in zip(panels[:, 0], shown, strict=True):
        for kind, name in enumerate(("computes", "sends", "jobs are queued")):
            for odd in (0, 1):
                mine = [s for s in one["spans"] if s[0] == kind and s[4] == odd]
                height, start = heights[kind]
                for worker in {s[1] for s in mine}:
                    bars = [(s[2], s[3] - s[2]) for s in mine if s[1] == worker]
                    axes.broken_barh(
                        bars,
                        (worker + start, height),
                        facecolors=colours[kind],
                        lw=0,
                        alpha=0.55 if odd and not kind else 1.0,
                    )
            if axes is panels[0, 0]:
                axes.plot([], [], color=colours[kind], lw=5, label=name)
        axes.set(xlim=(0, one["until_s"]), ylim=(one["workers"] - 0.4, -0.6), ylabel="worker")
        axes.set_title(one["name"], fontsize=9, loc="left")
        axes.set_facecolor("#f0f0f0")
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[-1, 0].set_xlabel("seconds")
    if (every := data["timelines_of"]) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {every} runs", fontsize=9)
    panels[0, 0].legend(
        frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return figure


def _graphs(plt: Any, data: dict[str, Any]) -> Any:
    from matplotlib.collections import LineCollection

    shown = data["graphs"]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, one in zip(panels.flat, shown, strict=False):
        at = np.array(one["at"]) * [1, -1]
        frame = one["frames"][-1]
        edges = [edge for k in one["rounds"] for edge in k]
        lines = [at[edge] for edge in edges]
        axes.add_collection(LineCollection(lines, colors="0.6", linewidths=0.6))
        colour = {"c": np.log10(frame["loss"]), "cmap": "cividis"} if "loss" in frame else {}
        drawn = axes.scatter(
            *at.T,
            s=float(np.clip(1200 / one["n"], 6, 60)),
            zorder=3,
            **(colour or {"color": COLOURS[0]}),
        )
        if colour:
            figure.colorbar(drawn, ax=axes, shrink=0.5, label="log10 of the loss")
        axes.set_title(f"{one['name']}\ngap {one['gap']:.3g}", fontsize=8)
        axes.set_aspect("equal")
        axes.margins(0.08)
    return figure
