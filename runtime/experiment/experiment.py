"""An experiment: a value that a TOML file, a command line or Python describes alike."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from offbeat.algorithms.base import completed
from offbeat.algorithms.gossip import Gossip
from offbeat.algorithms.gossip.contract import own_gossip
from offbeat.algorithms.server import ALGORITHMS, Algorithm
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import (
    MADE_BY_HAND,
    Count,
    Positive,
    Registry,
    Spec,
    parse_call,
    settings,
)
from offbeat.runtime.experiment import checks, files, metrics
from offbeat.runtime.experiment.checks import MODES
from offbeat.runtime.experiment.engines import ENGINES, Engine, virtual
from offbeat.runtime.experiment.overrides import change
from offbeat.runtime.experiment.settings import DEFAULT_STEPS, Evaluate, Stop
from offbeat.topologies import TOPOLOGIES, Topology, saved
from offbeat.topologies.saved import SAVED
from offbeat.workers.fleet import Fleet, Outage
from offbeat.workers.tasks import OWN_FILE, TASKS, Task
from offbeat.workers.work import WORK, OwnLoop, Work, gradient

T = TypeVar("T")

EMULATED = {"speeds", "stragglers"}  # how fast workers are to seem
SAVING = "record.save_every_s", "record.max_failed_saves"


@settings
class Record:
    """What is kept besides the metrics.

    Args:
        trace: every arrival (needed for replay and the timeline).
        nodes: the loss at each node's model, of gossip on at most 200 nodes; slower.
        save_every_s: wall seconds between checkpoints of a run with a folder; the first comes
            after a thirtieth of that, and each after twice the time of the one before.
        max_failed_saves: of them in a row, on a full disk for instance, after which the run ends.
    """

    trace: bool = True
    nodes: bool = False
    save_every_s: Positive = 30.0
    max_failed_saves: Count = 10


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on.

    Args:
        task: what is minimised.
        algorithm: by which method.
        fleet: by which workers.
        topology: who talks to whom, where the method is one of gossip.
        mode: "synchronous" or "asynchronous" gossip; None: as the method can, synchronous first.
        replicas: see ``Rounds``.
        work: what a worker does with a job.
        stop, evaluate, record: see there.
        seed: of sampling, durations, permutations and the initial model.
        engine: where gradients are computed.
        clock: what orders arrivals, "virtual" or "real"; None: as is natural to the engine.
        pace: real seconds a second of the fleet's, under a real clock.
    """

    task: Task
    algorithm: Algorithm | Gossip
    fleet: Fleet
    topology: Topology | None = None
    mode: str | None = None
    replicas: str = "links"
    stop: Stop
    evaluate: Evaluate
    record: Record = field(default_factory=Record)
    work: Work = field(default_factory=gradient)
    seed: int = 0
    engine: Engine = field(default_factory=virtual)
    clock: str | None = None
    pace: float = 1.0

    def __post_init__(self) -> None:
        """What no part can see alone."""
        checks.refuse(checks.of_experiment(self))
        self.algorithm.check(self.fleet.workers)

    @property
    def real(self) -> bool:
        """Whether time is real."""
        return (self.clock or self.engine.clocks[0]) == "real"

    @property
    def asynchronous(self) -> bool:
        """Whether a gossip run has no rounds."""
        natural = isinstance(self.algorithm, Gossip) and not self.algorithm.synchronous
        return natural if self.mode is None else self.mode == "asynchronous"

    def table(self) -> dict[str, Any]:
        """The TOML form, complete; parts made by hand are named, but cannot be read back."""
        gossip, mine = {}, metrics.own(self.task)
        if self.topology is not None:
            gossip = {"replicas": self.replicas, "topology": _part(self.topology)}
            mode = self.mode
            if (
                mode is None and getattr(self.algorithm, "spec", None) is None
            ):  # nothing else says it
                mode = MODES[self.asynchronous]
            gossip |= {"mode": mode} if mode is not None else {}
        parts = {
            "seed": self.seed,
            "engine": _short(self.engine),
            **({"clock": self.clock} if self.clock is not None else {}),
            **({"pace": self.pace} if self.pace != 1.0 else {}),
            **gossip,
            "task": _part(self.task, **({"better": dict(mine)} if mine else {})),
            "algorithm": _part(self.algorithm),
            "fleet": _fleet_table(self.fleet),
            "work": _part(self.work),
        }
        parts = files.rewritten(parts, files.absolute)  # so that the run can go on from anywhere
        read = files.contents(parts)
        ends = {key: _given(getattr(self, key)) for key in ("stop", "evaluate", "record")}
        return parts | ({"files": read} if read else {}) | ends

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of what makes it this run: not its ends, its saves, its engine."""
        apart = ("stop.", "engine", "files.", *SAVING)
        table = files.rewritten(self.table(), files.content)
        if self.topology is not None and saved.own(self.topology):
            table["topology"] = saved.digest(self.topology)
        flat = files.flat(table)
        found = {key: value for key, value in flat if not key.startswith(apart)}
        found["clock"] = "real" if self.real else "virtual"
        for key in ("task", "algorithm", "work"):
            if found.get(f"{key}.name", "").startswith(MADE_BY_HAND):
                part = self.task.initial(self.seed) if key == "task" else getattr(self, key)
                with suppress(ConfigError):  # what no checkpoint could hold is known by its class
                    found[f"{key}.digest"] = trees.digest(part)
        known: dict[str, Any] = json.loads(json.dumps(found))  # as a checkpoint has it
        return known

    def files(self) -> list[Path]:
        """All that it reads."""
        named = files.named(self.table()).items()
        return [path for text, reads in named for path in reads.found(text)]

    def toml(self) -> str:
        """The text of experiment.toml."""
        return tomli_w.dumps(self.table())


# By which an object is known.
NEEDED = {
    "task": ("gradient",),
    "algorithm": ("arrive", "ask"),
    "topology": ("matrix",),
    "work": ("update",),
    "engine": ("clocks",),
}
# What an object of a user's own must have.
WHOLE = {
    "task": ("workers", "dim", "initial", "gradient", "evaluate"),
    "work": ("steps", "keep", "update"),
}
KEYS = [entry.name for entry in fields(Experiment)] + ["files"]


def read(
    path: Path, given: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> list[Experiment]:
    """The experiments of a TOML file: one for each algorithm, topology and mode in it.

    Args:
        path: the file.
        given: values for dotted keys, ``{"fleet.workers": 20}``.
        overrides: the same as text, ``"fleet.workers=20"``.

    Raises:
        ConfigError: naming the file, and every mistake in it.
    """
    table = read_toml(path)
    if "experiment" in table:
        raise ConfigError(f"{path}: is a study; begin it with: offbeat study {path}")
    try:
        change(table, given or {}, overrides)
        return from_table(table, ours=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; a graph that lies beside it is named by its whole path."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    topology = table.get("topology")
    if isinstance(topology, dict) and topology.get("name") == SAVED:
        there = Path(str(topology.get("path", ""))).expanduser()
        topology["path"] = str(path.parent.resolve() / there)
    return table


def from_table(table: Mapping[str, Any], *, ours: bool = False) -> list[Experiment]:
    """The experiments a table describes; all its mistakes are told at once.

    Args:
        table: of an experiment file.
        ours: whether a user of this machine wrote it, so that it may name code to run.
    """
    mistakes = [*_mistaken_keys(table)]
    files.check(table)
    attempt = _Attempts(mistakes)
    seed = table.get("seed", 0)
    stop = attempt(make_settings, Stop, table.get("stop", {"steps": DEFAULT_STEPS}))
    evaluate = attempt(make_settings, Evaluate, table["evaluate"]) if "evaluate" in table else None
    record = attempt(make_settings, Record, table.get("record", {}))
    work = attempt(make_part, WORK, table.get("work", "gradient"), seed=seed)
    engine = attempt(make_part, ENGINES, table.get("engine", "virtual"))
    given = table.get("fleet", {})
    live = engine is not None and table.get("clock", engine.clocks[0]) == "real"
    own = live and isinstance(work, OwnLoop)  # a user's loops, which are as fast as they are
    if own and isinstance(given, Mapping) and not EMULATED & given.keys():
        given = {**given, "speeds": "real"}
    fleet = attempt(make_fleet, given)
    algorithms = [attempt(make_part, ALGORITHMS, one) for one in _several(table, "algorithm", [])]
    topologies: list[Any] = [None]
    if "topology" in table and fleet is not None:
        extra = {"n": fleet.workers, "seed": seed}
        topologies = [
            attempt(make_part, TOPOLOGIES, one, **extra) for one in _several(table, "topology", [])
        ]
        sizes = {topology.n for topology in topologies if topology is not None}
        if isinstance(given, Mapping) and "workers" not in given and len(sizes) == 1:
            fleet = attempt(make_fleet, {**given, "workers": sizes.pop()})
    task: Any = None
    if not ours and _runs_code(table.get("task")):
        mistakes.append(f'task "{OWN_FILE}" runs a file, which nobody elsewhere may name')
    elif "task" in table and fleet is not None:
        task = attempt(make_part, TASKS, table["task"], workers=fleet.workers, seed=seed)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return [
        Experiment(
            task=task,
            algorithm=algorithm,
            fleet=fleet,
            topology=topology,
            mode=mode,
            replicas=table.get("replicas", "links"),
            work=work,
            stop=stop,
            evaluate=evaluate or Evaluate.sensible(stop),
            record=record,
            seed=seed,
            engine=engine,
            clock=table.get("clock"),
            pace=table.get("pace", 1.0),
        )
        for topology, algorithm, mode in product(
            topologies, algorithms, _several(table, "mode", None)
        )
    ]


def _mistaken_keys(table: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the keys alone."""
    yield from (f'unknown key "{key}"{nearest(key, KEYS)}' for key in table if key not in KEYS)
    examples = {"task": (TASKS, "logistic:digits"), "algorithm": (ALGORITHMS, "shuffled")}
    for key, (registry, example) in examples.items():
        if key not in table:
            yield (
                f'[{key}] is missing; for example {key} = "{example}", or --{key} {example} where '
                f"there is no file; known: {', '.join(registry)}"
            )
    for key in ("algorithm", "topology", "mode"):
        if table.get(key) == []:
            yield f"{key}: an empty list; name at least one"


class _Attempts:
    """Makes parts; what is wrong with one is added to ``mistakes``, and None stands for it."""

    def __init__(self, mistakes: list[str]) -> None:
        self._mistakes = mistakes

    def __call__(self, make: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except ConfigError as error:
            self._mistakes.append(str(error))
            return None


def _runs_code(task: Any) -> bool:
    if isinstance(task, str):
        return parse_call(task, TASKS.kind)[0] == OWN_FILE
    return isinstance(task, Mapping) and task.get("name") == OWN_FILE


def _several(table: Mapping[str, Any], key: str, default: Any) -> list[Any]:
    given = table.get(key, default)
    return given if isinstance(given, list) else [given]


def make_part(registry: Registry, given: Any, **extra: Any) -> Any:
    """A task, algorithm or topology from its text or table; else it is taken as it is."""
    if isinstance(given, str):
        return registry.parse(given, **extra)
    if isinstance(given, Mapping):
        return registry.table(given, **extra)
    if isinstance(given, list | tuple):
        raise ConfigError(
            f"a run has one {registry.kind}, not a list; in Python call run for each, and compare "
            "them with results[0].plot(path, *results[1:])"
        )
    known = any(hasattr(given, method) for method in NEEDED[registry.kind])
    if isinstance(given, type) or not known:
        raise ConfigError(
            f"{given!r} is no {registry.kind}; give its name, a table, or an object "
            "(a factory needs its brackets, as in pure())"
        )
    if registry is ALGORITHMS:
        return completed(given, Algorithm) if hasattr(given, "arrive") else own_gossip(given)
    if lacking := [name for name in WHOLE.get(registry.kind, ()) if not hasattr(given, name)]:
        raise ConfigError(
            f"{type(given).__name__} is no {registry.kind}: it has no {' and no '.join(lacking)}"
        )
    return given


def make_fleet(given: Any) -> Fleet:
    """A fleet from its text or table, or as it is."""
    if isinstance(given, str):
        return Fleet.parse(given)
    if isinstance(given, Mapping):
        options = dict(given)
        if isinstance(options.get("outages"), list):
            options["outages"] = [
                Outage(**o) if isinstance(o, dict) else o for o in options["outages"]
            ]
        return Fleet(**options)
    if isinstance(given, Fleet):
        return given
    raise ConfigError(f"{given!r} is no fleet; give its text, its table or a Fleet")


def make_settings(kind: type[T], given: Any) -> T:
    """A settings record from its table, or as it is."""
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return kind(**given)
    raise ConfigError(f"{kind.__name__.lower()} must be a table, not {given!r}")


def with_more(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """``experiment`` with other ends: nothing else can change in mid-run."""
    table = experiment.table()
    for override in overrides:
        if not override.startswith(("stop.", *SAVING)):
            raise ConfigError(
                f'"{override}" would make it another run; only stop.* and {" and ".join(SAVING)} '
                "can be set when resuming"
            )
    change(table, {}, overrides)
    stop, record = make_settings(Stop, table["stop"]), make_settings(Record, table["record"])
    return replace(experiment, stop=stop, record=record)


def _part(made: Any, **facts: Any) -> dict[str, Any]:
    spec: Spec | None = getattr(made, "spec", None)
    if spec is not None and spec.portable():
        return spec.table()
    return {"name": f"{MADE_BY_HAND}{type(made).__name__}", **facts}


def _short(made: Any) -> str | dict[str, Any]:
    """A part's name where that says all, else its table."""
    table = _part(made)
    return table["name"] if len(table) == 1 else table


def _given(record: Any) -> dict[str, Any]:
    given = {key: value for key, value in vars(record).items() if value is not None}
    return given | given.pop("targets", {})  # each by its own name


def _fleet_table(fleet: Fleet) -> dict[str, Any]:
    table = _given(fleet)
    law = fleet.law()
    if law is fleet.speeds:
        table["speeds"] = str(law.spec or f"{MADE_BY_HAND}{type(law).__name__}")
    table["outages"] = [_given(outage) for outage in fleet.outages]
    return {key: value for key, value in table.items() if value not in ("", [])}
