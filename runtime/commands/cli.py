"""The command line."""

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from threadpoolctl import threadpool_limits

from offbeat.algorithms.compression import COMPRESSORS
from offbeat.algorithms.gossip import ALGORITHMS
from offbeat.deploy.cli import deploy, doctor
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError, OffbeatError, StorageError, nearest
from offbeat.runtime.base.logs import telling
from offbeat.runtime.commands import network as net
from offbeat.runtime.commands.runs import (
    RUNS,
    console,
    fresh,
    go_on,
    parts_of,
    prepare_all,
    replaced,
    say,
)
from offbeat.runtime.commands.strict import StrictGroup
from offbeat.runtime.commands.studies import mount
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.experiment.experiment import from_table, read
from offbeat.runtime.experiment.overrides import change
from offbeat.topologies import TOPOLOGIES, WEIGHTS, facts
from offbeat.workers.data import BUNDLED, TAKEN
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.speeds import SPEEDS
from offbeat.workers.tasks import TASKS
from offbeat.workers.work import INNERS, WORK

THREADS = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}  # the user's word on it
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
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as fleet.workers=20."),
]

ALGORITHM = 'A method, as shuffled or "pure(lr=0.5)"; several are compared.'
TOPOLOGY = "Of gossip, as ring:16; several are compared."
MODE = "Of gossip: synchronous, asynchronous, or both."
JOB = 'What a job is: gradient, "local-steps(adamw, steps=50)".'
PACE = "Real seconds a second of the fleet's, on a real clock."
OUT = "A new folder for records and picture (else runs/NAME-NNN)."
EngineOption = Annotated[
    str | None, typer.Option(help='Where jobs are computed: virtual, "ray(workers_per_actor=4)".')
]


def option(help_: str, *names: str) -> Any:
    """An option of the command line."""
    return typer.Option(*names, help=help_)


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="An experiment (TOML).")] = None,
    algorithm: Annotated[list[str] | None, option(ALGORITHM)] = None,
    task: Annotated[str | None, option("As logistic:digits or quadratic(5).")] = None,
    topology: Annotated[list[str] | None, option(TOPOLOGY)] = None,
    mode: Annotated[list[str] | None, option(MODE)] = None,
    workers: Annotated[int | None, option("How many workers.")] = None,
    speeds: Annotated[str | None, option('Seconds a job: "lognormal(1.0)", 1..10, ...')] = None,
    stragglers: Annotated[str | None, option("2x10: two workers ten times slower.")] = None,
    work: Annotated[str | None, option(JOB)] = None,
    steps: Annotated[int | None, option("Stop after so many server steps, or rounds.")] = None,
    seconds: Annotated[float | None, option("Stop after virtual seconds.")] = None,
    seed: Annotated[int | None, option("Of everything that is drawn.")] = None,
    engine: EngineOption = None,
    clock: Annotated[str | None, option("What orders arrivals: virtual or real.")] = None,
    pace: Annotated[float | None, option(PACE)] = None,
    overrides: Set = None,
    out: Annotated[Path | None, option(OUT)] = None,
    overwrite: Annotated[bool, option("Replace a run that is in --out.", "--overwrite")] = False,
) -> None:
    """Run an experiment, from a file or from options, and draw it."""
    named: dict[str, Any] = {
        "task": task,
        "algorithm": algorithm,
        "topology": topology,
        "mode": mode,
        "work": work,
    }
    named |= {"engine": engine, "clock": clock, "pace": pace, "seed": seed}
    named |= {"fleet.workers": workers, "fleet.speeds": speeds, "fleet.stragglers": stragglers}
    named |= {"stop.steps": steps, "stop.seconds": seconds}
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
    folder = out or fresh(stem)
    with replaced(folder) if overwrite else nullcontext():
        if len(experiments) == 1:
            go_on({str(experiments[0].algorithm.spec.name): folder}, folder, experiments[0])  # type: ignore[union-attr]
        else:
            go_on(prepare_all(experiments, folder), folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another end, as stop.steps=20000."),
    ] = None,
    engine: EngineOption = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Though settings or files are not those of the run.")
    ] = False,
) -> None:
    """Go on with a run that was stopped; it ends as if it had not been."""
    parts = parts_of(folder)
    labels = {part.name: part for part in parts} or {folder.name: folder}
    served = net.own_engine(folder / "experiment.toml") and engine is None
    with telling("text") if served else nullcontext():  # it may wait for others
        go_on(labels, folder, overrides=overrides, engine=engine, changed=changed)


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Run a recorded run again from its trace and compare the models bit for bit."""
    for part in parts_of(folder) or [folder]:
        replayed = api.replay(part).x
        recorded = api.recorded(part)
        if not np.array_equal(recorded, replayed):
            apart = float(np.abs(recorded - replayed).max())
            raise StorageError(f"{part}: the replay differs from the run (by up to {apart:.3g})")
        say(f"{part}: the replay ends at the same bits ({len(replayed)} parameters)")


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
    say(f"picture: {drawn}")


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
        say(f"or {TAKEN}")
        return
    if what not in LISTS:
        raise ConfigError(f'cannot list "{what}"{nearest(what, [*LISTS, "data"])}')
    for name, arguments, about in LISTS[what].describe():
        console.print(f"[bold]{name}[/]({arguments})", highlight=False, soft_wrap=True)
        console.print(f"    {about}", highlight=False, soft_wrap=True)


# In the order in which --help lists them.
mount(app)
app.add_typer(net.keyring, name="keys")
for command in (net.serve, net.join, net.peer, net.status):
    app.command()(command)
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
