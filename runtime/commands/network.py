"""The commands of runs over a network: serve, join, peer, status, keys."""

import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import zmq
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from offbeat.algorithms.gossip import Gossip
from offbeat.deploy.hosts import read_hosts
from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.base.logs import FORM, telling
from offbeat.runtime.commands.runs import INTERRUPTED, fresh, go_on
from offbeat.runtime.experiment.engines import ENGINES, Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.transport import keys, sockets

PORT = 5555
ASK_S = 5.0  # for a server to answer
Keys = Annotated[
    Path | None,
    typer.Option("--keys", envvar="OFFBEAT_KEYS", help="A folder of keys; see offbeat keys."),
]
Form = Annotated[
    str,
    typer.Option("--log", envvar=FORM, help="text; or json: one object a line, on standard error."),
]
Saves = Annotated[
    int | None, typer.Option(help="Saves that fail in a row, on a full disk, before it ends.")
]
Metrics = Annotated[
    str, typer.Option(help="Where Prometheus can read: a port of this machine, or host:port.")
]
Address = Annotated[str, typer.Argument(help="Of the server, as tcp://host:5555.")]
Folder = Annotated[
    Path, typer.Option("--keys", envvar="OFFBEAT_KEYS", help="The folder of the keys.")
]
Name = Annotated[str, typer.Argument(help="Of the node.")]

keyring = typer.Typer(help="Who may take part in a run over a network.", no_args_is_help=True)


@keyring.command("new")
def new(name: Name, folder: Folder = Path("keys")) -> None:
    """Make a pair of keys; "server" is the server's name."""
    path = keys.new(folder, name)
    typer.echo(f"{path}: {keys.show(folder, name)}")


@keyring.command("show")
def show(name: Name, folder: Folder = Path("keys")) -> None:
    """Print a public key."""
    typer.echo(keys.show(folder, name))


@keyring.command("authorize", context_settings={"ignore_unknown_options": True})  # keys of "-..."
def authorize(
    name: Name,
    key: Annotated[str, typer.Argument(help="Its public key, as offbeat keys show prints it.")],
    folder: Folder = Path("keys"),
) -> None:
    """Let a node in; to revoke that, remove the file."""
    typer.echo(f"{keys.authorize(folder, name, key)}: {name} may take part")


def own_engine(file: Path) -> dict[str, Any]:
    """The table of the engine that ``file`` names, if it is this one, else an empty one."""
    from offbeat.runtime.experiment.experiment import make_part

    try:
        own = tomllib.loads(file.read_text()).get("engine", "")
    except (OSError, ValueError):  # read says what is wrong with the file
        return {}
    try:
        spec = make_part(ENGINES, own).spec if own else None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return spec.table() if spec is not None and spec.name == "zmq" else {}


def serving(file: Path, given: dict[str, Any], overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """The experiment of ``file`` with an engine that listens, and that engine's table."""
    from offbeat.runtime.experiment.experiment import read

    table = own_engine(file) or {"name": "zmq", "bind": f"tcp://127.0.0.1:{PORT}"}
    table |= {"processes": 0} | given
    found = read(file, {"engine": table}, overrides)
    if len(found) > 1:
        raise ConfigError(f"{file}: is a comparison of {len(found)} runs; serve one at a time")
    if isinstance(found[0].algorithm, Gossip):
        raise ConfigError(f"{file}: a gossip method has no server; see offbeat peer")
    return found[0], table


def _saves(most: int | None) -> list[str]:
    return [] if most is None else [f"record.max_failed_saves={most}"]


def serve(
    file: Annotated[Path, typer.Argument(help="An experiment (TOML).")],
    bind: Annotated[str | None, typer.Option(help="Where to listen: tcp://0.0.0.0:5555.")] = None,
    folder: Keys = None,
    processes: Annotated[int, typer.Option(help="Workers to begin on this machine.")] = 0,
    suspect_after_s: Annotated[
        float | None, typer.Option(help="Silence after which a worker is suspected.")
    ] = None,
    max_idle_s: Annotated[
        float | None, typer.Option(help="Without workers for so long, end.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="As for run; record.save_every_s=5 loses less than 30 s where it is killed.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; a run that is there goes on.")
    ] = None,
    max_failed_saves: Saves = None,
    metrics: Metrics = "",
    form: Form = "text",
) -> None:
    """Serve an experiment to workers that join, or go on with one that was stopped."""
    options = {
        "bind": bind,
        "keys": str(folder) if folder else None,
        "processes": processes,
        "suspect_after_s": suspect_after_s,
        "most_idle_s": max_idle_s,
        "metrics": metrics or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    from offbeat.runtime.api.api import load_experiment
    from offbeat.runtime.run.folders import check_given

    with telling(form):
        saves = _saves(max_failed_saves)
        experiment, table = serving(file, given, (overrides or []) + saves)
        place = out or fresh(file.stem)
        parts = {str(experiment.algorithm.spec.name): place}
        if (place / "experiment.toml").exists():
            check_given(place, load_experiment(place), experiment)
            go_on(parts, place, engine=table, overrides=saves)
        else:
            go_on(parts, place, experiment)


def join(
    address: Address,
    name: Annotated[str, typer.Option(help="Of this worker, and of its key.")] = "",
    folder: Keys = None,
    device: Annotated[
        str, typer.Option(help="Where a torch task such as lm computes: cpu, cuda:0, ...")
    ] = "cpu",
    max_wait_s: Annotated[
        float | None, typer.Option(help="Without a server for so long, give up.")
    ] = None,
    metrics: Metrics = "",
    form: Form = "text",
) -> None:
    """Work for a server until its run is over; it is waited for, and found again."""
    from offbeat.runtime.on_zeromq.worker import Worker

    with telling(form):
        Worker(address, name, folder, device, max_wait_s, metrics).run()


def peer(
    file: Annotated[Path, typer.Argument(help="An experiment (TOML) of a gossip method.")],
    hosts: Annotated[Path, typer.Option(help="The host file: all nodes, and their addresses.")],
    node: Annotated[str, typer.Option(help="Which of them this is, by its name.")],
    folder: Keys = None,
    out: Annotated[
        Path | None, typer.Option(help="Its own folder (else runs/NAME-NODE); it goes on.")
    ] = None,
    bind: Annotated[
        str, typer.Option(help="Where to listen, if not at the address in the host file.")
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="Where a torch task computes, if not as in the host file.")
    ] = None,
    suspect_after_s: Annotated[
        float | None,
        typer.Option(help="Silence after which a neighbour is suspected; alike at all."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for run.")
    ] = None,
    max_failed_saves: Saves = None,
    metrics: Metrics = "",
    form: Form = "text",
) -> None:
    """Be one node of a gossip run; started again, it returns to the run."""
    from offbeat.runtime.on_zeromq.alike import PeerAddress, alone
    from offbeat.runtime.on_zeromq.peer import PeerProcess

    with telling(form):
        listed = read_hosts(hosts)
        own = listed.node(node)
        experiment = _gossip(file, (overrides or []) + _saves(max_failed_saves))
        seats = {one.name: PeerAddress(one.name, one.endpoint) for one in listed.nodes()}
        topology = experiment.topology
        placed = topology.seated(seats) if topology else [*seats.values()]
        if suspect_after_s is None:
            usual = Liveness.suspect_after_s
            suspect_after_s = getattr(experiment.engine, "suspect_after_s", usual)
        if not bind:
            bind = own.endpoint if folder is None else f"tcp://*:{own.port}"
        reason = PeerProcess(
            alone(experiment),
            placed,
            placed.index(seats[node]),
            out or Path("runs") / f"{file.stem}-{node}",
            bind=bind,
            keys_folder=folder,
            device=device or own.device,
            suspect_after_s=suspect_after_s,
            metrics=metrics,
        ).run()
    typer.echo(f"{node}: the run is over ({reason})")
    if reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _gossip(file: Path, overrides: list[str]) -> Any:
    """The one experiment of ``file``, under a real clock."""
    from offbeat.runtime.experiment.experiment import read

    engine = own_engine(file) or "zmq"
    experiments = read(file, {"engine": engine, "clock": "real"}, overrides)
    if len(experiments) > 1:
        raise ConfigError(f"{file}: is a comparison of {len(experiments)} runs; take one at a time")
    return experiments[0]


def status(
    address: Address,
    folder: Keys = None,
    name: Annotated[
        str, typer.Option(help="Of this node's key (else the server's, or the only one).")
    ] = "",
    other: Annotated[
        str, typer.Option("--peer", help="Whose key the other side has, where it is a peer.")
    ] = keys.SERVER,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show who works for a server, or whom a peer hears, and how it goes."""
    with asking(address, folder, name, other) as ask:
        if as_json:
            typer.echo(json.dumps(ask()))
        elif not watch:
            Console().print(shown(ask()))
        else:
            with Live(shown(ask())) as live:
                while True:
                    time.sleep(1.0)
                    live.update(shown(ask()))


def _peers(status: dict[str, Any]) -> Table:
    loss = "" if status["loss"] is None else f"loss {status['loss']:.4g}, "
    title = (
        f"{status['node']}: {status['state']}, round {status['round']:,}, {loss}"
        f"{status['bytes'] / 1e6:.3g} MB sent, incarnation {status['incarnation']}"
    )
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    for head in ("neighbour", "where", "state", "round", "silent s", "waiting"):
        table.add_column(
            head, justify="left" if head in ("neighbour", "where", "state") else "right"
        )
    for row in status["neighbours"]:
        table.add_row(
            row["node"],
            row["where"],
            row["state"],
            f"{row['round']:,}",
            f"{row['silent_s']:.1f}",
            str(row["waiting"]),
        )
    return table


class asking:
    """A connection to a server; as a context it gives the function that asks how the run is."""

    def __init__(
        self, address: str, folder: Path | None, name: str, other: str = keys.SERVER
    ) -> None:
        own = None
        if folder:
            key = keys.server_key(folder) if other == keys.SERVER else keys.public(folder, other)
            if not name and (folder / f"{keys.SERVER}.key_secret").exists():
                name = keys.SERVER
            own = keys.identity(folder, name), key
            name = own[0].name
        self._address, self._context = address, zmq.Context()
        self._socket = sockets.limited(self._context, zmq.DEALER, Liveness())
        self._socket.linger = 0
        if own is not None:
            keys.as_client(self._socket, *own)
        self._name = name or keys.SERVER
        self._reader = wire.Reader("", say.GREETING)

    def __enter__(self) -> Callable[[], dict[str, Any]]:
        sockets.connected(self._socket, self._address)
        return self._ask

    def __exit__(self, *error: object) -> None:
        self._context.destroy(0)

    def _ask(self) -> dict[str, Any]:
        (parcel,) = wire.parcels("ask", say.Ask())
        end_s = time.monotonic() + ASK_S
        while time.monotonic() < end_s:
            if not self._socket.poll(50, zmq.POLLOUT):
                continue
            self._socket.send_multipart(wire.pack(parcel, run="", node=self._name, incarnation=0))
            if self._socket.poll(round(ASK_S * 1000)):
                frames = self._socket.recv_multipart(copy=False)
                message = self._reader.read([frame.buffer for frame in frames])
                if message.head.kind == "status":
                    found = json.loads(message.body.text)
                    assert isinstance(found, dict)
                    return found
        raise ComputeError(
            f"{self._address}: nobody answers within {ASK_S:.0f} s; is the address right, and "
            "has it listed this node's key under this name?"
        )


def _plain(text: str) -> str:
    """What a node said of itself, without a meaning for the terminal."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def shown(status: dict[str, Any]) -> Table:
    """A server's or a peer's answer as a table."""
    if "neighbours" in status:
        return _peers(status)
    title = (
        f"{status['jobs']:,} jobs done, step {status['step']:,}, {status['out']} out, "
        f"{len(status['workers'])} of {status['slots']} workers; server {status['incarnation']}"
    )
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    heads = ("worker", "node", "where", "state", "jobs", "jobs/s", "staleness", "loss", "MB/s")
    for head in heads:
        table.add_column(head, justify="left" if head in heads[1:4] else "right")
    for row in status["workers"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4g}"
        table.add_row(
            str(row["worker"]),
            _plain(row["node"]),
            _plain(row["where"]),
            row["state"],
            f"{row['jobs']:,}",
            f"{row['jobs_s']:.4g}",
            f"{row['staleness']:.0f}",
            loss,
            f"{row['bytes_s'] / 1e6:.3g}",
        )
    return table
