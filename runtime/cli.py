"""The command line."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from offbeat.algorithms.server import ALGORITHMS
from offbeat.runtime import api
from offbeat.runtime.errors import ConfigError, OffbeatError, StorageError, nearest
from offbeat.runtime.experiment import Experiment, apply_override, from_table, read
from offbeat.topologies import TOPOLOGIES, WEIGHTS, facts
from offbeat.workers.data import BUNDLED
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.speeds import SPEEDS
from offbeat.workers.tasks import TASKS

INTERRUPTED = 130
RUNS = Path("runs")
LISTS = {
    "algorithms": ALGORITHMS,
    "tasks": TASKS,
    "speeds": SPEEDS,
    "partitions": PARTITIONS,
    "topologies": TOPOLOGIES,
    "weights": WEIGHTS,
}

app = typer.Typer(
    help="Asynchronous optimisation on fleets of unequal workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as fleet.workers=20."),
]


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="An experiment (TOML).")] = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(help='A method, as shuffled or "pure(lr=0.5)"; several are compared.'),
    ] = None,
    task: Annotated[str | None, typer.Option(help="As logistic:digits or quadratic(5).")] = None,
    workers: Annotated[int | None, typer.Option(help="How many workers.")] = None,
    speeds: Annotated[
        str | None, typer.Option(help='Seconds a job: "lognormal(1.0)", 1..10, ...')
    ] = None,
    stragglers: Annotated[
        str | None, typer.Option(help="2x10: two workers ten times slower.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after so many server steps.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after virtual seconds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for records and picture (else runs/NAME-NNN).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in --out.")
    ] = False,
) -> None:
    """Run an experiment, from a file or from options, and draw it."""
    named = {
        "task": task,
        "algorithm": algorithm,
        "fleet.workers": workers,
        "fleet.speeds": speeds,
        "fleet.stragglers": stragglers,
        "stop.steps": steps,
        "stop.seconds": seconds,
        "seed": seed,
    }
    given = {key: value for key, value in named.items() if value is not None}
    if file is None:
        table: dict[str, Any] = {}
        _merge(table, given)
        for override in overrides or []:
            apply_override(table, override)
        experiments, stem = from_table(table), "run"
    else:
        if clash := [key for key in ("task", "algorithm") if key in given]:
            raise ConfigError(
                f"{file} has its own {clash[0]}; change a key with --set {clash[0]}.KEY=VALUE"
            )
        words = [f"{key}={_toml(value)}" for key, value in given.items()]
        experiments, stem = read(file, [*words, *(overrides or [])]), file.stem
    folder = out or _fresh(stem)
    if overwrite and out is not None:
        _clear(out)
    results = _run_all(experiments, folder)
    _report(results, folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Set = None,
) -> None:
    """Go on with a run that was stopped; it ends as if it had not been."""
    folders = _parts(folder) or [folder]
    results = []
    for part in folders:
        label = part.name if part != folder else ""
        with _bar(label or str(folder)) as progress:
            result = api.resume(part, overrides=overrides, progress=progress)
        for note in result.notes:
            console.print(f"[yellow]{note}")
        results.append(result)
        if result.reason == "interrupted":
            break
    _report(results, folder)


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Run a recorded run again from its trace and compare the models bit for bit."""
    for part in _parts(folder) or [folder]:
        replayed = api.replay(part).x
        recorded = api.checkpointed_model(part)
        if not np.array_equal(recorded, replayed):
            apart = float(np.abs(recorded - replayed).max())
            raise StorageError(f"{part}: the replay differs from the run (by up to {apart:.3g})")
        said = f"{part}: the replay ends at the same bits ({len(replayed)} parameters)"
        console.print(said, soft_wrap=True, highlight=False)


@app.command()
def topology(
    text: Annotated[str, typer.Argument(help='As ring:16 or "torus(4, 5)".')],
    weights: Annotated[
        str | None, typer.Option(help='Mixing weights, as metropolis or "lazy(best-constant)".')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a random graph.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of a sequence to draw.", min=1)] = 8,
    out: Annotated[
        Path | None, typer.Option(help="The picture's file (else runs/topology-NAME-N.png).")
    ] = None,
) -> None:
    """Print what is to know about a topology, and draw it."""
    given = {k: v for k, v in {"weights": weights, "seed": seed}.items() if v is not None}
    made = TOPOLOGIES.parse(text, **given)
    if unused := [key for key, value in given.items() if made.spec.options.get(key) != value]:
        raise ConfigError(f"--{unused[0]}: {made.spec} does not take it, or says it itself")
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts(made).items():
        table.add_row(key.replace("_", " "), _said(value))
    console.print(str(made.spec), style="bold", highlight=False)
    console.print(table)
    from offbeat.runtime.plots import draw_topology

    path = out or RUNS / f"topology-{made.spec.name}-{made.n}.png"
    drawn = draw_topology(made, path, rounds)
    console.print(f"picture: {drawn}", soft_wrap=True)


def _said(value: Any) -> str:
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}"


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=", ".join(LISTS) + " or data")],
) -> None:
    """List what can be named."""
    if what == "data":
        for name, about in BUNDLED.items():
            console.print(f"[bold]{name}[/]  {about}", highlight=False)
        console.print("or the path of a LibSVM (.svm, .gz, .bz2) or .npz file")
        return
    if what not in LISTS:
        raise ConfigError(f'cannot list "{what}"{nearest(what, [*LISTS, "data"])}')
    for name, arguments, about in LISTS[what].describe():
        console.print(f"[bold]{name}[/]({arguments})", highlight=False, soft_wrap=True)
        console.print(f"    {about}", highlight=False, soft_wrap=True)


def _merge(table: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        *parents, last = key.split(".")
        place = table
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _fresh(stem: str) -> Path:
    number = 1
    while (folder := RUNS / f"{stem}-{number:03d}").exists():
        number += 1
    return folder


def _clear(folder: Path) -> None:
    """Remove a former run, and nothing that is not one."""
    import shutil

    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "experiment.toml").exists() and not _parts(folder):
        raise ConfigError(f"{folder}: holds something other than a run; it is left alone")
    shutil.rmtree(folder)


def _parts(folder: Path) -> list[Path]:
    """The run folders of a comparison, in its order."""
    try:
        return [folder / line for line in (folder / "runs.txt").read_text().splitlines()]
    except OSError:
        return []


def _labels(experiments: Sequence[Experiment]) -> list[str]:
    """The methods' names, with what tells apart those of one name."""
    specs = [experiment.algorithm.spec for experiment in experiments]
    labels: list[str] = []
    for spec in specs:
        assert spec is not None
        same = [other for other in specs if other is not None and other.name == spec.name]
        differ = [
            f"{key}={value}"
            for key, value in spec.options.items()
            if any(other.options.get(key) != value for other in same)
        ]
        label = " ".join([spec.name, *differ])
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def _run_all(experiments: Sequence[Experiment], folder: Path) -> list[api.Result]:
    if len(experiments) == 1:
        with _bar(str(experiments[0].algorithm.spec.name)) as progress:  # type: ignore[union-attr]
            return [api.execute(experiments[0], folder, progress=progress)]
    labels = _labels(experiments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty; give a new folder, or --overwrite")
        (folder / "runs.txt").write_text("\n".join(labels) + "\n")
        for label, experiment in zip(labels, experiments, strict=True):
            api.prepare(experiment, folder / label)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    results = []
    for label in labels:
        with _bar(label) as progress:
            results.append(api.resume(folder / label, progress=progress))
        if results[-1].reason == "interrupted":
            break
    return results


class _bar:
    """A progress bar; as a context it gives the function to call with the fraction done."""

    def __init__(self, label: str) -> None:
        self._progress = Progress(
            TextColumn(f"{label:<18}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> api.Progress:
        self._progress.start()
        bar = self._progress.add_task("", total=1.0)
        return lambda fraction: self._progress.update(bar, completed=fraction)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


COLUMNS = {
    "time_s": ("virtual s", "{:,.0f}"),
    "step": ("steps", "{:,.0f}"),
    "loss": ("loss", "{:.4g}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "distance2": ("distance²", "{:.3g}"),
    "staleness_mean": ("staleness", "{:.1f}"),
    "staleness_max": ("max", "{:.0f}"),
    "busy": ("busy", "{:.0%}"),
}


def _report(results: Sequence[api.Result], folder: Path) -> None:
    """The table, the picture, and where things are."""
    labels = [r.folder.name if r.folder != folder and r.folder else r.name for r in results]
    columns = [key for key in COLUMNS if any(key in result.final for result in results)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for key in columns:
        table.add_column(COLUMNS[key][0], justify="right")
    for label, result in zip(labels, results, strict=True):
        cells = [
            COLUMNS[k][1].format(result.final[k]) if k in result.final else "" for k in columns
        ]
        table.add_row(label, *cells)
    console.print(table)
    for label, result in zip(labels, results, strict=True):
        if result.reason == "idle":
            console.print(f"[yellow]{label}: ended early, no job is left that will ever come back")
        counts = [f"{v} {k}" for k, v in result.facts.items() if v and k != "concurrency"]
        if counts:
            console.print(f"{label}: jobs {', '.join(counts)}")
    if results[-1].reason == "interrupted":
        console.print(f"interrupted; go on with: offbeat resume {folder}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    from offbeat.runtime.plots import picture

    drawn = picture(results, folder / "picture.png", labels)
    console.print(f"picture: {drawn}", soft_wrap=True)


def main() -> None:
    """Entry point: one sentence and an exit code for every mistake."""
    logging.basicConfig(
        level="WARNING",
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    try:
        app()
    except OffbeatError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"offbeat: {error}", highlight=False, markup=False
        )
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
