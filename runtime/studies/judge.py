"""What the runs of a study are judged by: a target, and what tuning chooses by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from offbeat.runtime.base.errors import ConfigError, OffbeatError, nearest
from offbeat.runtime.base.registry import Finite, settings
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.studies import cell
from offbeat.runtime.studies.table import REACHED, row


@settings
class Target:
    """How long a run takes until ``metric`` is at ``level`` or better."""

    metric: str
    level: Finite


def target(table: Any) -> Target:
    """From the section of a study's file, ``accuracy = 0.9``."""
    if not isinstance(table, Mapping) or len(table) != 1:
        raise ConfigError("target: write a metric and its level, as [target] accuracy = 0.9")
    ((metric, level),) = table.items()
    return Target(metric=metric, level=level)


class Judge:
    """Tells good runs from bad ones.

    Args:
        target: of the study, if it has one.
        by: a column of the table that shall be good; where None: the steps to the target, then
            where its metric (else the loss) stays, the column ``floor``.
    """

    def __init__(self, target: Target | None, by: str | None = None) -> None:
        self.target, self.by = target, by
        self.metric = "loss" if target is None else target.metric

    def better(self, column: str, own: Mapping[str, str]) -> str:
        """Which way a column of the table is better; ``own``: see ``metrics.better``."""
        if column.endswith("_to_target") or column in (*metrics.COSTS, "wall_s"):
            return metrics.LOWER
        more = ("floor", "wall_s", *(f"{name}_to_target" for name in REACHED))
        return metrics.better(self.metric if column == "floor" else column, own, more)

    def _read(self, experiment: Experiment) -> list[tuple[str, str]]:
        """(where it is said, column) of all that is read of its run."""
        read = [(f"stop.{metric}", metric) for metric in experiment.stop.targets]
        read += [("target", self.metric)] if self.target is not None else []
        return read + ([("tune.by", self.by)] if self.by and self.by != "floor" else [])

    def check(self, experiment: Experiment) -> None:
        """Refuse a metric of which nobody says which way is better."""
        for key, column in self._read(experiment):
            try:
                self.better(column, metrics.own(experiment.task))
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None

    def look(self, tables: Sequence[dict[str, Any]]) -> None:
        """Refuse a metric that the runs of ``tables`` do not have.

        One of every kind of task is evaluated once, where its run would begin.
        """
        seen = set()
        for table in tables:
            task = table["task"]
            kind = task.get("name"), task.get("file"), "topology" in table
            if kind in seen:
                continue
            try:
                experiment = cell.one(table)
                known = {*cell.measures(experiment), *metrics.COSTS, "wall_s"}
            except OffbeatError:
                continue  # it is said of the cell
            seen.add(kind)
            if self.target is not None:
                known |= {f"{name}_to_target" for name in REACHED}
            for key, column in self._read(experiment):
                if column not in known:
                    meant = nearest(column, metrics.directed(known, metrics.own(experiment.task)))
                    raise ConfigError(f'{key}: runs have no metric "{column}"{meant}')

    def score(self, lines: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """What tuning makes small; infinite where a run failed."""
        return self.mark([row(line, self.target) for line in lines], lines[0].get("better", {}))

    def mark(self, rows: Sequence[dict[str, Any]], own: Mapping[str, str]) -> tuple[float, float]:
        """The same of ``rows`` of the table."""
        if any(one["error"] for one in rows):
            return math.inf, math.inf
        by = self.by or "floor"
        if by not in rows[0]:
            raise ConfigError(f'tune.by: the table has no column "{by}"{nearest(by, rows[0])}')
        sign = -1 if self.better(by, own) == metrics.HIGHER else 1
        value = _mean([None if one[by] is None else sign * one[by] for one in rows])
        if self.by is not None or self.target is None:
            return value, 0.0
        return _mean([one.get("steps_to_target") for one in rows]), value


def _mean(values: Sequence[float | None]) -> float:
    return sum(math.inf if value is None else value for value in values) / len(values)
