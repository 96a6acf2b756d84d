"""The metrics: what each is called, how it is written, which way is better, and when it was good.

Whoever reads a target, makes a choice or draws a scale asks here.  A task with metrics of its own
says which way they go: ``better = {"auc": "higher"}``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from offbeat.runtime.base.errors import ConfigError, nearest

LOWER, HIGHER = "lower", "higher"


class Metric(NamedTuple):
    """What is known of a metric.

    Args:
        label: of an axis.
        column: of a table.
        form: of a number in it.
        better: None of what only grows, which is no target.
        unit: in which it is shown.
    """

    label: str
    column: str
    form: str = "{:.4g}"
    better: str | None = LOWER
    unit: float = 1


METRICS = {
    "time_s": Metric("seconds", "seconds", "{:,.0f}", None),
    "step": Metric("steps", "steps", "{:,.0f}", None),
    "gradients": Metric("gradients", "gradients", "{:,.0f}", None),
    "loss": Metric("loss", "loss"),
    "grad_norm": Metric("gradient norm", "grad norm", "{:.3g}"),
    "accuracy": Metric("accuracy", "accuracy", "{:.3f}", HIGHER),
    "perplexity": Metric("perplexity", "perplexity", "{:.3f}"),
    "distance2": Metric("squared distance to the optimum", "distance²", "{:.3g}"),
    "consensus": Metric("distance between the nodes", "consensus", "{:.3g}"),
    "loss_worst": Metric("loss at the farthest node", "farthest node"),
    "bytes": Metric("megabytes sent", "MB sent", "{:,.1f}", None, 1e6),
    "staleness_mean": Metric("mean staleness", "staleness", "{:.1f}"),
    "staleness_max": Metric("greatest staleness", "max", "{:.0f}"),
    "busy": Metric("busy fraction", "busy", "{:.0%}", HIGHER),
}
COSTS = ("step", "time_s", "gradients", "bytes")  # what a level is reached after
QUALITIES = ("loss", "grad_norm", "accuracy", "perplexity", "distance2", "consensus", "loss_worst")
# How often a run waited, and what for, is said at its end alone.
LOADS = ("staleness_mean", "staleness_max", "busy")
TAIL = 0.2  # of the evaluations: their mean is where a run stays


def said(name: str, value: float) -> str:
    """``value`` as a table shows it."""
    one = METRICS[name]
    return one.form.format(value / one.unit)


def better(name: str, own: Mapping[str, str] | None = None, besides: Iterable[str] = ()) -> str:
    """Which way ``name`` is better, "lower" or "higher".

    Args:
        name: of the metric.
        own: what its task says of its own.
        besides: other names that may have been meant.

    Raises:
        ConfigError: nobody says.

    >>> better("accuracy"), better("auc", {"auc": "higher"})
    ('higher', 'higher')
    >>> better("acuracy")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: which way "acuracy" is better is not known: its task can \
say it, as better = {"acuracy": "higher"}; did you mean "accuracy"?
    """
    if own and name in own:
        if own[name] not in (LOWER, HIGHER):
            raise ConfigError(f'better: {name} is "{LOWER}" or "{HIGHER}", not {own[name]!r}')
        return own[name]
    if name in METRICS and (way := METRICS[name].better) is not None:
        return way
    meant = nearest(name, [*directed(METRICS), *(own or {}), *besides])
    if name in METRICS:
        raise ConfigError(f"{name} only grows and is no target{meant}")
    raise ConfigError(
        f'which way "{name}" is better is not known: its task can say it, as '
        f'better = {{"{name}": "{HIGHER}"}}{meant}'
    )


def own(task: Any) -> Mapping[str, str]:
    """Which way a task's own metrics are better."""
    found: Mapping[str, str] = getattr(task, "better", {})
    return found


def directed(names: Iterable[str], own: Mapping[str, str] | None = None) -> list[str]:
    """Those of ``names`` that can be targets."""
    known = {name for name, one in METRICS.items() if one.better} | set(own or {})
    return [name for name in names if name in known]


def kept(found: Iterable[str], own: Mapping[str, str] | None = None) -> list[str]:
    """Those of ``found`` whose course is kept of every run."""
    there = set(found)
    return [name for name in dict.fromkeys((*COSTS, *QUALITIES, *(own or {}))) if name in there]


def at(value: Any, level: float, way: str) -> Any:
    """Whether ``value`` (a number or an array) is at ``level`` or better."""
    return value >= level if way == HIGHER else value <= level


def reached(
    curve: Mapping[str, Sequence[float | None]], metric: str, level: float, way: str
) -> dict[str, float]:
    """Steps, seconds, gradients and bytes at which ``metric`` first was at ``level`` or better.

    Between two evaluations, what falls is taken to fall geometrically (linearly where it is not
    positive), and what rises, to rise linearly.

    Returns:
        a value for each of ``COSTS`` in the curve; nothing where the level was not reached.
    """
    values = np.array(curve[metric], float)  # null, of what was not finite, is nan
    there = np.flatnonzero(at(values, level, way))
    if not len(there):
        return {}
    place = int(there[0])
    fraction = 1.0
    if place and np.isfinite(values[place - 1]):
        before, after, aim = float(values[place - 1]), float(values[place]), level
        if way == LOWER and after > 0 and aim > 0:
            before, after, aim = math.log(before), math.log(after), math.log(aim)
        fraction = (before - aim) / (before - after)
    found = {}
    for cost in COSTS:
        if cost in curve:
            x = np.array(curve[cost], float)
            start = x[place - 1] if place else x[0]
            found[cost] = float(start + fraction * (x[place] - start))
    return found


def tail(values: Sequence[float | None]) -> float:
    """The mean over the last fifth of the evaluations; nan where one of them was not finite."""
    last = np.array(values, float)[-max(1, math.ceil(TAIL * len(values))) :]
    return float(last.mean())
