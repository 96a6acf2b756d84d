"""The command line."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

from offbeat.algorithms.compression import COMPRESSORS
from offbeat.algorithms.gossip import ALGORITHMS
from offbeat.deploy.cli import deploy, doctor
from offbeat.deploy.hosts import read_hosts
from offbeat.runtime.api import api
from offbeat.runtime.api.plots import called
from offbeat.runtime.base.errors import (
    ComputeError,
    ConfigError,
    Diverged,
    OffbeatError,
    StorageError,
    nearest,
)
from offbeat.runtime.base.logs import at_terminal, telling
from offbeat.runtime.commands import network as net
from offbeat.runtime.commands.strict import StrictGroup
from offbeat.runtime.commands.studies import mount
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.experiment.experiment import Experiment, from_table, read
from offbeat.runtime.experiment.metrics import METRICS, said
from offbeat.runtime.experiment.overrides import change
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.checkpoint import write_whole
from offbeat.topologies import TOPOLOGIES, WEIGHTS, facts
from offbeat.workers.data import BUNDLED, TAKEN
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.speeds import SPEEDS
from offbeat.workers.tasks import TASKS
from offbeat.workers.work import INNERS, WORK

INTERRUPTED = 130
THREADS = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}  # the user's word on it
RUNS = Path("runs")
LISTS = {
    "algorithms": ALGORITHMS,
    "tasks": TASKS,
    "work": WORK,
    "inners": INNERS,
    "speeds": SPEEDS,
    "partitions": PARTITIONS,
    "compressors": COMPRESSORS,
    "topologies": TOPOLOGIES,
    "weights": WEIGHTS,
    "engines": ENGINES,
}

app = typer.Typer(
    cls=StrictGroup,
    help="Asynchronous and decentralised optimisation on fleets of unequal workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WIDE = 140  # characters a line, where no terminal says
console = Console(width=None if at_terminal() else WIDE)
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as fleet.workers=20."),
]

Engine = Annotated[
    str | None, typer.Option(help='Where jobs are computed: virtual, "ray(workers_per_actor=4)".')
]


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="An experiment (TOML).")] = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(help='A method, as shuffled or "pure(lr=0.5)"; several are compared.'),
    ] = None,
    task: Annotated[str | None, typer.Option(help="As logistic:digits or quadratic(5).")] = None,
    topology: Annotated[
        list[str] | None, typer.Option(help="Of gossip, as ring:16; several are compared.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Of gossip: synchronous, asynchronous, or both.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="How many workers.")] = None,
    speeds: Annotated[
        str | None, typer.Option(help='Seconds a job: "lognormal(1.0)", 1..10, ...')
    ] = None,
    stragglers: Annotated[
        str | None, typer.Option(help="2x10: two workers ten times slower.")
    ] = None,
    work: Annotated[
        str | None, typer.Option(help='What a job is: gradient, "local-steps(adamw, steps=50)".')
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Stop after so many server steps, or rounds.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after virtual seconds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    engine: Engine = None,
    clock: Annotated[
        str | None, typer.Option(help="What orders arrivals: virtual or real.")
    ] = None,
    pace: Annotated[
        float | None, typer.Option(help="Real seconds a second of the fleet's, on a real clock.")
    ] = None,
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
        "topology": topology,
        "mode": mode,
        "fleet.workers": workers,
        "fleet.speeds": speeds,
        "fleet.stragglers": stragglers,
        "work": work,
        "stop.steps": steps,
        "stop.seconds": seconds,
        "seed": seed,
        "engine": engine,
        "clock": clock,
        "pace": pace,
    }
    given = {key: value for key, value in named.items() if value is not None}
    if file is None:
        table: dict[str, Any] = {}
        change(table, given, overrides or [])
        experiments, stem = from_table(table, ours=True), "run"
    else:
        if clash := [key for key in ("task", "algorithm", "topology", "mode") if key in given]:
            raise ConfigError(
                f"{file} has its own {clash[0]}; change a key with --set {clash[0]}.KEY=VALUE"
            )
        experiments, stem = read(file, given, overrides or []), file.stem
    if overwrite and out is None:
        raise ConfigError("--overwrite needs --out: it says what may be replaced")
    folder = out or _fresh(stem)
    with _replaced(folder) if overwrite else nullcontext():
        if len(experiments) == 1:
            _go_on({str(experiments[0].algorithm.spec.name): folder}, folder, experiments[0])  # type: ignore[union-attr]
        else:
            _go_on(_prepare_all(experiments, folder), folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another end, as stop.steps=20000."),
    ] = None,
    engine: Engine = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Though settings or files are not those of the run.")
    ] = False,
) -> None:
    """Go on with a run that was stopped; it ends as if it had not been."""
    parts = _parts(folder)
    labels = {part.name: part for part in parts} or {folder.name: folder}
    served = net.own_engine(folder / "experiment.toml") and engine is None
    with telling("text") if served else nullcontext():  # it may wait for others
        _go_on(labels, folder, overrides=overrides, engine=engine, changed=changed)


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Run a recorded run again from its trace and compare the models bit for bit."""
    for part in _parts(folder) or [folder]:
        replayed = api.replay(part).x
        recorded = api.recorded(part)
        if not np.array_equal(recorded, replayed):
            apart = float(np.abs(recorded - replayed).max())
            raise StorageError(f"{part}: the replay differs from the run (by up to {apart:.3g})")
        _say(f"{part}: the replay ends at the same bits ({len(replayed)} parameters)")


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
    console.print(str(made.spec), style="bold", highlight=False, markup=False)
    console.print(table)
    from offbeat.runtime.api.plots import draw_topology

    path = out or RUNS / f"topology-{made.spec.name}-{made.n}.png"
    drawn = draw_topology(made, path, rounds)
    _say(f"picture: {drawn}")


def _said(value: Any) -> str:
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}"


@app.command("list")
def list_(what: Annotated[str, typer.Argument(help=", ".join(LISTS) + " or data")]) -> None:
    """List what can be named."""
    if what == "data":
        for name, about in BUNDLED.items():
            console.print(f"[bold]{name}[/]  {about}", highlight=False)
        _say(f"or {TAKEN}")
        return
    if what not in LISTS:
        raise ConfigError(f'cannot list "{what}"{nearest(what, [*LISTS, "data"])}')
    for name, arguments, about in LISTS[what].describe():
        console.print(f"[bold]{name}[/]({arguments})", highlight=False, soft_wrap=True)
        console.print(f"    {about}", highlight=False, soft_wrap=True)


def _fresh(stem: str) -> Path:
    number = 1
    while (folder := RUNS / f"{stem}-{number:03d}").exists():
        number += 1
    return folder


@contextmanager
def _replaced(folder: Path) -> Iterator[None]:
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
    parts = _parts(folder)
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


def _parts(folder: Path) -> list[Path]:
    """The run folders of a comparison, in its order."""
    try:
        return [folder / line for line in (folder / "runs.txt").read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return []


def _prepare_all(experiments: Sequence[Experiment], folder: Path) -> dict[str, Path]:
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


def _go_on(
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
            _say(f"{label}: ended early, no job is left that will ever come back")
        counts = [f"{result.facts[k]} {k}" for k in JOBS if result.facts.get(k)]
        if counts:
            _say(f"{label}: jobs {', '.join(counts)}")
        if lost := result.facts.get("messages_lost"):
            _say(f"{label}: {lost:,} of {result.facts['messages']:,} messages lost")
    if any(result.reason == "interrupted" for result in results.values()):
        _say(f"interrupted; go on with: offbeat resume {folder}")
        raise typer.Exit(INTERRUPTED)
    drawn = picture(list(results.values()), folder / "picture.png", list(results))
    _say(f"picture: {drawn}")


def _say(text: str) -> None:
    """Plain text, on one line: paths are to be copied."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


# In the order in which --help lists them.
mount(app)
net.mount(app, _go_on, _fresh, read_hosts)
app.command()(doctor)
app.add_typer(deploy, name="deploy")


def main() -> None:
    """Entry point: one sentence and an exit code for every mistake."""
    for number in range(3):  # closed, what is opened next would be taken for a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if not THREADS & os.environ.keys():  # small products gain nothing from threads, and spin
        threadpool_limits(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is not loaded yet
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
    except MemoryError as error:  # numpy says of what size
        Console(stderr=True, soft_wrap=True).print(
            f"offbeat: not enough memory: {error}", highlight=False, markup=False
        )
        sys.exit(OffbeatError.exit_code)


if __name__ == "__main__":
    main()
