"""The picture of a run or a comparison: loss against time and steps, and who worked when."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.errors import StorageError
from offbeat.runtime.records import column

if TYPE_CHECKING:
    from offbeat.runtime.api import Result

# A palette that readers with any colour vision can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
TIMELINES = 6  # drawn at most
WORKERS_DRAWN = 24
BARS = 4000  # drawn at most in one timeline
UNLIKE = 5.0  # ratio of run lengths from which their axis is logarithmic


def picture(results: Sequence["Result"], path: Path, labels: Sequence[str] | None = None) -> Path:
    """Draw ``results`` together and write ``path`` (its ending says the format)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(labels or [result.name for result in results])
    shown = [r for r in results if len(r.trace)][:TIMELINES]
    rows = (len(shown) + 1) // 2
    figure = plt.figure(figsize=(11, 3.6 + 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[1.7] + [1] * rows)
    for at, (key, label) in enumerate((("time_s", "virtual seconds"), ("step", "server steps"))):
        axes = figure.add_subplot(grid[0, at])
        for result, name, colour in zip(results, names, _cycle(), strict=False):
            axes.plot(result.column(key), result.column("loss"), label=name, color=colour, lw=1.6)
        losses = np.concatenate([result.column("loss") for result in results])
        axes.set_yscale("log" if losses.min() > 0 else "linear")
        ends = [result.column(key)[-1] for result in results]
        if max(ends) > UNLIKE * min(ends) > 0:  # else the shortest run is a stub at the edge
            axes.set_xscale("symlog", linthresh=max(1.0, min(ends) / UNLIKE))
            axes.set_xlim(left=0)
        axes.set(xlabel=label, ylabel="loss" if at == 0 else "")
        axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    window = _window([result.trace for result in shown]) if shown else 0.0
    for at, result in enumerate(shown):
        axes = figure.add_subplot(grid[1 + at // 2, at % 2])
        colour = COLOURS[list(results).index(result) % len(COLOURS)]
        _timeline(axes, result, window, colour)
        axes.set_title(f"{names[list(results).index(result)]}: who computed when", fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
    return path


def _cycle() -> list[str]:
    return list(COLOURS) * 4


def _window(traces: Sequence[NDArray]) -> float:
    """Virtual seconds to show: a few of the slowest jobs, at most BARS jobs in any timeline."""
    slowest = max(float((column(t, "end_s") - column(t, "start_s")).max()) for t in traces)
    window = 2.5 * slowest
    for trace in traces:
        if len(trace) > BARS:
            window = min(window, float(np.sort(column(trace, "start_s"))[BARS]))
    return min(window, max(float(column(t, "end_s").max()) for t in traces)) or 1.0


def _timeline(axes: Any, result: "Result", window: float, colour: str) -> None:
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
    axes.set(xlim=(0, window), ylim=(n - 0.4, -0.6), xlabel="virtual seconds", ylabel="worker")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_facecolor("#f0f0f0")
    fraction = result.final["busy"]
    axes.text(0.995, 1.02, f"busy {fraction:.0%}", transform=axes.transAxes, ha="right", fontsize=8)
