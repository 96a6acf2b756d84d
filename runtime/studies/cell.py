"""One cell of a study: an experiment of one seed, and what is kept of its run."""

import hashlib
import json
import time
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError, OffbeatError
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.experiment import Experiment, from_table
from offbeat.topologies import TOPOLOGIES, Topology
from offbeat.topologies.spectral import WINDOW, effective_gap

MOST_TAUS = 1000  # of the staleness histogram; the last one stands for all beyond
VERSION = version("offbeat")  # what the same settings give may change with it
MOST_GAP = 2000  # nodes up to which gaps are computed in passing


class CellJob(NamedTuple):
    """What a process is told of a cell; its folder, if its records shall be kept."""

    cell: str
    table: dict[str, Any]
    folder: str | None


def run(job: CellJob) -> bytes:
    """Run a cell; answers its line in the study's file.  What fails is a line with its error."""
    line = begun(job.cell, job.table)
    began_s = time.perf_counter()
    try:
        line |= _run(job)
    except OffbeatError as error:
        line["error"] = f"{type(error).__name__}: {error}"
    line["wall_s"] = time.perf_counter() - began_s
    return encode(line)


def begun(cell: str, table: dict[str, Any]) -> dict[str, Any]:
    """What is known of a cell before it is run."""
    return {"cell": cell, "version": VERSION, "settings": table}


def encode(line: dict[str, Any]) -> bytes:
    """A line of the study's file, with its digest; a number that is not finite is null there."""
    text = msgspec.json.encode(line)
    return text[:-1] + _end(text)


def decode(text: bytes) -> dict[str, Any]:
    """What ``encode`` was given; raises ValueError where it is not what was written."""
    before = text[: -len(_end(b""))] + b"}"
    if text != before[:-1] + _end(before):
        raise ValueError("its digest is wrong")
    line: dict[str, Any] = msgspec.json.decode(before)
    return line


def _end(text: bytes) -> bytes:
    """What stands in the place of the last brace of ``text``."""
    return b',"digest":"%b"}\n' % hashlib.blake2b(text, digest_size=8).hexdigest().encode()


def _run(job: CellJob) -> dict[str, Any]:
    experiment = one(job.table)
    folder = Path(job.folder) if job.folder is not None else None
    if folder is not None and (folder / "experiment.toml").exists():
        result = api.resume(folder)  # the study was interrupted in its midst
    else:
        result = api.execute(experiment, folder)
    own = dict(metrics.own(experiment.task))
    kept = metrics.kept(result.final, own)
    curves = short(np.array([result.column(key) for key in kept]))
    taus = result.histogram.tolist()
    if len(taus) > MOST_TAUS:
        taus = [*taus[: MOST_TAUS - 1], sum(taus[MOST_TAUS - 1 :])]
    return {
        "reason": result.reason,
        "final": {k: v for k, v in result.final.items() if isinstance(v, int | float)},
        "curve": dict(zip(kept, curves.tolist(), strict=True)),
        "histogram": taus,
        "topology": None if experiment.topology is None else topology(experiment.topology),
        "better": own,
    }


def short(values: NDArray) -> NDArray:
    """``values`` to six digits: half the size of the file.

    >>> short(np.array([0.0, 1234567.0, -0.123456789, np.inf])).tolist()
    [0.0, 1234570.0, -0.123457, inf]
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        place = np.floor(np.log10(np.abs(values))) - 5  # of the last digit
        # Powers of ten are exact where they are whole, so what is written has six digits.
        up, down = 10.0 ** np.maximum(-place, 0), 10.0 ** np.maximum(place, 0)
        made = np.round(values * up / down) * down / up
    return np.where(np.isfinite(made), made, values)


def one(table: dict[str, Any]) -> Experiment:
    """The only experiment that ``table`` describes."""
    found = from_table(table, ours=True)
    if len(found) != 1:
        raise ConfigError(f"a cell is one experiment, not {len(found)}; move lists to [grid]")
    return found[0]


def topology(made: Topology) -> dict[str, Any]:
    """Its ``n`` and ``gap``, None if that was not computed."""
    gap = None
    if made.spec is not None and made.n <= MOST_GAP:
        gap = _gap(json.dumps(made.spec.table()))
    return {"n": made.n, "gap": gap}


def measures(experiment: Experiment) -> list[str]:
    """The metrics that a run of it has, by a look at its beginning."""
    task = experiment.task
    gossip = [] if experiment.topology is None else ["consensus", "loss_worst"]
    return [*task.evaluate(task.initial(experiment.seed)), *gossip, *metrics.LOADS]


@lru_cache(maxsize=256)
def _gap(spec: str) -> float:
    """The effective spectral gap over a period."""
    made = TOPOLOGIES.table(json.loads(spec))
    return effective_gap(made, made.period or WINDOW)
