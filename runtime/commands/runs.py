"""Run folders as the command line makes, goes on with, and reports on them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from offbeat.runtime.api import api
from offbeat.runtime.api.plots import called
from offbeat.runtime.base.errors import ComputeError, ConfigError, Diverged, StorageError
from offbeat.runtime.base.logs import at_terminal
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.experiment.metrics import METRICS, said
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.checkpoint import write_whole

INTERRUPTED = 130
RUNS = Path("runs")
WIDE = 140  # characters a line, where no terminal says
console = Console(width=None if at_terminal() else WIDE)


def fresh(stem: str) -> Path:
    """A new run folder."""
    number = 1
    while (folder := RUNS / f"{stem}-{number:03d}").exists():
        number += 1
    return folder


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """Remove a former run, and nothing that is not one; it comes back where no other begins."""
    if not folder.is_dir() or not any(folder.iterdir()):
        yield
        return
    _check_replaced(folder)
    aside = folder.with_name(f".{folder.name}.replaced")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        folder.rename(aside)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be replaced ({error.strerror})") from None
    try:
        yield
    finally:
        if any(folder.rglob("*.safetensors")):  # its first checkpoint
            shutil.rmtree(aside)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)


def _check_replaced(folder: Path) -> None:
    """Raise ConfigError where a folder holds anything but runs."""
    parts = parts_of(folder)
    runs = [part for part in parts if part.is_dir()] or [folder]
    written = {"runs.txt", *api.DRAWN, *(part.name for part in parts)} if parts else set()
    foreign = {path.name for path in folder.iterdir()} - written if parts else set()
    for run in runs:
        inside = {path.name for path in run.iterdir()}
        foreign |= inside - api.WRITTEN
        if not parts and "metrics.jsonl" not in inside:
            foreign |= inside
    if foreign or folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        what = ", ".join(sorted(foreign)[:3]) or "the folder you are in"
        raise ConfigError(f"{folder}: holds something other than a run ({what}); left alone")


def parts_of(folder: Path) -> list[Path]:
    """The run folders of a comparison, in its order."""
    try:
        return [folder / line for line in (folder / "runs.txt").read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return []


def prepare_all(experiments: Sequence[Experiment], folder: Path) -> dict[str, Path]:
    """A folder for each run of a comparison, by label."""
    labels = called(experiments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty; give a new folder, or --overwrite")
        for label, experiment in zip(labels, experiments, strict=True):
            api.prepare(experiment, folder / label)
        # Last: where it is, every run can be resumed.
        write_whole(folder / "runs.txt", ("\n".join(labels) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    return {label: folder / label for label in labels}


def go_on(
    parts: dict[str, Path], folder: Path, experiment: Experiment | None = None, **more: Any
) -> None:
    """Run or resume the runs in ``parts``, then report on them; one that diverges stops alone."""
    results: dict[str, api.Result] = {}
    diverged: list[str] = []
    for label, part in parts.items():
        try:
            with _bar(label) as progress:
                if experiment is not None:
                    result = api.execute(experiment, part, progress=progress)
                else:
                    result = api.resume(part, progress=progress, **more)
        except Diverged as error:
            if len(parts) == 1:
                raise
            diverged.append(f"{label}: {error}")
            continue
        except ComputeError as error:
            again = checkpoint.exist(part / "checkpoint")
            hint = f"\nthe last checkpoint is intact: offbeat resume {folder}" if again else ""
            raise ComputeError(f"{error}{hint}") from None
        for note in result.notes:
            console.print(note, style="yellow", markup=False)
        results[label] = result
        if result.reason == "interrupted":
            break
    if results:
        _report(results, folder)
    if diverged:
        raise Diverged("\n".join(diverged))


class _bar:
    """A progress bar; as a context it gives the function to call with the fraction done."""

    def __init__(self, label: str) -> None:
        self._progress = Progress(
            TextColumn(f"{label:<18}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> api.Progress:
        self._progress.start()
        bar = self._progress.add_task("", total=1.0)
        return lambda fraction: self._progress.update(bar, completed=fraction)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


JOBS = ("lost", "reassigned", "cancelled")


def _report(results: dict[str, api.Result], folder: Path) -> None:
    """The table, the picture, and where things are."""
    from offbeat.runtime.api.plots import picture

    gossip = any(result.experiment.topology is not None for result in results.values())
    left_out = {"gradients"} | ({"grad_norm", "staleness_max"} if gossip else set())
    columns = [key for key in METRICS if any(key in r.final for r in results.values())]
    columns = [key for key in columns if key not in left_out]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for key in columns:
        title = "rounds" if gossip and key == "step" else METRICS[key].column
        if key == "time_s" and not all(result.experiment.real for result in results.values()):
            title = "virtual s"
        table.add_column(title, justify="right", no_wrap=True)
    for label, result in results.items():
        cells = [said(key, result.final[key]) if key in result.final else "" for key in columns]
        table.add_row(label, *cells)
    console.print(table)
    for label, result in results.items():
        if result.reason == "idle":
            say(f"{label}: ended early, no job is left that will ever come back")
        counts = [f"{result.facts[k]} {k}" for k in JOBS if result.facts.get(k)]
        if counts:
            say(f"{label}: jobs {', '.join(counts)}")
        if lost := result.facts.get("messages_lost"):
            say(f"{label}: {lost:,} of {result.facts['messages']:,} messages lost")
    if any(result.reason == "interrupted" for result in results.values()):
        say(f"interrupted; go on with: offbeat resume {folder}")
        raise typer.Exit(INTERRUPTED)
    drawn = picture(list(results.values()), folder / "picture.png", list(results))
    say(f"picture: {drawn}")


def say(text: str) -> None:
    """Plain text, on one line: paths are to be copied."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
