"""What the folders of runs have, read as it is: nothing of a run is made again for a page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offbeat.algorithms.gossip import ALGORITHMS
from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.base.registry import MADE_BY_HAND, Spec, told_apart
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.experiment import make_part, read_toml
from offbeat.runtime.gossip.replayed import PEER
from offbeat.runtime.studies import table as tables
from offbeat.runtime.studies.cell import topology
from offbeat.topologies import TOPOLOGIES, Topology
from offbeat.topologies.saved import SAVED


@dataclass
class RecordedRun:
    """What is known of one run.

    Args:
        axes: what tells it from others; the seed is apart.
        seed: of the run.
        line: as in a study's file; see ``cell.run``.
        row: of the table; see ``table.row``.
        folder: of its records, if it has one.
    """

    axes: dict[str, Any]
    seed: int
    line: dict[str, Any]
    row: dict[str, Any]
    folder: Path | None = None


def parts(folder: Path) -> list[Path]:
    """The run folders that ``folder`` holds (a comparison's, in its order, or peers'), or itself.

    Raises:
        ConfigError: it is no such folder.
    """
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file; name the folder it is in, {folder.parent}")
    try:
        found = [folder / line for line in (folder / "runs.txt").read_text().splitlines()]
    except FileNotFoundError:
        own = (folder / "experiment.toml").exists()
        found = [] if own else sorted(path.parent for path in folder.glob(f"*/{PEER}"))
    for part in found or [folder]:
        if not (part / "experiment.toml").exists():
            raise ConfigError(
                f"{part}: is neither a run (experiment.toml) nor a study (study.toml)"
            )
    return found or [folder]


def settings(folder: Path) -> dict[str, Any]:
    """What a run was: its experiment.toml."""
    (part, *more) = parts(folder)
    if more or part != folder:
        raise ConfigError(f"{folder}: holds several runs; name one of them, as {part}")
    return read_toml(folder / "experiment.toml")


def runs(folder: Path) -> list[RecordedRun]:
    """The runs of a folder, of a comparison, or of peers, as far as they are."""
    there = [part for part in parts(folder) if (part / "metrics.jsonl").exists()]
    return [run for part in there if (run := _run(part)) is not None]


def _run(folder: Path) -> RecordedRun | None:
    settings = read_toml(folder / "experiment.toml")
    found = rows(folder / "metrics.jsonl")
    if not found:
        return None
    final, histogram = found[-1], [1]
    if (folder / "summary.json").exists():
        final = json.loads((folder / "summary.json").read_text())
        histogram = final.get("histogram", histogram)  # a single peer has none
        if final.get("gradients") not in (None, found[-1]["gradients"]):
            found.append(final)
    own = settings["task"].get("better", {})
    gossip, n = "topology" in settings, settings["fleet"]["workers"]
    made = graph(settings["topology"], n, settings["seed"]) if gossip else None
    unknown = {"n": n, "gap": None} if gossip else None
    line = {
        "cell": folder.resolve().name,
        "settings": settings,
        "reason": final.get("reason", "still running"),
        "final": {key: v for key, v in final.items() if isinstance(v, int | float)},
        "curve": {key: [row.get(key) for row in found] for key in metrics.kept(final, own)},
        "histogram": histogram,
        "topology": unknown if made is None else topology(made),
        "asynchronous": gossip and _asynchronous(settings),
        "better": own,
        "wall_s": None,
    }
    axes: dict[str, Any] = {"algorithm": spec(settings["algorithm"]), "topology": None}
    if gossip:
        axes["topology"] = spec(settings["topology"])
        axes["mode"] = "asynchronous" if line["asynchronous"] else "synchronous"
    return RecordedRun(axes, settings["seed"], line, tables.row(line, None), folder)


def graph(given: Any, n: int, seed: int) -> Topology | None:
    """The topology that a file says; None where nothing here knows it."""
    try:
        made: Topology = make_part(TOPOLOGIES, given, n=n, seed=seed)
    except ConfigError:
        return None
    return made


def _asynchronous(settings: dict[str, Any]) -> bool:
    if "mode" in settings:
        return bool(settings["mode"] == "asynchronous")
    return not make_part(ALGORITHMS, settings["algorithm"]).synchronous


def spec(part: dict[str, Any]) -> Spec:
    """What a part of a recorded experiment is called."""
    options = {key: value for key, value in part.items() if key not in ("name", "better")}
    name = part["name"].removeprefix(MADE_BY_HAND)
    return Spec("graph", {}) if name == SAVED else Spec(name, options)


def rows(path: Path) -> list[Any]:
    """The rows of a file that may be growing: a last one that is not whole is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        return [json.loads(text) for text in whole.splitlines()]
    except ValueError as error:
        raise StorageError(f"{path}: cannot be read ({error})") from None


def tell_apart(found: Sequence[RecordedRun]) -> None:
    """Name recorded runs by method, topology and mode; by their folders where these are the same.

    Runs of the same settings but for the seed stay together, unless a part was made in Python: its
    settings are not known.
    """
    for key in ("algorithm", "topology"):
        specs = [run.axes[key] or Spec("", {}) for run in found]
        for run, text in zip(found, told_apart(specs), strict=True):
            run.axes[key] = text
    for key in ("topology", "mode"):  # what is the same everywhere tells nothing
        if len({run.axes.get(key, "") for run in found}) == 1:
            for run in found:
                run.axes.pop(key, None)
    settings: dict[str, dict[str, str]] = {}  # what it is called -> its settings -> a folder
    for run in found:
        same = {key: v for key, v in run.line["settings"].items() if key != "seed"}
        for part in same.values():
            if isinstance(part, dict):
                part.pop("seed", None)  # filled in from the run's
        alike = settings.setdefault(tables.name(run.axes), {})
        text = json.dumps(same, sort_keys=True, default=str)
        if MADE_BY_HAND in text or (run.folder is not None and (run.folder / PEER).exists()):
            text += str(run.folder)
        run.line["named"] = alike.setdefault(text, run.line["cell"])
    for run in found:
        if len(settings[tables.name(run.axes)]) > 1:
            run.axes["run"] = run.line["named"]
