"""Reports: everything that a run or a study has to show, as one page that needs nothing else.

``data`` gathers it as plain values; ``page`` puts them into the page that draws them.
"""

import html
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.base.registry import Spec
from offbeat.runtime.experiment.metrics import LOWER, METRICS, QUALITIES
from offbeat.runtime.report import recorded
from offbeat.runtime.report.recorded import RecordedRun, graph
from offbeat.runtime.report.scenes import graphs, timeline
from offbeat.runtime.run.checkpoint import write_whole
from offbeat.runtime.run.records import column, read_trace
from offbeat.runtime.studies import judge
from offbeat.runtime.studies import study as studies
from offbeat.runtime.studies import table as tables
from offbeat.runtime.studies.cell import VERSION
from offbeat.runtime.studies.fits import MOST_LINES, against, word
from offbeat.runtime.studies.lines import read_cells
from offbeat.topologies import TOPOLOGIES
from offbeat.topologies.saved import SAVED

HERE = Path(__file__).parent
NUMBERS = 400_000  # of all curves; with more runs, fewer points of each
FEWEST, MOST = 20, 200  # points of a curve
BINS = 400  # of a staleness histogram
MOST_TIMELINES, MOST_GRAPHS = 12, 12
LIKED = 16  # nodes of a graph that is drawn, if there is a choice
MOST_NAMES = 8  # colours
ACROSS = ("step", "time_s", "bytes")


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
        from offbeat.runtime.report.figures import draw

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
    runs: list[RecordedRun] = []
    found: list[RecordedRun] = []
    notes: list[str] = []
    abouts: list[str] = []
    target: judge.Target | None = None
    tuned: list[str] = []
    for folder in folders:
        if not folder.is_file() and (folder / studies.FILE).exists():
            study, more, failed = _study(folder, len(folders) > 1)
            runs += more
            notes += failed
            abouts.append(study.about)
            target = target or study.target
            tuned += list(study.tune.grid) if study.tune else []
        else:
            found += recorded.runs(folder)
    recorded.tell_apart(found)
    runs += found
    if not runs and not notes:
        raise ConfigError(f"{folders[0]}: nothing has been recorded yet")
    kinds = {"server steps" if run.line["topology"] is None else "rounds" for run in runs}
    steps = kinds.pop() if len(kinds) == 1 else "steps"
    axes, settings, members = _settings(runs)
    colour = _colour(axes)
    judged = judge.Judge(target)
    own = {key: way for run in runs for key, way in run.line.get("better", {}).items()}
    table: dict[int, list[dict[str, Any]]] = {}
    for run, setting in zip(runs, members, strict=True):
        table.setdefault(setting, []).append(run.row)
    marks = {setting: judged.mark(mine, own) for setting, mine in table.items()}
    _first_filters(axes, settings, colour, marks)
    falls = judged.metric if judged.better("floor", own) == LOWER else None
    made: dict[str, Any] = {
        "title": ", ".join(folder.resolve().name for folder in folders),
        "about": " ".join(filter(None, abouts)),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, offbeat {VERSION}, {len(runs):,} runs",
        "live_s": live_s,
        "notes": notes,
        "axes": axes,
        "settings": settings,
        "colour": colour,
        "columns": _columns(steps, own),
        "runs": _curves(runs, members, target),
        "target": None if target is None else {"metric": target.metric, "level": target.level},
        "measures": _measures(judged, steps, own),
        "staleness": _staleness(runs, members),
        "against": against(table, axes, settings, colour, falls),
        "timelines": _timelines(runs),
        "timelines_of": sum(_traced(run) for run in runs),
        "graphs": _graphs(runs),
        "table": _table(runs, axes, tuned, members, steps),
    }
    present = {key for run in made["runs"] for key in run["c"]}
    made["x"] = [key for key in ACROSS if key in present]
    shown = dict.fromkeys((judged.metric, *QUALITIES, *own))
    made["y"] = [key for key in shown if key in present]
    return made


# -- What there is -----------------------------------------------------------------------------


def _study(folder: Path, several: bool) -> tuple[studies.Study, list[RecordedRun], list[str]]:
    study = studies.Study.read(folder / studies.FILE, build=False)  # its data may be gone
    done = read_cells(folder)
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
            failed.append(f"{tables.name(axes)}, seed {cell.seed}: {row['error']}")
            continue
        kept = folder / studies.FOLDERS / cell.key
        runs.append(RecordedRun(axes, cell.seed, line, row, kept if kept.exists() else None))
    notes = [f"{len(missing):,} runs of {study.name} are still to be done."] if missing else []
    others = {line.get("version", VERSION) for line in done.values()} - {VERSION}
    if others:
        notes.append(f"Not shown: runs of offbeat {', '.join(sorted(others))}; this is {VERSION}.")
    if failed:
        notes.append(f"{len(failed)} cells failed. The first: {failed[0]}")
    return study, runs, notes


# -- Settings ------------------------------------------------------------------------------------


def _settings(
    runs: Sequence[RecordedRun],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int]]:
    """The axes, the settings (what is one but for the seed), and each run's setting."""
    keys = list(dict.fromkeys(key for run in runs for key in run.axes))
    values = {key: list(dict.fromkeys(str(r.axes.get(key, "")) for r in runs)) for key in keys}
    axes = [
        {
            "key": key,
            "label": _label(key),
            "values": values[key],
            "short": tables.shorts(key, values[key]),
        }
        for key in keys
    ]
    settings: list[dict[str, Any]] = []
    places: dict[tuple[int, ...], int] = {}
    members = []
    for run in runs:
        at = tuple(values[key].index(str(run.axes.get(key, ""))) for key in keys)
        if at not in places:
            places[at] = len(settings)
            settings.append({"at": list(at), "name": tables.name(run.axes)})
        members.append(places[at])
    return axes, settings, members


def _label(key: str) -> str:
    return "method" if key == "algorithm" else key.removeprefix("fleet.")


def _colour(axes: Sequence[dict[str, Any]]) -> int:
    """The axis that colours stand for: the method, else the first that varies."""
    varied = [at for at, axis in enumerate(axes) if len(axis["values"]) > 1]
    for at in varied:
        if axes[at]["key"] == "algorithm":
            return at
    fitting = [at for at in varied if len(axes[at]["values"]) <= MOST_NAMES]
    return (fitting or varied or [0])[0]


def _first_filters(
    axes: Sequence[dict[str, Any]],
    settings: Sequence[dict[str, Any]],
    colour: int,
    marks: dict[int, tuple[float, float]],
) -> None:
    """Where there are too many lines, the last axes show at first the value of the best setting."""
    shown = len(settings)
    best = settings[min(marks, key=marks.__getitem__)]["at"] if marks else []
    for axis in axes:
        axis["first"] = None
    for at in reversed(range(len(axes))):
        if at != colour and shown > MOST_LINES and len(axes[at]["values"]) > 1:
            axes[at]["first"] = best[at]
            chosen = [a["first"] for a in axes]
            shown = sum(
                all(c is None or c == v for c, v in zip(chosen, one["at"], strict=True))
                for one in settings
            )


def _columns(steps: str, own: dict[str, str]) -> dict[str, dict[str, Any]]:
    known = {key: one for key, one in METRICS.items() if key != "step"}
    said = {key: {"label": m.label, "unit": m.unit, "better": m.better} for key, m in known.items()}
    more = {key: {"label": key, "unit": 1, "better": way} for key, way in own.items()}
    return {"step": {"label": steps, "unit": 1, "better": None}, **said, **more}


def _measures(judged: judge.Judge, steps: str, own: dict[str, str]) -> list[dict[str, Any]]:
    """What settings are compared by."""
    columns = _columns(steps, own)
    measures: list[dict[str, Any]] = []
    if judged.target is not None:
        measures = [
            {"key": f"{name}_to_target", **columns[of], "better": LOWER}
            for name, of in tables.REACHED.items()
        ]
    label = f"{word(judged.metric)}, mean of the last fifth"
    return [*measures, {"key": "floor", "label": label, "better": judged.better("floor", own)}]


# -- Figures ---------------------------------------------------------------------------------------


def digits(values: Iterable[float], most: int = 5) -> list[float | None]:
    """Numbers as short as a picture needs them; None for what is none."""
    return [float(f"{v:.{most}g}") if v is not None and math.isfinite(v) else None for v in values]


def _curves(
    runs: Sequence[RecordedRun], members: Sequence[int], target: Any
) -> list[dict[str, Any]]:
    wide = sum(len(run.line["curve"]) for run in runs) or 1
    points = int(min(MOST, max(FEWEST, NUMBERS / wide)))
    keys = [*(f"{name}_to_target" for name in tables.REACHED), "floor"]
    made = []
    for run, setting in zip(runs, members, strict=True):
        curve = run.line["curve"]
        kept = _thin(len(curve["step"]), points)
        c = {key: digits(curve[key][at] for at in kept) for key in curve}
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


def _staleness(runs: Sequence[RecordedRun], members: Sequence[int]) -> list[dict[str, Any]]:
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


def _traced(run: RecordedRun) -> bool:
    return run.folder is not None and (run.folder / "trace.jsonl").exists()


def _timelines(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for run in runs:
        if len(made) == MOST_TIMELINES or run.folder is None or not _traced(run):
            continue
        if len(trace := read_trace(run.folder / "trace.jsonl")):
            workers = recorded.settings(run.folder)["fleet"]["workers"]  # a study may not say it
            gossip = run.line["topology"] is not None
            made.append({"name": tables.name(run.axes), **timeline(trace, workers, gossip)})
    return made


def _graphs(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """One graph a topology, small ones first; one a run where the nodes' losses were recorded."""
    found: dict[str, tuple[Any, ...]] = {}
    families: dict[str, int] = {}
    for run in sorted(runs, key=lambda run: abs((run.line["topology"] or {}).get("n", 0) - LIKED)):
        settings = run.line["settings"]
        facts = run.line["topology"]
        made = None if facts is None else graph(settings["topology"], facts["n"], run.seed)
        if made is None:
            continue
        metrics: list[dict[str, Any]] = []
        if run.folder is not None and settings.get("record", {}).get("nodes"):
            metrics = [
                row for row in recorded.rows(run.folder / "metrics.jsonl") if "node_loss" in row
            ]
        name, own = _brief(made.spec), made.spec is None or made.spec.name == SAVED
        if metrics or own:  # a graph of one's own has no name that tells it from others
            name = f"{tables.name(run.axes)}: {name}"
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


def _brief(made: Spec | None) -> str:
    """A topology's text without what it need not say."""
    if made is None or made.name == SAVED:
        return "graph"
    usual = inspect.signature(TOPOLOGIES[made.name]).parameters
    options = {k: v for k, v in made.options.items() if k not in usual or v != usual[k].default}
    return str(Spec(made.name, options))


def _table(
    runs: Sequence[RecordedRun],
    axes: Sequence[dict[str, Any]],
    tuned: Sequence[str],
    members: Sequence[int],
    steps: str,
) -> dict[str, Any]:
    """Medians over the seeds, a row for each setting."""
    own = dict.fromkeys(key for run in runs for key in run.line.get("better", {}))
    told = dict.fromkeys((*TOLD, *tables.final_columns(own)))
    keys = [key for key in told if any(key in run.row for run in runs)]
    groups: dict[int, list[RecordedRun]] = {}
    for run, setting in zip(runs, members, strict=True):
        groups.setdefault(setting, []).append(run)
    columns: list[tuple[str, int]] = [(axis["label"], 0) for axis in axes]
    columns += [(key, 1) for key in tuned] + [("seeds", 1)]
    labels = {key: one.column for key, one in METRICS.items()} | _LABELS | {"step": steps}
    columns += [(labels.get(key, key), 1) for key in keys]
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
    "steps_to_target": "steps to target",
    "seconds_to_target": "s to target",
    "gradients_to_target": "gradients to target",
    "bytes_to_target": "MB to target",
    "floor": "last fifth",
}
