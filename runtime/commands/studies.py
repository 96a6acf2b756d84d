"""Commands of studies: ``study``, ``report``, ``watch`` and ``whatif``."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.logs import at_terminal
from offbeat.runtime.experiment.overrides import apply_override
from offbeat.runtime.studies import study as studies
from offbeat.runtime.studies import table as tables
from offbeat.runtime.studies.lines import read_cells

WIDE = 140  # characters a line, where no terminal says
INTERRUPTED = 130
MOST_SHOWN = 60  # settings printed; the table has all
console = Console(width=None if at_terminal() else WIDE)


def mount(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    for command in (study, report, watch, whatif):
        app.command()(command)


def study(
    file: Annotated[Path, typer.Argument(help="A study (TOML).")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of its results (else runs/NAME); it grows.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Cells at a time.", min=1)] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="As the section quick of the file says.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    folders: Annotated[
        bool, typer.Option("--folders", help="Keep a run folder, with trace, of every cell.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="Where cells run: processes, ray or ray:ADDRESS.")
    ] = "processes",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file."),
    ] = None,
) -> None:
    """Run the cells of a study that are not done yet; write its table and its report."""
    made = studies.Study.read(file, overrides or [], quick)
    if out is None and (not made.name.strip(".") or "/" in made.name):
        raise ConfigError(f'no folder can be called "{made.name}"; say where with --out')
    folder = out or Path("runs") / made.name
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _Bar(made.name) as progress:
            cells = studies.run(
                made,
                folder,
                jobs=jobs,
                engine=engine,
                retry=retry,
                folders=folders,
                progress=progress,
            )
    except KeyboardInterrupt:
        done = len(read_cells(folder))
        _say(f"interrupted; {done:,} runs are done and stay; go on with the same command")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = tables.rows(made, cells)
    written = [tables.write(rows, folder / f"results.{kind}") for kind in ("csv", "parquet")]
    _print(made, rows)
    if failed := [row for row in rows if row["error"]]:
        _say(f"{len(failed)} of {len(rows)} cells failed; the first: {failed[0]['error']}")
    medians = f"; above, medians over {len(made.seeds)} seeds" if len(made.seeds) > 1 else ""
    _say(f"table: {written[0]}, .parquet ({len(rows):,} rows{medians})")
    from offbeat.runtime.report.report import write

    _say(f"report: {write([folder], folder / 'report.html')}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Runs, comparisons or studies.")],
    out: Annotated[
        Path | None, typer.Option(help="The page (else report.html in the first folder).")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Also a PNG and an SVG of each figure.")
    ] = True,
) -> None:
    """Write one self-contained HTML page about runs or studies."""
    from offbeat.runtime.report.report import write

    page = write(folders, out or folders[0] / "report.html", figures=figures)
    _say(f"report: {page}")
    if figures:
        _say(f"figures: {page.with_suffix('')}-figures")


def watch(
    folder: Annotated[Path, typer.Argument(help="A run, a comparison or a study.")],
    web: Annotated[
        bool, typer.Option("--web", help="Serve its report on this machine, refreshing.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of --web; 0: any that is free.", min=0)] = 0,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Follow a job that is running, until it ends or Ctrl-C."""
    from offbeat.runtime.report import watch as watching

    if web:
        watching.serve(folder, port, every, _say)
    else:
        watching.follow(folder, every, console)


def whatif(
    folder: Annotated[Path, typer.Argument(help="A recorded run.")],
    algorithm: Annotated[
        list[str] | None, typer.Option(help="A method to try, instead of the recorded one.")
    ] = None,
    topology: Annotated[list[str] | None, typer.Option(help="A graph to try.")] = None,
    workers: Annotated[
        list[str] | None, typer.Option(help="+2: two more; -1: one less; 16: so many.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="As accuracy=0.9 (else the loss that the run came to).")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Predictions of each candidate.", min=1)] = 3,
) -> None:
    """Predict the time to a target with other methods, graphs or workers from a recorded trace."""
    from offbeat.runtime.report.whatif import predict, shown

    goal: dict[str, Any] = {}
    if target is not None:
        apply_override(goal, target)
    found = predict(folder, algorithm or [], topology or [], workers or [], goal or None, seeds)
    console.print(shown(*found))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Bar:
    """Cells done and time left; as a context it gives ``study.Progress``."""

    def __init__(self, label: str) -> None:
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> studies.Progress:
        self._progress.start()
        bar = self._progress.add_task("", total=None, failed="")

        def show(done: int, of: int, failed: int) -> None:
            if done == 0:  # a new wave: tuning is over, or its next rung begins
                self._progress.reset(bar, total=of)
            said = f"{failed} failed" if failed else ""
            self._progress.update(bar, completed=done, total=of, failed=said)

        return show

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


SHOWN = {
    "steps_to_target": "steps to target",
    "seconds_to_target": "virtual s to target",
    "bytes_to_target": "MB to target",
    "floor": "last fifth",
    "loss": "loss",
    "gap": "gap",
}


def _print(made: studies.Study, rows: list[dict[str, Any]]) -> None:
    """Medians over the seeds, a line for each setting."""
    names = [*made.axes, *(key for group in made.zipped for key in group)]
    groups = tables.grouped(rows, names)
    tuned = list(made.tune.grid) if made.tune else []
    columns = [key for key in SHOWN if any(key in row for row in rows)]
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for key in [*names, *tuned]:
        shown.add_column(key)
    told = [tables.short([str(value) for value in column]) for column in zip(*groups, strict=True)]
    for key in columns:
        shown.add_column(SHOWN[key], justify="right", no_wrap=True)
    for at, group in enumerate(list(groups.values())[:MOST_SHOWN]):
        medians = []
        for key in columns:
            value = tables.median([row.get(key) for row in group])
            unit = 1e6 if key.startswith("bytes") else 1.0
            medians.append("" if value is None else f"{value / unit:,.4g}")
        best = [str(group[0].get(key, "")) for key in tuned]
        shown.add_row(*(column[at] for column in told), *best, *medians)
    console.print(shown)
    if len(groups) > MOST_SHOWN:
        _say(f"... and {len(groups) - MOST_SHOWN} more settings")


def _say(text: str) -> None:
    """Plain text, on one line: paths are to be copied."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
