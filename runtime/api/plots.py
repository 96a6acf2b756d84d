"""Pictures: of a run or a comparison (loss, and who worked when), and of a topology."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.base.registry import Spec, told_apart
from offbeat.runtime.run.records import column

if TYPE_CHECKING:
    from offbeat.runtime.experiment.experiment import Experiment
    from offbeat.topologies import Topology

# A palette that readers with any colour vision can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.6)),
    (0, (1, 1.6)),
    (0, (6, 1.6, 1, 1.6)),
    (0, (9, 3)),
    (0, (2, 1, 2, 3)),
    (0, (4, 1.2, 1, 1.2, 1, 1.2)),
    (0, (7, 1.4, 3, 1.4)),
)
WIDTHS = (1.6, 3.0, 0.8)  # of lines, once the dashes are used up
# What loss is drawn against: a column, what it is called, and its unit.
AXES = (("time_s", "virtual seconds", 1), ("step", "server steps", 1))
GOSSIP_AXES = (
    ("step", "rounds", 1),
    ("bytes", "megabytes sent", 1e6),
    ("time_s", "virtual seconds", 1),
)
TIMELINES = 6  # more are not drawn
WORKERS_DRAWN = 24
BARS = 4000  # drawn at most in one timeline
UNLIKE = 5.0  # ratio of run lengths from which their axis is logarithmic
NODES_DRAWN = 200  # of a topology; beyond, its degrees and eigenvalues
INSIDE = 4  # entries of a legend that fits in beside the curves
SPECTRUM_DRAWN = 2000  # nodes
ROUNDS_DRAWN = 32
STRIP = 8  # rounds a row
ARROWS = 600  # drawn one by one, which is slow; more edges are lines


def picture(results: Sequence[Any], path: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draw some ``Result``s together and write ``path`` (its ending says the format)."""
    path = Path(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(labels or called([result.experiment for result in results]))
    shown = [r for r in results if len(r.trace)]
    shown = shown[:TIMELINES] if len(shown) <= TIMELINES else []
    rows = (len(shown) + 1) // 2
    gossip = all(result.experiment.topology is not None for result in results)
    across = GOSSIP_AXES if gossip else AXES
    lines = _lines(results)
    width = 15 if gossip else 11
    figure = plt.figure(figsize=(width, 3.6 + 2.1 * rows), layout="constrained")
    parts: Any = [figure] if not rows else figure.subfigures(2, 1, height_ratios=[1.7, rows])
    above = parts[0].add_gridspec(1, len(across))
    for at, (key, label, unit) in enumerate(across):
        axes = parts[0].add_subplot(above[0, at])
        for result, name, line in zip(results, names, lines, strict=True):
            axes.plot(result.column(key) / unit, result.column("loss"), label=name, **line)
        losses = np.concatenate([result.column("loss") for result in results])
        least = losses[np.isfinite(losses)].min(initial=np.inf)
        axes.set_yscale("log" if least > 0 else "linear")
        ends = [result.column(key)[-1] / unit for result in results]
        if max(ends) > UNLIKE * min(ends) > 0:  # else the shortest run is a stub at the edge
            axes.set_xscale("log", nonpositive="mask")  # not from the start, which is at 0
        axes.set(xlabel=_seconds(label, results), ylabel="loss" if at == 0 else "")
        axes.grid(alpha=0.25)
    legend(parts[0], axes)
    window = _window([result.trace for result in shown]) if shown else 0.0
    for at, result in enumerate(shown):
        axes = parts[1].add_subplot(rows, 2, at + 1)
        _timeline(axes, result, window, lines[list(results).index(result)]["color"])
        axes.set_title(f"{names[list(results).index(result)]}: who computed when", fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
    return path


def called(experiments: Sequence["Experiment"]) -> list[str]:
    """What each run is called: its method, and what else differs."""
    columns = [told_apart([_spec(e.algorithm) for e in experiments])]
    if all(e.topology is not None for e in experiments):
        columns.append(told_apart([_spec(e.topology) for e in experiments]))
    columns.append(["asynchronous" if e.asynchronous else "synchronous" for e in experiments])
    telling = columns[:1] + [column for column in columns[1:] if len(set(column)) > 1]
    labels: list[str] = []
    for words in zip(*telling, strict=True):
        label = " ".join(words)
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def _spec(part: Any) -> Spec:
    made: Spec | None = getattr(part, "spec", None)
    return made or Spec(type(part).__name__, {})


def legend(figure: Any, axes: Any) -> None:
    """Name the lines of ``axes`` within it, or, where they are many, beside all of ``figure``."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= INSIDE:
        axes.legend(frameon=False)
    else:
        whole = axes.get_figure(root=True)
        whole.set_figwidth(whole.get_figwidth() + 0.4 + 0.065 * max(map(len, names)))
        figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right upper")


def _lines(results: Sequence[Any]) -> list[dict[str, Any]]:
    """A colour for each method, a dash for each topology and mode."""
    methods = [str(result.experiment.algorithm.spec or id(result)) for result in results]
    places = [
        f"{r.experiment.topology and r.experiment.topology.spec} {r.experiment.mode}"
        for r in results
    ]
    colours, dashes = list(dict.fromkeys(methods)), list(dict.fromkeys(places))
    return styles(
        [(colours.index(m), dashes.index(p)) for m, p in zip(methods, places, strict=True)]
    )


def styles(lines: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """How to draw lines by (number of the colour, number of the dash), no two of them alike.

    >>> len({str(style) for style in styles([(c, d) for c in range(16) for d in range(6)])})
    96
    """
    rows = max((dash for _, dash in lines), default=0) + 1
    made = []
    for colour, dash in lines:
        width, at = divmod(dash + rows * (colour // len(COLOURS)), len(DASHES))
        line = {"color": COLOURS[colour % len(COLOURS)], "linestyle": DASHES[at]}
        made.append({**line, "linewidth": WIDTHS[width % len(WIDTHS)]})
    return made


def _seconds(label: str, results: Sequence[Any]) -> str:
    """``label``, of which real seconds are not virtual."""
    return label.removeprefix("virtual ") if results[0].experiment.real else label


def _window(traces: Sequence[NDArray]) -> float:
    """Virtual seconds to show: a few of the slowest jobs, at most BARS jobs in any timeline."""
    slowest = max(float((column(t, "end_s") - column(t, "start_s")).max()) for t in traces)
    window = 2.5 * slowest
    for trace in traces:
        if len(trace) > BARS:
            window = min(window, float(np.sort(column(trace, "start_s"))[BARS]))
    return min(window, max(float(column(t, "end_s").max()) for t in traces)) or 1.0


def _timeline(axes: Any, result: Any, window: float, colour: str) -> None:
    """Bars where a worker computes, alternately shaded job by job; empty where it waits."""
    trace = result.trace
    trace = trace[column(trace, "start_s") < window]
    n = min(result.experiment.fleet.workers, WORKERS_DRAWN)
    for worker in range(n):
        mine = trace[column(trace, "worker") == worker]
        start, end = column(mine, "start_s"), np.minimum(column(mine, "end_s"), window)
        spans = np.column_stack([start, end - start])
        for odd, alpha in ((0, 1.0), (1, 0.55)):
            axes.broken_barh(
                spans[odd::2], (worker - 0.4, 0.8), facecolors=colour, alpha=alpha, linewidth=0
            )
    axes.set(xlim=(0, window), ylim=(n - 0.4, -0.6), xlabel=_seconds("virtual seconds", [result]))
    axes.set_ylabel("worker")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_facecolor("#f0f0f0")
    fraction = result.final["busy"]
    axes.text(0.995, 1.02, f"busy {fraction:.0%}", transform=axes.transAxes, ha="right", fontsize=8)


def draw_topology(topology: "Topology", path: Path, rounds: int = 8) -> Path:
    """Draw a graph, or the first ``rounds`` rounds of a sequence side by side, to ``path``.

    Beyond 200 nodes: the degrees and eigenvalues of the first round (the degrees alone where the
    eigenvalues would take minutes).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = 1 if topology.period == 1 else min(rounds, topology.period or rounds, ROUNDS_DRAWN)
    large = topology.n > NODES_DRAWN
    rows, columns = (1, 2) if large else (-(-shown // STRIP), min(shown, STRIP))
    side = 4.5 if max(rows, columns) <= 2 else 2.6
    figure, grid = plt.subplots(
        rows, columns, figsize=(side * columns, side * rows), layout="constrained", squeeze=False
    )
    if large:
        _degrees(grid[0, 0], topology)
        _spectrum(grid[0, 1], topology)
    else:
        for k, axes in enumerate(grid.flat):
            axes.set_axis_off()
            if k < shown:
                _graph(axes, topology, k)
                if shown > 1:
                    axes.set_title(f"round {k}", fontsize=9)
    title = str(topology.spec or f"{topology.n} nodes")
    figure.suptitle(
        title + (f", {topology.n} nodes: round 0" if large else ""), fontsize=10, wrap=True
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    except ValueError as error:  # an ending that names no format
        raise ConfigError(f"{path}: {error}") from None
    finally:
        plt.close(figure)
    return path


def _graph(axes: Any, topology: "Topology", k: int) -> None:
    """Nodes where they are, else on a circle from the top, clockwise; edges as thick as W."""
    from matplotlib.collections import LineCollection

    graph, n = topology.graph(k), topology.n
    at = places(topology, k)
    edges = np.array(graph.edges, int).reshape(-1, 2)
    weight = np.abs(topology.matrix(k).toarray()[edges[:, 1], edges[:, 0]])
    if topology.directed and len(edges) <= ARROWS:
        for i, j in edges:
            axes.annotate(
                "",
                at[j],
                at[i],
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": COLOURS[0],
                    "lw": 0.7,
                    "alpha": 0.7,
                    "shrinkA": 3,
                    "shrinkB": 3,
                    "mutation_scale": 8,
                },
            )
    else:
        lines = LineCollection(list(at[edges]), colors=COLOURS[0], linewidths=0.4 + 2 * weight)
        axes.add_collection(lines)
    axes.scatter(*at.T, s=np.clip(1200 / n, 6, 60), color=COLOURS[1], zorder=3)
    axes.set_aspect("equal")
    axes.margins(0.08)


def places(topology: "Topology", k: int = 0) -> NDArray:
    """``[n, 2]``: where nodes are in round ``k``; else on a circle from the top, clockwise."""
    graph, n = topology.graph(k), topology.n
    angle = 2 * np.pi * np.arange(n) / n
    circle = np.column_stack([np.sin(angle), np.cos(angle)])
    return np.array([_place(graph.nodes[i].get("pos"), circle[i]) for i in range(n)])


def _place(pos: Any, otherwise: NDArray) -> NDArray:
    """``pos`` if it is a place in the plane; a graph from elsewhere may call anything so."""
    try:
        place = np.array(pos, float)
    except (TypeError, ValueError):
        return otherwise
    return place if place.shape == (2,) else otherwise


def _degrees(axes: Any, topology: "Topology") -> None:
    hears, heard = topology.matrix().nonzero()
    degree = np.bincount(hears[hears != heard], minlength=topology.n)
    axes.hist(degree, bins=np.arange(degree.min(), degree.max() + 2) - 0.5, color=COLOURS[0])
    axes.set(xlabel="neighbours", ylabel="nodes")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _spectrum(axes: Any, topology: "Topology") -> None:
    axes.set(title="eigenvalues of W")
    if topology.n > SPECTRUM_DRAWN:
        axes.set_axis_off()
        said = f"not computed beyond {SPECTRUM_DRAWN} nodes"
        axes.text(0.5, 0.5, said, ha="center", transform=axes.transAxes)
        return
    w = topology.matrix().toarray()
    if topology.directed:
        values = np.linalg.eigvals(w)
        axes.scatter(values.real, values.imag, s=4, color=COLOURS[0])
        axes.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    else:
        axes.plot(np.linalg.eigvalsh(w)[::-1], ".", ms=3, color=COLOURS[0])
        axes.set(xlabel="number", ylabel="")
