"""What every recipe is told: which run, in which shape, by which nodes, and what they execute."""

import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from offbeat.algorithms.gossip import Gossip
from offbeat.deploy.hosts import MOST_HOSTS, MOST_NAME, PORT, Hosts, endpoint, name
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Reads
from offbeat.runtime.experiment import files
from offbeat.runtime.experiment.experiment import Experiment, read, read_toml
from offbeat.runtime.protocol.channel import WINDOW
from offbeat.runtime.protocol.wire import PIECE_BYTES
from offbeat.topologies.saved import SAVED
from offbeat.workers.tasks import device as devices
from offbeat.workers.work import OwnLoop

SERVER = "server"  # the name of its keys
SHIPPED = "files"  # the folder of those that the experiment reads
WORD = re.compile(r"[A-Za-z0-9_./~+-]+")
IMAGE = re.compile(
    r"[a-z0-9][a-z0-9.-]*(:\d{1,5})?(/[a-z0-9][a-z0-9._-]*)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"
)
DEVICES = ("cpu", "cuda")
LEAST_MB = 4096  # of memory: for Python, torch, and a task without files


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One run on many machines.

    Args:
        name: of the run, in files, units and objects.
        text: of the experiment's file.
        peers: whether it is gossip: peers only, without a server.
        engine: that the experiment names.
        participants: names of the workers, or peers, in the order of their numbers.
        device: of each of them, cpu or cuda.
        port: that the server, or a peer, listens on.
        offbeat: the program, as a name or path.
        experiment: where nodes find the experiment's file.
        hosts: the machines, where they are known beforehand.
        files: what the experiment reads: where it lies in what is deployed -> where it is here.
        notes: what its user has to see to.
        memory_mb: that a node is stopped at: behind the bounds that it keeps by itself.
    """

    name: str
    text: str
    peers: bool
    engine: str
    participants: tuple[str, ...]
    device: str = "cpu"
    port: int = PORT
    offbeat: str = "offbeat"
    experiment: str = "experiment.toml"
    hosts: Hosts | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory_mb: int = LEAST_MB

    @property
    def cuda(self) -> bool:
        """Whether nodes compute on GPUs."""
        return self.device != "cpu"

    @property
    def about(self) -> str:
        """Who takes part, in words."""
        n = len(self.participants)
        return f"{n} peers" if self.peers else f"a server and {n} workers"

    @property
    def nodes(self) -> tuple[str, ...]:
        """All that need keys; the server is first."""
        return self.participants if self.peers else (SERVER, *self.participants)

    def counted_hosts(self, address: Callable[[str], str]) -> str:
        """A host file of the participants, each on a machine of its own."""
        device = "cuda:0" if self.cuda else "cpu"
        hosts = [
            {"name": node, "address": address(node), "port": self.port, "device": device}
            for node in self.participants
        ]
        return tomli_w.dumps({"hosts": hosts})

    def serve(self, port: int | str, keys: str, out: str) -> list[str]:
        """Arguments of the server's command."""
        bind = f"tcp://*:{port}"  # over IPv4 and IPv6
        return ["serve", self.experiment, "--bind", bind, "--keys", keys, "--out", out]

    def join(self, server: str, node: str, keys: str, device: str | None = None) -> list[str]:
        """Arguments of a worker's command."""
        on = device or ("cuda:0" if self.cuda else "cpu")
        return ["join", server, "--keys", keys, "--name", node, "--device", on]

    def peer(self, hosts: str, node: str, keys: str, out: str) -> list[str]:
        """Arguments of a peer's command; its device is in the host file."""
        return [
            "peer",
            self.experiment,
            "--hosts",
            hosts,
            "--node",
            node,
            "--keys",
            keys,
            "--out",
            out,
        ]


def as_run(file: Path) -> tuple[str, list[Experiment]]:
    """The engine that ``file`` names, and its experiments as ``serve`` and ``peer`` run them.

    A file that names none, or the virtual one, is one for machines as it is.

    Raises:
        ConfigError: as ``read``.
    """
    try:
        given = tomllib.loads(file.read_text()).get("engine", "virtual")
    except (OSError, ValueError):
        return "virtual", read(file)  # which says what is wrong
    named = str(given.get("name") if isinstance(given, Mapping) else given).partition("(")[0]
    return named, read(file, {"engine": "zmq"} if named == "virtual" else None)


def plan(
    file: Path,
    *,
    nodes: int | Hosts | None = None,
    run: str | None = None,
    prefix: tuple[str, str] = ("w", "n"),
    engine: str = "zmq",
    device: str = "cpu",
    port: int = PORT,
    offbeat: str = "offbeat",
    experiment: str = "experiment.toml",
    place: str = SHIPPED,
) -> Deployment:
    """What is to be run, checked.

    Args:
        file: the experiment; of one run.
        nodes: how many participants, or the machines; the experiment's own number where it is
            not said. Of gossip there are exactly as many as its graph has, of workers at most.
        run: the name of the run; the file's, where it is not said.
        prefix: of the names of workers, and of peers, that are counted; {run} is the run's.
        engine: that the recipe is for.
        device, port, offbeat, experiment: see ``Deployment``.
        place: where nodes have the files that the experiment reads; {run} is the run's name.

    Raises:
        ConfigError: what cannot be deployed, and why.
    """
    own, experiments = as_run(file)
    if len(experiments) > 1:
        raise ConfigError(
            f"{file}: describes {len(experiments)} runs; give a file of one, with one algorithm, "
            "topology and mode"
        )
    what = experiments[0]
    notes = _engine_notes(file, what, own, engine, device)
    called = _name(run or _named(file))
    peers = isinstance(what.algorithm, Gossip)
    names = _participants(file, what, nodes, prefix[peers].format(run=called), own == "ray")
    if own != "ray" and len(names) < what.fleet.workers:  # actors find room where there is some
        away = what.fleet.workers - len(names)
        notes.append(
            f"the fleet has {what.fleet.workers} workers; {away} of them are away until they join"
        )
    if device not in DEVICES:
        raise ConfigError(f'--device must be cpu or cuda, not "{device}"')
    listed = [node.device for node in nodes.nodes()] if isinstance(nodes, Hosts) else []
    for used in (device, *listed):
        _check_device(file, what, used)
    text, shipped = _shipped(file, place.format(run=called))
    return Deployment(
        name=called,
        text=text,
        peers=peers,
        engine=own,
        participants=names,
        device=device,
        port=port,
        offbeat=word(offbeat, "--offbeat"),
        experiment=experiment,
        hosts=nodes if isinstance(nodes, Hosts) else None,
        files=shipped,
        notes=tuple(notes),
        memory_mb=_memory_mb(what, shipped.values()),
    )


def _participants(
    file: Path, what: Experiment, nodes: int | Hosts | None, stem: str, on_ray: bool
) -> tuple[str, ...]:
    """The names of who takes part: of the machines, or counted after ``stem``."""
    peers, size = isinstance(what.algorithm, Gossip), what.fleet.workers
    if isinstance(nodes, Hosts):
        names = tuple(node.name for node in nodes.nodes())
        if not peers:
            nodes.serving()
    else:
        each = what.engine.spec.options["workers_per_actor"] if on_ray else 1  # type: ignore[union-attr]
        count = math.ceil(size / each) if nodes is None else nodes
        if not 1 <= count <= MOST_HOSTS:
            raise ConfigError(f"--nodes must be from 1 to {MOST_HOSTS}, not {count}")
        names = tuple(f"{stem}{number}" for number in range(count))
        _name(names[-1])
    if peers and not on_ray:
        if len(names) != size:
            raise ConfigError(
                f"{file}: the graph has {size} nodes, but {len(names)} are to take part; gossip "
                "needs exactly as many"
            )
        if what.topology is not None:
            names = tuple(what.topology.seated(dict(zip(names, names, strict=True))))
    if len(names) > size:
        raise ConfigError(
            f"{file}: the fleet has {size} workers, so of {len(names)} nodes "
            f"{len(names) - size} would have nothing to do; set fleet.workers"
        )
    return names


def _shipped(file: Path, place: str) -> tuple[str, dict[str, Path]]:
    """An experiment's text for nodes that have its files in ``place``, and what is to be there.

    Each text that names files has a folder that is called by what is in them, so that nothing that
    was there before is taken for one.
    """
    sources: dict[str, Path] = {}

    def moved(given: str, reads: Reads) -> str:
        if not (found := reads.found(given)):
            return given  # who reads it says so
        (prefix, path), root = reads.parts(given), reads.root(given)
        folder = files.content(given, reads)[:12]
        sources.update({f"{SHIPPED}/{folder}/{one.relative_to(root)}": one for one in found})
        return (
            f"{prefix}{Path(place, folder, Path(path).expanduser().absolute().relative_to(root))}"
        )

    made = files.rewritten(read_toml(file), moved)
    graph = made.get("topology")
    if isinstance(graph, dict) and graph.get("name") == SAVED:  # a run's, which lies beside it
        made["topology"] = graph | {"path": moved(graph["path"], Reads())}
    made.pop("files", None)  # of paths that are none there
    return (tomli_w.dumps(made) if sources else file.read_text()), sources


def _check_device(file: Path, what: Experiment, device: str) -> None:
    """Raise ConfigError where nodes would hold a GPU that nothing computes on."""
    if isinstance(what.work, OwnLoop):  # whose model has a device of its own
        return
    try:
        devices.check(what.task, device)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _memory_mb(what: Experiment, shipped: Collection[Path]) -> int:
    """For a node: files as arrays, and of each participant models, or what it has on its way."""
    model = 8 * what.task.dim
    each = max(4 * model, WINDOW * min(model, PIECE_BYTES))
    nbytes = sum(path.stat().st_size for path in shipped)
    return LEAST_MB + (what.fleet.workers * each + 8 * nbytes) // 2**20


def _engine_notes(file: Path, what: Experiment, own: str, wanted: str, device: str) -> list[str]:
    if wanted != "ray":
        if own == "ray":
            raise ConfigError(f'{file}: has engine = "ray"; deploy it with kuberay, or take "zmq"')
        return []
    options = what.engine.spec.options if what.engine.spec else {}
    if own != "ray":
        raise ConfigError(
            f'{file}: kuberay runs what has engine = "ray"; this has "{own}"; take '
            'engine = { name = "ray", address = "auto" }'
        )
    if options["address"] != "auto":
        raise ConfigError(
            f"{file}: the engine begins a Ray of its own; to join the cluster, give [engine] "
            'address = "auto"'
        )
    if device != "cpu" and not (options["num_gpus"] and options["device"] != "cpu"):
        raise ConfigError(
            f"{file}: for actors to compute on the GPUs of --device {device}, give [engine] "
            'num_gpus = 1 and device = "cuda"'
        )
    if not options["num_cpus"]:
        return ["engine.num_cpus is 0, so actors may be put on the head too; give it 1"]
    return []


def _named(file: Path) -> str:
    """The name a file suggests.

    >>> _named(Path("examples/Async_Local.toml"))
    'async-local'
    """
    return re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:MOST_NAME].rstrip("-")


def _name(text: str) -> str:
    try:
        return name(text)
    except ConfigError as error:
        raise ConfigError(f"{error}; give another, with --name") from None


def word(text: str, option: str) -> str:
    """``text``, which shells, units and YAML take as it is; for paths and names of programs.

    >>> word("/opt/my runs", "--dir")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: --dir: "/opt/my runs" has characters that scripts would \
have to quote; take letters, digits and _ . / ~ + -
    """
    if not WORD.fullmatch(text) or text.startswith("-"):
        raise ConfigError(
            f'{option}: "{text}" has characters that scripts would have to quote; take letters, '
            "digits and _ . / ~ + -"
        )
    return text


def image(text: str) -> str:
    """``text``, if it can name a container image."""
    if not IMAGE.fullmatch(text):
        raise ConfigError(f'--image: "{text}" names no image; write registry/name:tag')
    return text


def server_endpoint(hosts: Hosts) -> str:
    """Where workers find the server."""
    host = hosts.serving()
    return endpoint(host.address, host.port)
