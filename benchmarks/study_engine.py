"""What a study costs around its cells: a thousand small ones, bare, with one process, with two.

*Bare* is a loop that makes each experiment from its settings and runs it, in this process, and
keeps nothing.  Runs are interleaved; the smallest of each counts, and the machine should be idle.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish, where

from offbeat.runtime import api
from offbeat.runtime.studies import cell, study
from offbeat.runtime.studies.study import Study

CELLS = 1000
TABLE: dict[str, Any] = {
    "experiment": {
        "task": "quadratic(5)",
        "fleet": {"workers": 10, "speeds": "1..10"},
        "stop": {"steps": 2000},
    },
    "grid": {"algorithm": ["pure", "random", "shuffled", "minibatch"]},
}


def main() -> None:
    options = arguments(str(__doc__), repeats={"type": int, "default": 3})
    cells = 100 if options.quick else CELLS
    made = Study({**TABLE, "seeds": cells // 4})
    todo, _ = made.plan({})

    def bare() -> None:
        for one in todo:
            api.execute(cell.one(one.table))

    def studied(jobs: int) -> None:
        folder = Path(tempfile.mkdtemp())
        assert len(study.run(made, folder, jobs=jobs)) == cells
        shutil.rmtree(folder)

    ways = {"bare": bare, "one": lambda: studied(1), "two": lambda: studied(2)}
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if options.quick else options.repeats):
        for name, way in ways.items():
            began_s = time.perf_counter()
            way()
            taken_s[name].append(time.perf_counter() - began_s)
    best = {name: min(times) for name, times in taken_s.items()}
    print(f"# {cells} cells; {where()}")
    for name, seconds in best.items():
        print(f"{name:<6}{seconds:8.2f} s   {1e3 * seconds / cells:6.2f} ms a cell")
    overhead, speedup = best["one"] / best["bare"] - 1, best["one"] / best["two"]
    print(f"overhead {overhead:.1%}, two processes {speedup:.2f} times one")
    finish(
        {"overhead": round(overhead, 4), "speedup": round(speedup, 3)},
        {"overhead under 5%": overhead < 0.05, "two cores at least 1.7 times one": speedup >= 1.7},
    )


if __name__ == "__main__":
    main()
