"""The studies that come along, and which claims of the papers they bear out.

    python benchmarks/studies.py --out runs/studies [--w7a w7a.svm.bz2] [--only straggler]

Each study of examples/studies is run (what is done stays), its figures are drawn, and what theory
and papers say of it is compared with what was found.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import arguments, finish, where

from offbeat.runtime.report import report
from offbeat.runtime.studies import fits, lines, study, table
from offbeat.runtime.studies.study import Study

FILES = Path(__file__).parents[1] / "examples" / "studies"
PICTURES = {
    "step_size": ["floor-1"],
    "asgrad": ["progress", "staleness"],
    "topology": ["gap"],
    "time_varying": ["targets"],
    "local_sgd": ["progress"],
    "straggler": ["targets"],
}
Rows = list[dict[str, Any]]


class Claim(NamedTuple):
    """One line of the page."""

    study: str
    said: str
    found: str
    holds: bool


def middle(rows: Rows, column: str, **axes: Any) -> float:
    """The median of ``column`` over the seeds; infinity where it was not reached."""
    mine = [r for r in rows if all(r[key.replace("__", ".")] == v for key, v in axes.items())]
    found = table.median([r.get(column) for r in mine])
    return math.inf if found is None else found


def values(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def step_size(rows: Rows) -> list[Claim]:
    expected = {
        "pure": 0, "random": 1, "sgd": 1, "shuffled": 2, "random-reshuffling": 2,
        "shuffle-once-sgd": 2, "minibatch": 2,
    }  # fmt: skip
    made = []
    for method, power in expected.items():
        rates = values(rows, "algorithm.lr")
        floors = [middle(rows, "floor", algorithm=method, algorithm__lr=lr) for lr in rates]
        fit = fits.slope(rates, floors)
        assert fit is not None
        close = abs(fit["slope"] - power) < 0.15
        made.append(Claim("step_size", f"{method}: error ~ lr^{power}", told(fit), close))
    return made


def asgrad(rows: Rows) -> list[Claim]:
    made = []
    places = [key for key in ("task.data", "fleet.speeds") if key in rows[0]]
    cells = list(dict.fromkeys(tuple(row[key] for key in places) for row in rows))
    for data in dict.fromkeys(cell[0] if len(places) > 1 else "w7a" for cell in cells):
        mine = [c for c in cells if len(places) == 1 or c[0] == data]
        floors = {
            method: np.array([
                middle([r for r in rows if tuple(r[k] for k in places) == c], "floor",
                       algorithm=method)
                for c in mine
            ])
            for method in values(rows, "algorithm")
        }  # fmt: skip
        pure, random, shuffled = (floors[m] for m in ("pure", "random", "shuffled"))
        ordered = bool(((shuffled < random) & (random < pure)).all())
        said = f"{data}: shuffled < random < pure in all {len(mine)} laws"
        ends = [f"{a.min():.2g} to {a.max():.2g}" for a in (shuffled, random, pure)]
        made.append(Claim("asgrad", said, "; ".join(ends), ordered))
        for name, ratio, low, high in (
            ("pure / shuffled", pure / shuffled, 3.1, 6.4),
            ("random / shuffled", random / shuffled, 1.7, 2.1),
        ):
            found = f"{ratio.min():.2f} to {ratio.max():.2f}"
            inside = bool((ratio >= low).all() and (ratio <= high).all())
            made.append(Claim("asgrad", f"{data}: {name} is {low} to {high} (w7a)", found, inside))
        if "minibatch" in floors:
            ratio = shuffled / floors["minibatch"]
            found = f"{ratio.min():.2f} to {ratio.max():.2f}"
            said = f"{data}: shuffled ends above mini-batch, within a factor 2"
            made.append(Claim("asgrad", said, found, bool(((ratio >= 1) & (ratio <= 2)).all())))
    return made


def topology(rows: Rows) -> list[Claim]:
    said = {
        "dsgd": ("rounds ~ gap^-1 (its bias is lr/gap)", -1.0),
        "dsgt": ("rounds ~ gap^-1 at most", -1.0),
        "choco": ("rounds grow faster than gap^-1 (gamma is fixed)", None),
        "beer": ("rounds ~ gap^-1 at most", -1.0),
        "motef": ("insensitive to the graph: slope above -0.25", -0.25),
    }
    made = []
    for method in values(rows, "algorithm"):
        mine = [r for r in rows if r["algorithm"] == method]
        lost = [r["gap"] for r in mine if not r["steps_to_target"]]
        long = [r for r in mine if r["topology"] in ("ring", "path")]
        fit = gap_law([r for r in mine if r["gap"] < 0.1])
        name = method.split("(")[0]
        claim, power = said[name]
        found = f"all {told(gap_law(mine))}, below gap 0.1 {told(fit)}, "
        found += f"rings and paths {told(gap_law(long))}; {len(lost)} of {len(mine)} not reached, "
        found += f"the largest gap of them {max(lost, default=0.0):.2g}"
        slope = math.nan if fit is None or fit["error"] > 0.25 else fit["slope"]
        if name == "dsgd":
            holds = abs(slope + 1) < 0.25
        elif power is None:
            holds = slope < -1
        else:
            holds = slope >= power - 0.1
        made.append(Claim("topology", f"{name}: {claim}", found, holds))
    return made


def gap_law(rows: Rows) -> dict[str, Any] | None:
    """Rounds against the gap, at gaps where every graph gets there.

    Where some do not, the quick ones alone would flatten the line.
    """
    least = max((r["gap"] for r in rows if not r["steps_to_target"]), default=0.0)
    marks = [r for r in rows if r["gap"] > least]
    return fits.slope([r["gap"] for r in marks], [r["steps_to_target"] for r in marks])


def told(fit: dict[str, Any] | None) -> str:
    return "no fit" if fit is None else f"{fit['slope']:.2f} ± {fit['error']:.2f}"


def time_varying(rows: Rows) -> list[Claim]:
    made = []
    static = ("ring", "torus(5, 5)", "undirected-exponential", "exponential", "complete")
    for method in values(rows, "algorithm"):
        cost = {
            graph: middle(rows, "bytes_to_target", algorithm=method, topology=graph) / 1e6
            for graph in values(rows, "topology")
        }
        least = min(cost[g] for g in static if g in cost)
        for graph in ("one-peer-exponential", "base(peers=1)"):
            found = f"{cost[graph]:.1f} MB, against {least:.1f} on the best static graph"
            made.append(
                Claim("time_varying", f"{method}, {graph}: fewer bytes than any static graph",
                      found, cost[graph] < least)
            )  # fmt: skip
        rival = cost["one-peer-exponential"]
        found = f"{cost['base(peers=1)']:.1f} against {rival:.1f} MB"
        made.append(
            Claim("time_varying", f"{method}: base (exact) beats one-peer exponential at n = 25",
                  found, cost["base(peers=1)"] < rival)
        )  # fmt: skip
    return made


def local_sgd(rows: Rows) -> list[Claim]:
    made = []
    sync, vanilla, delayed, dylu = values(rows, "algorithm")
    profiles = values(rows, "fleet.speeds")
    floors = {
        m: np.array([middle(rows, "floor", algorithm=m, fleet__speeds=p) for p in profiles])
        for m in (sync, vanilla, delayed, dylu)
    }
    spans = {
        m: np.array([middle(rows, "time_s", algorithm=m, fleet__speeds=p) for p in profiles])
        for m in (sync, dylu)
    }
    for name, method, low, high in (
        ("outer Nesterov at each arrival is worse than sync, by 4 to 7%", vanilla, 1.03, 1.08),
        ("Delayed Nesterov is within 5% of sync", delayed, 0.0, 1.05),
        ("with DyLU it is within 1% of sync", dylu, 0.0, 1.01),
    ):
        ratio = floors[method] / floors[sync]
        found = "floor / sync: " + ", ".join(f"{r:.3f}" for r in ratio)
        holds = bool(((ratio > low) & (ratio <= high)).all())
        made.append(Claim("local_sgd", name, found, holds))
    speed = spans[sync] / spans[dylu]
    found = "sync / DyLU seconds: " + ", ".join(f"{r:.2f}" for r in speed)
    said = "after the same local steps, 3.3 times sooner on the slowest profile (arithmetic)"
    made.append(Claim("local_sgd", said, found, bool(3.0 < speed[-1] < 3.5)))
    return made


def straggler(rows: Rows) -> list[Claim]:
    made = []
    for method in values(rows, "algorithm"):
        name = method.split("(")[0]
        ratios = {}
        for graph in values(rows, "topology"):
            times = [
                middle(rows, "seconds_to_target", algorithm=method, topology=graph, mode=mode)
                for mode in ("synchronous", "asynchronous")
            ]
            ratios[graph] = times[0] / times[1] if min(times) < math.inf else math.nan
        words = {math.inf: "only asynchronous", 0.0: "only synchronous"}
        said = ", ".join(
            f"{graph} {'neither' if math.isnan(r) else words.get(r, f'{r:.1f}')}"
            for graph, r in ratios.items()
        )
        claim = f"{name}: asynchronous is sooner at the target on every graph (a straggler of 10)"
        holds = all(r > 1 for r in ratios.values())
        made.append(Claim("straggler", claim, f"sync / async seconds: {said}", holds))
    return made


CLAIMS = {
    "step_size": step_size, "asgrad": asgrad, "topology": topology,
    "time_varying": time_varying, "local_sgd": local_sgd, "straggler": straggler,
}  # fmt: skip


def main() -> None:
    options = arguments(
        str(__doc__),
        out={"default": "runs/studies"},
        only={"default": ",".join(CLAIMS), "help": "some of them, with commas between"},
        w7a={"default": None, "help": "AsGrad's data as LibSVM: run that study on it as well"},
        jobs={"type": int, "default": 2},
        pictures={"default": None, "help": "a folder for the small pictures of the page"},
        set={"action": "append", "default": [], "help": "KEY=VALUE, as of offbeat study"},
    )
    print(f"# {where()}")
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    names = options.only.split(",")
    runs = [(name, name, []) for name in names]
    if options.w7a and "asgrad" in names:
        data = ["zip=[]", f"experiment.task.data={options.w7a}"]
        data += ['grid.algorithm=["pure", "random", "shuffled", "minibatch"]']
        runs.append(("asgrad", "asgrad_w7a", data))
    if options.set:
        print(f"# with {', '.join(options.set)}")
    for name, place, overrides in runs:
        made = Study.read(FILES / f"{name}.toml", [*overrides, *options.set], options.quick)
        folder = Path(options.out) / place
        began_s = time.perf_counter()
        cells = study.run(made, folder, jobs=options.jobs)
        rows = table.rows(made, cells)
        table.write(rows, folder / "results.csv")
        wall_s = time.perf_counter() - began_s
        failed = sum(row["error"] is not None for row in rows)
        edge = sum(bool(row.get("tuned_at_edge")) for row in rows)
        done = lines.read_cells(folder).values()
        spent_s = sum(line.get("wall_s") or 0.0 for line in done)
        print(
            f"{place}: {len(done)} runs, {len(rows)} rows, {failed} failed, {edge} with the best "
            f"step at an edge of its candidates; {wall_s:.0f} s now, {spent_s:.0f} s in runs"
        )
        figures[place] = {"runs": len(done), "failed": failed, "at_edge": edge}
        report.write([folder], folder / "report.html", figures=True)
        if options.pictures:
            Path(options.pictures).mkdir(parents=True, exist_ok=True)
            for picture in PICTURES[name]:
                source = folder / "report-figures" / f"{picture}.png"
                shutil.copy(source, Path(options.pictures) / f"{place}-{picture}.png")
        if not options.quick:
            claims += CLAIMS[name](rows)
    for claim in claims:
        print(f"{claim.study:<13}{'yes' if claim.holds else 'NO ':<5}{claim.said}\n"
              f"{'':<18}{claim.found}")  # fmt: skip
    figures["hold"] = sum(claim.holds for claim in claims)
    figures["claims"] = len(claims)
    finish(figures, {"every run succeeded": all(
        one["failed"] == 0 for one in figures.values() if isinstance(one, dict)
    )})  # fmt: skip


if __name__ == "__main__":
    main()
