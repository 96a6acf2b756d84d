"""Reports: everything that a run or a study has to show, as one page that needs nothing else.

``data`` gathers it as plain values; ``page`` puts them into the page that draws them.
"""

import html
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.checkpoint import write_whole
from offbeat.runtime.errors import ConfigError, StorageError
from offbeat.runtime.experiment import make_part
from offbeat.runtime.records import column, read_trace
from offbeat.runtime.registry import Spec, told_apart
from offbeat.runtime.studies import study as studies
from offbeat.runtime.studies import table as tables
from offbeat.runtime.studies.cell import KEPT, VERSION, topology
from offbeat.runtime.studies.scenes import graphs, timeline
from offbeat.topologies import TOPOLOGIES

HERE = Path(__file__).parent
NUMBERS = 400_000  # of all curves; with more runs, fewer points of each
FEWEST, MOST = 20, 200  # points of a curve
BINS = 400  # of a staleness histogram
MOST_TIMELINES, MOST_GRAPHS = 12, 12
LIKED = 16  # nodes of a graph that is drawn, if there is a choice
MOST_LINES = 12  # shown together at first
MOST_NAMES = 8  # colours
FIT = 3  # marks from which a line is fitted
ACROSS = ("step", "time_s", "bytes")
UPWARDS = ("loss", "grad_norm", "distance2", "accuracy", "perplexity", "consensus", "loss_worst")


@dataclass
class Run:
    """What is known of one run.

    Args:
        axes: what tells it from others; the seed is apart.
        seed: of the run.
        line: as in a study's file; see ``cell.run``.
        row: of the table; see ``table.row``.
        folder: of its records, if it has one.
    """

    axes: dict[str, Any]
    seed: int
    line: dict[str, Any]
    row: dict[str, Any]
    folder: Path | None = None


def write(folders: Sequence[Path], path: Path, *, figures: bool = False) -> Path:
    """Write the page about ``folders`` (runs, comparisons, studies) to ``path``.

    Args:
        folders: what it is about.
        path: of the page.
        figures: also write a PNG and an SVG of every figure, into ``path``-figures.

    Raises:
        ConfigError: a folder is none of these; StorageError.
    """
    found = data(folders)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page(found).encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    if figures:
        from offbeat.runtime.studies.figures import draw

        draw(found, path.with_name(f"{path.stem}-figures"))
    return path


def page(found: dict[str, Any]) -> str:
    """The page that shows ``found``."""
    text = (HERE / "report.html").read_text()
    parts = {
        "title": html.escape(found["title"]),
        "css": (HERE / "report.css").read_text(),
        "js": (HERE / "report.js").read_text(),
        "data": encode(found),
    }
    before, *pieces = text.split("{{")
    for piece in pieces:  # not one replacement after the other: what is put in stays as it is
        name, _, after = piece.partition("}}")
        before += parts[name] + after
    return before


def encode(found: dict[str, Any]) -> str:
    """As JSON that no script tag ends early."""
    return json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def data(folders: Sequence[Path], live_s: float = 0.0) -> dict[str, Any]:
    """What the page shows; with ``live_s``, it asks for newer data every so many seconds."""
    runs: list[Run] = []
    recorded: list[Run] = []
    notes: list[str] = []
    abouts: list[str] = []
    target: studies.Target | None = None
    tuned: list[str] = []
    for folder in folders:
        if (folder / studies.FILE).exists():
            study, more, failed = _study(folder, len(folders) > 1)
            runs += more
            notes += failed
            abouts.append(study.about)
            target = target or study.target
            tuned += list(study.tune.grid) if study.tune else []
        else:
            recorded += _runs(folder)
    _tell_apart(recorded)
    runs += recorded
    if not runs and not notes:
        raise ConfigError(f"{folders[0]}: nothing has been recorded yet")
    kinds = {"server steps" if run.line["topology"] is None else "rounds" for run in runs}
    steps = kinds.pop() if len(kinds) == 1 else "steps"
    axes, settings, members = _settings(runs)
    colour = _colour(axes)
    _first_filters(axes, settings, colour)
    metric = target.metric if target is not None else "loss"
    made: dict[str, Any] = {
        "title": ", ".join(folder.resolve().name for folder in folders),
        "about": " ".join(filter(None, abouts)),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, offbeat {VERSION}, {len(runs):,} runs",
        "live_s": live_s,
        "notes": notes,
        "axes": axes,
        "settings": settings,
        "colour": colour,
        "columns": _columns(steps),
        "runs": _curves(runs, members, target),
        "target": None if target is None else {"metric": metric, "level": target.level},
        "measures": _measures(target, steps),
        "staleness": _staleness(runs, members),
        "against": _against(runs, axes, settings, members, colour, metric),
        "timelines": _timelines(runs),
        "graphs": _graphs(runs),
        "table": _table(runs, axes, tuned, members, steps),
    }
    present = {key for run in made["runs"] for key in run["c"]}
    made["x"] = [key for key in ACROSS if key in present]
    made["y"] = [metric] + [key for key in UPWARDS if key in present and key != metric]
    return made


# -- What there is -----------------------------------------------------------------------------


def _study(folder: Path, several: bool) -> tuple[studies.Study, list[Run], list[str]]:
    study = studies.Study.read(folder / studies.FILE, build=False)  # its data may be gone
    done = studies.read_cells(folder)
    missing, wanted = study.plan(done)
    runs, failed = [], []
    for cell in wanted:
        if (line := done.get(cell.key)) is None:
            continue
        axes = {key: tables.text(key, value) for key, value in cell.axes.items()}
        if several:
            axes = {"study": study.name, **axes}
        row = tables.row(line, study.target)
        for key in study.tune.grid if study.tune else ():
            row[key] = axes.pop(key)
        if row["error"]:
            failed.append(f"{_name(axes)}, seed {cell.seed}: {row['error']}")
            continue
        kept = folder / studies.FOLDERS / cell.key
        runs.append(Run(axes, cell.seed, line, row, kept if kept.exists() else None))
    notes = [f"{len(missing):,} runs of {study.name} are still to be done."] if missing else []
    others = {line.get("version", VERSION) for line in done.values()} - {VERSION}
    if others:
        notes.append(f"Not shown: runs of offbeat {', '.join(sorted(others))}; this is {VERSION}.")
    if failed:
        notes.append(f"{len(failed)} cells failed. The first: {failed[0]}")
    return study, runs, notes


def _runs(folder: Path) -> list[Run]:
    """The runs of a folder, or of a comparison."""
    try:
        parts = [folder / line for line in (folder / "runs.txt").read_text().splitlines()]
    except FileNotFoundError:
        parts = [folder]
    runs = []
    for part in parts:
        if not (part / "experiment.toml").exists():
            raise ConfigError(
                f"{part}: is neither a run (experiment.toml) nor a study (study.toml)"
            )
        if not (part / "metrics.jsonl").exists():
            continue  # of a comparison: its turn has not come
        if run := _run(part):
            runs.append(run)
    return runs


def _run(folder: Path) -> Run | None:
    from offbeat.runtime.api import load_experiment

    experiment = load_experiment(folder, changed=True)  # it shows what was
    metrics = rows(folder / "metrics.jsonl")
    if not metrics:
        return None
    final, histogram = metrics[-1], [1]
    if (folder / "summary.json").exists():
        final = json.loads((folder / "summary.json").read_text())
        histogram = final["histogram"]
        if final["gradients"] != metrics[-1]["gradients"]:
            metrics.append(final)
    line = {
        "cell": folder.resolve().name,
        "settings": experiment.table(),
        "reason": final.get("reason", "still running"),
        "final": {key: v for key, v in final.items() if isinstance(v, int | float)},
        "curve": {key: [row.get(key) for row in metrics] for key in KEPT if key in final},
        "histogram": histogram,
        "topology": None if experiment.topology is None else topology(experiment),
        "asynchronous": experiment.topology is not None and experiment.asynchronous,
        "wall_s": None,
    }
    axes: dict[str, Any] = {"algorithm": experiment.algorithm.spec}
    axes["topology"] = getattr(experiment.topology, "spec", None)
    if experiment.topology is not None:
        axes["mode"] = "asynchronous" if experiment.asynchronous else "synchronous"
    return Run(axes, experiment.seed, line, tables.row(line, None), folder)


def rows(path: Path) -> list[Any]:
    """The rows of a file that may be growing: a last one that is not whole is left out."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        return [json.loads(text) for text in whole.splitlines()]
    except ValueError as error:
        raise StorageError(f"{path}: cannot be read ({error})") from None


def _tell_apart(runs: Sequence[Run]) -> None:
    """Name recorded runs by method, topology and mode; by their folders where these are the same.

    Runs of the same settings but for the seed stay together.
    """
    for key in ("algorithm", "topology"):
        specs = [run.axes[key] or Spec("", {}) for run in runs]
        for run, text in zip(runs, told_apart(specs), strict=True):
            run.axes[key] = text
    for key in ("topology", "mode"):  # what is the same everywhere tells nothing
        if len({run.axes.get(key, "") for run in runs}) == 1:
            for run in runs:
                run.axes.pop(key, None)
    settings: dict[str, dict[str, str]] = {}  # what it is called -> its settings -> a folder
    for run in runs:
        same = {key: v for key, v in run.line["settings"].items() if key != "seed"}
        for part in same.values():
            if isinstance(part, dict):
                part.pop("seed", None)  # filled in from the run's
        alike = settings.setdefault(_name(run.axes), {})
        text = json.dumps(same, sort_keys=True, default=str)
        run.line["named"] = alike.setdefault(text, run.line["cell"])
    for run in runs:
        if len(settings[_name(run.axes)]) > 1:
            run.axes["run"] = run.line["named"]


# -- Settings ------------------------------------------------------------------------------------


def _settings(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int]]:
    """The axes, the settings (what is one but for the seed), and each run's setting."""
    keys = list(dict.fromkeys(key for run in runs for key in run.axes))
    values = {key: list(dict.fromkeys(str(r.axes.get(key, "")) for r in runs)) for key in keys}
    axes = [
        {"key": key, "label": _label(key), "values": values[key], "short": _short(key, values[key])}
        for key in keys
    ]
    settings: list[dict[str, Any]] = []
    places: dict[tuple[int, ...], int] = {}
    members = []
    for run in runs:
        at = tuple(values[key].index(str(run.axes.get(key, ""))) for key in keys)
        if at not in places:
            places[at] = len(settings)
            settings.append({"at": list(at), "name": _name(run.axes)})
        members.append(places[at])
    return axes, settings, members


def _label(key: str) -> str:
    return "method" if key == "algorithm" else key.removeprefix("fleet.")


def _short(key: str, values: Sequence[str]) -> list[str]:
    """Values as they stand in a legend: numbers say what they are."""
    last = "n" if key == "fleet.workers" else key.rsplit(".", 1)[-1]
    said = [f"{last} {v}" if v.replace(".", "").replace("e-", "").isdigit() else v for v in values]
    return tables.short(said) if len(said) > 1 else said


def _name(axes: dict[str, Any]) -> str:
    shorts = [_short(key, [str(value)])[0] for key, value in axes.items()]
    return " · ".join(filter(None, shorts)) or "run"


def _colour(axes: Sequence[dict[str, Any]]) -> int:
    """The axis that colours stand for: the method, else the first that varies."""
    varied = [at for at, axis in enumerate(axes) if len(axis["values"]) > 1]
    for at in varied:
        if axes[at]["key"] == "algorithm":
            return at
    fitting = [at for at in varied if len(axes[at]["values"]) <= MOST_NAMES]
    return (fitting or varied or [0])[0]


def _first_filters(
    axes: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]], colour: int
) -> None:
    """Where there are too many lines, the last axes show one value at first."""
    shown = len(settings)
    for axis in axes:
        axis["first"] = None
    for at in reversed(range(len(axes))):
        if at != colour and shown > MOST_LINES and len(axes[at]["values"]) > 1:
            axes[at]["first"] = 0
            chosen = [a["first"] for a in axes]
            shown = sum(
                all(c is None or c == v for c, v in zip(chosen, one["at"], strict=True))
                for one in settings
            )


def _columns(steps: str) -> dict[str, dict[str, Any]]:
    return {
        "step": {"label": steps},
        "time_s": {"label": "seconds"},
        "bytes": {"label": "megabytes sent", "unit": 1e6},
        "grad_norm": {"label": "gradient norm"},
        "distance2": {"label": "squared distance to the optimum"},
        "consensus": {"label": "distance between the nodes"},
        "loss_worst": {"label": "loss at the farthest node"},
    }


def _measures(target: Any, steps: str) -> list[dict[str, Any]]:
    """What settings are compared by."""
    last = target.metric if target is not None else "loss"
    measures: list[dict[str, Any]] = []
    if target is not None:
        columns = _columns(steps)
        measures = [
            {"key": f"{name}_to_target", **columns.get(of, {"label": of})}
            for name, of in tables.REACHED.items()
        ]
    return [*measures, {"key": "floor", "label": f"{last}, mean of the last fifth"}]


# -- Figures ---------------------------------------------------------------------------------------


def digits(values: Iterable[float], most: int = 5) -> list[float | None]:
    """Numbers as short as a picture needs them; None for what is none."""
    return [float(f"{v:.{most}g}") if v is not None and math.isfinite(v) else None for v in values]


def _curves(runs: Sequence[Run], members: Sequence[int], target: Any) -> list[dict[str, Any]]:
    wide = sum(len(run.line["curve"]) for run in runs) or 1
    points = int(min(MOST, max(FEWEST, NUMBERS / wide)))
    keys = [*(f"{name}_to_target" for name in tables.REACHED), "floor"]
    made = []
    for run, setting in zip(runs, members, strict=True):
        curve = run.line["curve"]
        kept = _thin(len(curve["step"]), points)
        c = {
            key: digits(curve[key][at] for at in kept)
            for key in (*ACROSS, *UPWARDS)
            if key in curve
        }
        t = {key: run.row[key] for key in keys if run.row.get(key) is not None}
        made.append({"s": setting, "seed": run.seed, "c": c, "t": t})
    return made


def _thin(length: int, points: int) -> list[int]:
    """Places of about ``points`` points: half evenly, half denser at the start."""
    if length <= points:
        return list(range(length))
    even = np.linspace(0, length - 1, points // 2)
    early = np.geomspace(1, length, points // 2) - 1
    return sorted({int(at) for at in np.round(np.concatenate([even, early]))})


def _staleness(runs: Sequence[Run], members: Sequence[int]) -> list[dict[str, Any]]:
    """Histograms over all seeds of a setting, in bins where there are many."""
    sums: dict[int, NDArray] = {}
    for run, setting in zip(runs, members, strict=True):
        taus = np.array(run.line["histogram"], float)
        if len(taus) > 1:
            before = sums.get(setting, np.zeros(0))
            both = np.zeros(max(len(taus), len(before)))
            both[: len(taus)] += taus
            both[: len(before)] += before
            sums[setting] = both
    made = []
    for setting, taus in sums.items():
        width = -(-len(taus) // BINS)
        padded = np.append(taus, np.zeros(-len(taus) % width)).reshape(-1, width)
        shares = padded.sum(axis=1) / taus.sum() / width
        mean = float(taus @ np.arange(len(taus)) / taus.sum())
        x = [*(np.arange(len(shares)) * width).tolist(), len(taus)]
        y = digits([*shares, 0.0])
        made.append({"s": setting, "x": x, "y": y, "mean": mean, "most": len(taus) - 1})
    return made


def _against(
    runs: Sequence[Run],
    axes: Sequence[dict[str, Any]],
    settings: Sequence[dict[str, Any]],
    members: Sequence[int],
    colour: int,
    metric: str,
) -> list[dict[str, Any]]:
    """Marks with fitted lines: rounds to the target against the gap, the floor against numbers."""
    found: dict[int, list[dict[str, Any]]] = {}
    for run, setting in zip(runs, members, strict=True):
        found.setdefault(setting, []).append(run.row)

    def marked(x_of: Callable[[int], float | None], key: str) -> list[dict[str, Any]]:
        series = []
        for value, name in enumerate(axes[colour]["short"] if axes else ["run"]):
            marks = []
            for at, setting in enumerate(settings):
                rows = found[at]
                there = [row[key] for row in rows if row.get(key) is not None]
                middle, x = tables.median([row.get(key) for row in rows]), x_of(at)
                if (not axes or setting["at"][colour] == value) and middle and x:
                    marks.append((x, middle, min(there), max(there), setting["name"]))
            if marks:
                keys = ("x", "y", "lo", "hi", "labels")
                drawn = dict(zip(keys, map(list, zip(*marks, strict=True)), strict=True))
                fit = slope(drawn["x"], drawn["y"])
                series.append({"name": name, "colour": value, **drawn, "fit": fit})
        enough = len({x for drawn in series for x in drawn["x"]}) >= FIT
        return series if enough else []

    def gap(at: int) -> float | None:
        gaps = [row["gap"] for row in found[at] if row.get("gap")]
        return float(np.median(gaps)) if gaps else None

    made = []
    if series := marked(gap, "steps_to_target"):
        made.append(
            {"id": "gap", "title": "Rounds to the target against the spectral gap",
             "x": "spectral gap", "y": "rounds to the target", "series": series}
        )  # fmt: skip
    varied = [at for at, axis in enumerate(axes) if len(axis["values"]) > 1]
    for at in varied:
        if at == colour or len(varied) > 2:  # else marks of one colour would differ in more
            continue
        try:
            numbers = [float(value) for value in axes[at]["values"]]
        except ValueError:
            continue
        label = axes[at]["label"]
        series = marked(lambda s, at=at, n=numbers: n[settings[s]["at"][at]], "floor")  # type: ignore[misc]
        if series:
            made.append(
                {"id": f"floor-{at}", "title": f"What is left against {label}", "x": label,
                 "y": f"{metric}, mean of the last fifth", "series": series}
            )  # fmt: skip
    return made


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Least squares of log y on log x: slope, its standard error, and the ends of the line.

    >>> found = slope([0.1, 0.01, 0.001], [30.0, 300.0, 3000.0])
    >>> round(found["slope"], 6), round(found["error"], 6)
    (-1.0, 0.0)
    """
    if len(set(x)) < FIT:
        return None
    u, v = np.log(x), np.log(y)
    apart = u - u.mean()
    along = float(apart @ v / (apart @ apart))
    start = float(v.mean() - along * u.mean())
    left = v - start - along * u
    error = math.sqrt(max(0.0, float(left @ left)) / max(1, len(x) - 2) / float(apart @ apart))
    ends = [min(x), max(x)]
    line = [math.exp(start + along * math.log(end)) for end in ends]
    return {"slope": along, "error": error, "marks": len(x), "x": ends, "y": line}


def _timelines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for run in runs:
        if len(made) == MOST_TIMELINES or run.folder is None:
            continue
        path = run.folder / "trace.jsonl"
        if path.exists() and len(trace := read_trace(path)):
            workers = int(run.line["settings"]["fleet"]["workers"])
            gossip = run.line["topology"] is not None
            made.append({"name": _name(run.axes), **timeline(trace, workers, gossip)})
    return made


def _graphs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One graph a topology, small ones first; one a run where the nodes' losses were recorded."""
    found: dict[str, tuple[Any, ...]] = {}
    families: dict[str, int] = {}
    for run in sorted(runs, key=lambda run: abs((run.line["topology"] or {}).get("n", 0) - LIKED)):
        settings = run.line["settings"]
        if run.line["topology"] is None:
            continue
        made = make_part(
            TOPOLOGIES, settings["topology"], n=run.line["topology"]["n"], seed=run.seed
        )
        metrics: list[dict[str, Any]] = []
        if run.folder is not None and settings.get("record", {}).get("nodes"):
            metrics = [row for row in rows(run.folder / "metrics.jsonl") if "node_loss" in row]
        name = f"{_name(run.axes)}: {_brief(made.spec)}" if metrics else _brief(made.spec)
        if name not in found:
            family = made.spec.name if made.spec is not None else ""
            families[family] = families.get(family, 0) + 1
            found[name] = families[family], made, metrics, run
    drawn: list[dict[str, Any]] = []
    for name, (_, made, metrics, run) in sorted(found.items(), key=lambda item: item[1][0]):
        trace = None
        if run.line.get("asynchronous") and (run.folder / "trace.jsonl").exists():
            trace = read_trace(run.folder / "trace.jsonl")
            trace = trace[np.argsort(column(trace, "time_s"), kind="stable")]
        if len(drawn) < MOST_GRAPHS and (seen := graphs(made, metrics, trace)):
            drawn.append({"name": name, **seen})
    return drawn


def _brief(spec: Spec | None) -> str:
    """A topology's text without what it need not say."""
    if spec is None:
        return "topology"
    usual = inspect.signature(TOPOLOGIES[spec.name]).parameters
    options = {k: v for k, v in spec.options.items() if k not in usual or v != usual[k].default}
    return str(Spec(spec.name, options))


def _table(
    runs: Sequence[Run],
    axes: Sequence[dict[str, Any]],
    tuned: Sequence[str],
    members: Sequence[int],
    steps: str,
) -> dict[str, Any]:
    """Medians over the seeds, a row for each setting."""
    keys = [key for key in (*TOLD, *tables.FINAL) if any(key in run.row for run in runs)]
    groups: dict[int, list[Run]] = {}
    for run, setting in zip(runs, members, strict=True):
        groups.setdefault(setting, []).append(run)
    columns: list[tuple[str, int]] = [(axis["label"], 0) for axis in axes]
    columns += [(key, 1) for key in tuned] + [("seeds", 1)]
    columns += [({**_LABELS, "step": steps}.get(key, key), 1) for key in keys]
    rows = []
    for mine in groups.values():
        medians: list[float | None] = []
        for key in keys:
            value = tables.median([run.row.get(key) for run in mine])
            unit = 1e6 if key.startswith("bytes") and value is not None else 1
            medians += digits([math.inf if value is None else value / unit])
        first = mine[0]
        values = [first.axes.get(axis["key"], "") for axis in axes]
        rows.append([*values, *(first.row.get(key) for key in tuned), len(mine), *medians])
    note = "Medians over the seeds, at the end of the runs." if len(runs) > len(groups) else ""
    return {"columns": columns, "rows": rows, "note": note}


TOLD = ("gap", *(f"{name}_to_target" for name in tables.REACHED), "floor")
_LABELS = {
    "time_s": "seconds",
    "bytes": "MB sent",
    "grad_norm": "gradient norm",
    "distance2": "distance²",
    "loss_worst": "farthest node",
    "staleness_mean": "staleness",
    "staleness_max": "most",
    "steps_to_target": "steps to target",
    "seconds_to_target": "s to target",
    "gradients_to_target": "gradients to target",
    "bytes_to_target": "MB to target",
    "floor": "last fifth",
}
