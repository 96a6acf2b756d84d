"""Run folders: whether a run can go on from what is in one; nothing that was recorded is lost."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.experiment import files
from offbeat.runtime.experiment.experiment import Experiment, Record
from offbeat.runtime.run.records import checked

LAST = [*vars(Record())][-1]  # key of an experiment.toml: with its line's end, all is there


def check_whole(path: Path) -> None:
    """Raise ConfigError where a run folder's experiment.toml is not all that was written."""
    try:
        text = path.read_text()
        ends = tomllib.loads(text)["record"].keys() | {text[-1:]}
    except (OSError, ValueError, KeyError, AttributeError):
        ends = set()
    if not {"\n", LAST} <= ends:
        raise ConfigError(
            f"{path}: was cut, or written by hand: it does not end as that of a run does; put it "
            "back, or begin a run with it"
        )


def check_same(
    folder: Path,
    state: Mapping[str, Any],
    experiment: Experiment,
    *,
    changed: bool = False,
    apart: str | tuple[str, ...] = "stop.",
) -> None:
    """Raise ConfigError where ``experiment`` is not what a checkpoint's ``state`` is of.

    Args:
        folder: of the run.
        state: of its checkpoint.
        experiment: that is to go on.
        changed: whether it may be another, with a model as large.
        apart: what the keys begin with that may differ anyway.
    """
    was, now = state.get("experiment", {}), experiment.identity()
    other = files.differences(_without(was, apart), _without(now, apart))
    if "experiment" in state and other and not changed:
        raise ConfigError(
            f"{folder}: the experiment is not that of the run: {other}; put it back, take another "
            "folder, or say that it may differ: offbeat resume --changed"
        )
    if "x" in state and len(state["x"]) != experiment.task.dim:
        raise ConfigError(
            f"{folder}: the run has a model of {len(state['x']):,} numbers, and the task one of "
            f"{experiment.task.dim:,}"
        )


def check_given(folder: Path, there: Experiment, given: Experiment) -> None:
    """Raise ConfigError where a file has ``given`` other settings than the run in ``folder``."""
    was, now = (
        _without(one.identity(), "evaluate.") | dict(files.flat(one.table()["stop"], "stop"))
        for one in (there, given)
    )
    if other := files.differences(was, now):
        raise ConfigError(
            f"{folder}: the run there is not what the file says: {other}; give another --out, or "
            f"the run another end: offbeat resume {folder} --set stop.KEY=VALUE"
        )


def _without(identity: Mapping[str, Any], apart: str | tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if not key.startswith(apart)}


def check_trace(folder: Path, state: dict[str, Any]) -> None:
    """Raise StorageError where a run folder's trace is not that of its checkpoint ``state``."""
    name, its = "trace.jsonl", state["records"]
    checked(folder / name, its["lengths"][name], its.get("digests", {}).get(name))


def begun(folder: Path) -> list[Path]:
    """The files in which a run folder has results, or measurements after the first."""
    found = []
    for name in ("metrics.jsonl", "trace.jsonl"):
        if (path := folder / name).exists():
            with path.open("rb") as file:
                found += [path] * bool(file.readline() and file.readline())
    return found


def set_aside(folder: Path) -> None:
    """Give what a former run left in ``folder`` other names: this one begins anew."""
    for path in begun(folder):
        number = len(list(folder.glob(f"{path.stem}-*{path.suffix}"))) + 1
        path.rename(path.with_stem(f"{path.stem}-{number}"))
