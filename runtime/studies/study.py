"""Studies: a file names a grid of experiments; its cells run in parallel, each of them once.

    [experiment]              # like any experiment file: what all cells share
    [grid]                    # dotted keys and their values: every combination is run
    [[zip]]                   # keys whose values go together, one with one
    seeds = 3                 # or a list
    [tune]                    # keys and candidates: each setting takes its own best
    [target]                  # a metric and its level: how long until there?
    [limits]                  # of one cell
    [quick]                   # dotted keys of this file with smaller values, for --quick
    [files]                   # written by a study: what was in the files that it reads

A cell's name is the hash of its complete settings, and of what is in the files that they name (not
of where those are), so a study that was interrupted, or whose grid
has grown, runs what is missing and nothing else.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w

from offbeat.algorithms.gossip import ALGORITHMS
from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import (
    AtLeastOne,
    Positive,
    Reads,
    Registry,
    Seed,
    parse_call,
    settings,
)
from offbeat.runtime.experiment import files
from offbeat.runtime.experiment.experiment import KEYS, make_settings, read_toml
from offbeat.runtime.experiment.overrides import apply_override, once, put
from offbeat.runtime.run.checkpoint import write_whole
from offbeat.runtime.studies import cell, judge, pool
from offbeat.runtime.studies.lines import CellsFile, Done, Line, read_cells
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.tasks import TASKS
from offbeat.workers.work import WORK

FILE, FOLDERS = "study.toml", "runs"
PARTS = {"task": TASKS, "algorithm": ALGORITHMS, "topology": TOPOLOGIES, "work": WORK}
SECTIONS = (
    "name",
    "about",
    "experiment",
    "grid",
    "zip",
    "seeds",
    "tune",
    "target",
    "limits",
    "quick",
    "files",
)
BUDGETS = ("steps", "seconds", "gradients")  # what a share of a run is a share of
MOST_CELLS = 1_000_000


@settings
class Tune:
    """Every setting takes the best of the same candidates, after the same work.

    Args:
        grid: dotted keys and candidates; several keys are combined.
        by: see ``Judge``.
        seeds: of the runs that decide, by their mean; the study's first where None.
        halving: where given, successive halving: all candidates run a short time, the best
            1/halving of them halving times as long, and so on.  Else all run in full.
    """

    grid: dict[str, list[Any]]
    by: str | None = None
    seeds: list[Seed] | None = None
    halving: AtLeastOne | None = None


@settings
class Limits:
    """Of one cell: ``cell_s`` wall seconds."""

    cell_s: Positive = 3600.0


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        key: the hash of its complete settings.
        axes: what tells it from the others: dotted key -> value; the seed is apart.
        seed: of the run.
        table: its experiment.
    """

    key: str
    axes: Mapping[str, Any]
    seed: int
    table: dict[str, Any]


class Study:
    """A grid of experiments, from its table.

    Args:
        table: as in a study's file.
        build: whether every value of every axis is built once, so that mistakes are told now; else
            it is only looked at, and files are taken to be what [files] says.
    """

    def __init__(self, table: Mapping[str, Any], build: bool = True) -> None:
        if unknown := [key for key in table if key not in SECTIONS]:
            raise ConfigError(f'unknown key "{unknown[0]}"{nearest(unknown[0], SECTIONS)}')
        self.source = table
        self.files: dict[str, str] = {} if build else dict(_section(table, "files"))  # as named
        self.name = str(table.get("name", "study"))
        self.about = " ".join(str(table.get("about", "")).split())
        self.base = deepcopy(dict(_section(table, "experiment")))
        self.base["record"] = {"trace": False, **_section(self.base, "record")}
        self.axes = _lists(_section(table, "grid"), "grid")
        for key in ("algorithm", "topology", "mode"):  # lists, as in any experiment file
            if isinstance(self.base.get(key), list):
                self.axes.setdefault(key, self.base.pop(key))
        for part in PARTS.keys() & self.base.keys():
            self.base[part] = _written_out(part, self.base[part])
        if not isinstance(groups := table.get("zip", []), list):
            raise ConfigError(f"zip must be tables, as [[zip]], not {groups!r}")
        self.zipped = [_lists(group, "zip") for group in groups]
        self.seeds = _seeds(table.get("seeds", [0]))
        self.target = judge.target(table["target"]) if "target" in table else None
        self.tune = None
        if "tune" in table:
            tune = dict(_section(table, "tune"))
            tune["grid"] = _lists(tune.get("grid", {}), "tune.grid")
            self.tune = Tune(**tune)
        self.judge = judge.Judge(self.target, self.tune.by if self.tune else None)
        self.limits = make_settings(Limits, table.get("limits", {}))
        groups = self._check()
        if build:
            self._build(groups)

    @staticmethod
    def read(
        path: Path, overrides: Sequence[str] = (), quick: bool = False, build: bool = True
    ) -> "Study":
        """A study from its file; ``quick`` applies its [quick] section, then the overrides."""
        table = read_toml(path)
        table.setdefault("name", path.stem)
        try:
            if quick:
                _merge(table, _section(table, "quick"))
            once({}, overrides)
            if "task" in table and "experiment" not in table:
                raise ConfigError(f"is an experiment; begin it with: offbeat run {path}")
            for override in overrides:
                _override(table, override)
            return Study(table, build)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def _check(self) -> list[dict[str, list[Any]]]:
        """Refuse what no grid can be; answers what is varied: keys whose values go together."""
        groups = [{key: values} for key, values in self.axes.items()] + self.zipped
        keys = [key for group in (*groups, self.tune.grid if self.tune else {}) for key in group]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ConfigError(f"{min(twice)} is varied twice")
        for group in groups:
            lengths = {key: len(values) for key, values in group.items()}
            if len(set(lengths.values())) != 1:
                raise ConfigError(f"zip: lists that go together are of one length, not {lengths}")
        if self.tune is not None and not self.tune.grid:
            raise ConfigError('tune: name a key and its candidates, as grid."algorithm.lr" = [...]')
        count = len(self.settings()) * (len(self.seeds) + len(self._candidates()))
        if count > MOST_CELLS:
            raise ConfigError(f"{count:,} cells are more than the {MOST_CELLS:,} a study may have")
        return groups

    def _build(self, groups: Sequence[dict[str, list[Any]]]) -> None:
        """Refuse what no cell could be."""
        tuned = [dict(zip(self.tune.grid, self._candidates()[0], strict=True))] if self.tune else []
        first = [{key: values[0] for key, values in group.items()} for group in groups]
        for at, group in enumerate(groups):
            for place in range(len(next(iter(group.values())))):
                chosen = {key: values[place] for key, values in group.items()}
                axes = [*first[:at], chosen, *first[at + 1 :], *tuned]
                if at == 0 or place:
                    self.judge.check(cell.one(self._cell(_merged(axes), self.seeds[0]).table))
        if not groups:
            self.judge.check(cell.one(self._cell(_merged(tuned), self.seeds[0]).table))

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the axes; what differs in nothing but the seed is one."""
        ranges: list[list[dict[str, Any]]] = [
            [{key: value} for value in values] for key, values in self.axes.items()
        ]
        for group in self.zipped:
            length = len(next(iter(group.values())))
            ranges.append([{k: values[at] for k, values in group.items()} for at in range(length)])
        return [_merged(chosen) for chosen in product(*ranges)]

    def _candidates(self) -> list[tuple[Any, ...]]:
        return list(product(*self.tune.grid.values())) if self.tune else []

    def _cell(self, axes: Mapping[str, Any], seed: int, share: float = 1.0) -> Cell:
        """The cell at ``axes``, of ``share`` of the length."""
        table = deepcopy(self.base)
        for key in sorted(axes, key=lambda key: key.count(".")):  # algorithm before algorithm.lr
            put(table, key, _written_out(key, axes[key]) if key in PARTS else deepcopy(axes[key]))
        table["seed"] = seed
        if share < 1:
            stop = table.get("stop", {})
            if not any(key in stop for key in BUDGETS):
                raise ConfigError(f"halving: [experiment.stop] needs one of {', '.join(BUDGETS)}")
            for key in BUDGETS & stop.keys():
                part = stop[key] * share
                stop[key] = part if key == "seconds" else max(1, math.ceil(part))
        known_by = files.rewritten(table, self._content)
        text = json.dumps([cell.VERSION, known_by], sort_keys=True, default=str)
        return Cell(hashlib.sha256(text.encode()).hexdigest()[:16], axes, seed, table)

    def _content(self, text: str, reads: Reads) -> str:
        """What is in files, looked at once: all cells are of the same."""
        if text not in self.files:
            self.files[text] = files.content(text, reads)
        return self.files[text]

    # -- What to run next ---------------------------------------------------------------------

    def plan(self, done: Done) -> tuple[list[Cell], list[Cell]]:
        """The cells to run next, and those of the table whose settings are known by now.

        A function of what is done, so it is the same after an interruption.
        """
        missing: dict[str, Cell] = {}
        wanted: list[Cell] = []
        for axes in self.settings():
            chosen = axes
            if self.tune is not None:
                trials, best = self._tuned(axes, done)
                missing |= {trial.key: trial for trial in trials}
                if best is None:
                    continue
                chosen = axes | best
            cells = [self._cell(chosen, seed) for seed in self.seeds]
            wanted += cells
            missing |= {one.key: one for one in cells if one.key not in done}
        return list(missing.values()), wanted

    def _tuned(self, axes: dict[str, Any], done: Done) -> tuple[list[Cell], dict[str, Any] | None]:
        """The trials still to be run, or the best candidate."""
        assert self.tune is not None
        candidates, shares = self._candidates(), self._shares()
        for at, share in enumerate(shares):
            scores = []
            missing = []
            for candidate in candidates:
                values = dict(zip(self.tune.grid, candidate, strict=True))
                seeds = self.tune.seeds or self.seeds[:1]
                cells = [self._cell(axes | values, seed, share) for seed in seeds]
                missing += [one for one in cells if one.key not in done]
                if not missing:
                    scores.append(self.judge.score([done[one.key] for one in cells]))
            if missing:
                return missing, None
            order = sorted(range(len(candidates)), key=scores.__getitem__)
            last = at == len(shares) - 1
            kept = 1 if last else math.ceil(len(candidates) / (self.tune.halving or 1))
            candidates = [candidates[i] for i in sorted(order[:kept])]
        return [], dict(zip(self.tune.grid, candidates[0], strict=True))

    def _shares(self) -> list[float]:
        """How long the runs of each rung are: all of it at the last one."""
        assert self.tune is not None
        eta = self.tune.halving
        if eta is None or eta == 1:
            return [1.0]
        rungs = int(math.log(len(self._candidates())) / math.log(eta) + 1e-9)
        return [eta ** (at - rungs) for at in range(rungs + 1)]

    def edge(self, axes: Mapping[str, Any]) -> bool:
        """Whether the value chosen for any tuned key is the first or last of its candidates."""
        grid = self.tune.grid if self.tune else {}
        return any(len(v) > 1 and axes[key] in (v[0], v[-1]) for key, v in grid.items())


def _section(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(found := table.get(key, {}), Mapping):
        raise ConfigError(f"[{key}] must be a table, not {found!r}")
    return found


def _merge(table: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Put what is in ``other`` in the place of what is in ``table``, table by table."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = deepcopy(value)


def _override(table: dict[str, Any], override: str) -> None:
    """As of any experiment, but what follows ``grid.`` is one key: ``grid.algorithm.lr=[1, 2]``."""
    for grid in ("tune.grid.", "grid."):
        if override.startswith(grid):
            found: dict[str, Any] = {}
            apply_override(found, f"value={override.partition('=')[2]}")
            key = override.partition("=")[0].removeprefix(grid).strip().strip("\"'")
            part = table.setdefault("tune", {}) if grid.startswith("tune") else table
            part["grid"] = {**dict(files.flat(part.get("grid", {}))), key: found["value"]}
            return
    apply_override(table, override)


def _lists(table: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(table, Mapping) or (where == "zip" and not table):
        raise ConfigError(f"{where} must be a table of dotted keys and lists, not {table!r}")
    found = dict(files.flat(table))
    for key, values in found.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key} must be a list of values, not {values!r}")
        if where != "tune.grid" and (first := key.split(".")[0]) not in KEYS:
            raise ConfigError(f'{where}: unknown key "{key}"{nearest(first, KEYS)}')
        if key == "seed":
            raise ConfigError(f"{where}: seeds are varied by seeds = [...]")
    return found


def _seeds(given: Any) -> list[int]:
    seeds = list(range(given)) if type(given) is int else given
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ConfigError(f"seeds must be a number of seeds or a list of them, not {given!r}")
    return list(dict.fromkeys(seeds))


def _merged(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for table in tables for key, value in table.items()}


def _written_out(part: str, given: Any) -> Any:
    """A part as a table with all its options, so that keys can be set and nothing is implied."""
    registry: Registry = PARTS[part]
    if isinstance(given, str):
        name, args, options = parse_call(given, registry.kind)
        parameters = list(inspect.signature(registry[name]).parameters)
        if len(args) > len(parameters):
            raise ConfigError(f'too many arguments in "{given}"; it takes {", ".join(parameters)}')
        given = {"name": name, **dict(zip(parameters, args, strict=False)), **options}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        return given  # it will be told when it is built
    return {**_defaults(part, given["name"]), **deepcopy(given)}


@cache
def _defaults(part: str, name: str) -> dict[str, Any]:
    """The options of a part that have a default, but for those that the experiment fills in."""
    parameters = inspect.signature(PARTS[part][name]).parameters
    return {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in ("n", "workers", "seed") and parameter.default not in (parameter.empty, None)
    }


# -- The folder -------------------------------------------------------------------------------


Progress = Callable[[int, int, int], None]  # cells done, of how many, failed


def run(
    study: Study,
    folder: Path,
    *,
    jobs: int = 2,
    engine: str = "processes",
    retry: bool = False,
    folders: bool = False,
    progress: Progress = lambda done, of, failed: None,
) -> list[tuple[Cell, Line]]:
    """Run what is missing of ``study`` in ``folder``; answers the cells of its table.

    Args:
        study: what to run.
        folder: of the results; it may hold some already.
        jobs: cells at a time.
        engine: where they run; see ``pool.engine``.
        retry: whether cells that failed are run again.
        folders: whether every cell keeps a run folder of its own, with trace and checkpoints.
        progress: called after every cell.

    Raises:
        ConfigError: unknown engine; StorageError.
    """
    runner = pool.engine(engine)
    if folders and runner is not pool.processes:
        raise ConfigError("run folders are kept of cells that run on this machine only")
    file = CellsFile(folder)  # before it is read: nobody else adds to it from here on
    try:
        done = read_cells(folder)
        if retry:
            done = {key: line for key, line in done.items() if "error" not in line}
        looked = False
        while True:
            missing, wanted = study.plan(done)
            source = dict(study.source) | {"files": study.files}
            write_whole(folder / FILE, tomli_w.dumps(source).encode())
            if not looked:
                study.judge.look([one.table for one in missing])
                looked = True
            if not missing:
                return [(one, done[one.key]) for one in wanted]
            work = [_job(study, one, folder, folders) for one in missing]
            failed = sum("error" in line for line in done.values())
            progress(0, len(work), failed)
            runs = runner(cell.run, work, jobs, study.limits.cell_s)
            with closing(runs):
                for count, (index, (text, error)) in enumerate(runs, start=1):
                    if text is None:
                        key, table, _ = work[index]
                        text = cell.encode(cell.begun(key, table) | {"error": error})
                    file.add(text)
                    line = cell.decode(text)
                    done[line["cell"]] = line
                    failed += "error" in line
                    progress(count, len(work), failed)
    finally:
        file.close()


def _job(study: Study, one: Cell, folder: Path, folders: bool) -> cell.CellJob:
    read = {text: study.files[text] for text in files.named(one.table)} if study.files else {}
    table = one.table | ({"files": read} if read else {})  # so that no cell is of others
    if not folders:
        return cell.CellJob(one.key, table, None)
    table |= {"record": table["record"] | {"trace": True}}
    return cell.CellJob(one.key, table, str(folder / FOLDERS / one.key))
