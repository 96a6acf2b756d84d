"""What a study costs around its cells: a thousand small ones, bare, with one process, with two.

*Bare* is a loop that makes each experiment from its settings and runs it, in this process, and
keeps nothing.  Overhead is in processor seconds of all processes, so other work on the machine
matters little; the speedup is in wall seconds, and the machine should be idle.  Runs are
interleaved; the smallest of each counts.  What the first process costs to start is told apart.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import arguments, finish, where

from offbeat.runtime.api import api
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


def cpu_s() -> float:
    """Processor seconds of this process and of all that it has begun."""
    mine = psutil.Process().cpu_times()
    children = (child.cpu_times() for child in psutil.Process().children(recursive=True))
    # The server of processes outlives its own, and has their seconds.
    spent = (t.user + t.system + t.children_user + t.children_system for t in children)
    return float(mine.user + mine.system + sum(spent))


def main() -> None:
    options = arguments(str(__doc__), repeats={"type": int, "default": 3})
    cells = 100 if options.quick else CELLS
    made = Study({**TABLE, "seeds": cells // 4})
    todo, _ = made.plan({})

    def bare() -> None:
        for one in todo:
            api.execute(cell.one(one.table))

    def studied(which: Study, jobs: int) -> None:
        folder = Path(tempfile.mkdtemp())
        study.run(which, folder, jobs=jobs)
        shutil.rmtree(folder)

    def measured(way: Any) -> tuple[float, float]:
        began_s, began_cpu_s = time.perf_counter(), cpu_s()
        way()
        return time.perf_counter() - began_s, cpu_s() - began_cpu_s

    start = measured(lambda: studied(Study({**TABLE, "seeds": [0]}), 1))
    ways = {"bare": bare, "one": lambda: studied(made, 1), "two": lambda: studied(made, 2)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(1 if options.quick else options.repeats):
        for name, way in ways.items():
            taken[name].append(measured(way))
    wall = {name: min(wall_s for wall_s, _ in times) for name, times in taken.items()}
    cpu = {name: min(cpu for _, cpu in times) for name, times in taken.items()}
    print(f"# {cells} cells; {where()}")
    print(f"the first process: {start[0]:.2f} s, {start[1]:.2f} processor s")
    for name in ways:
        a_cell = f"{1e3 * cpu[name] / cells:6.2f} ms a cell"
        print(f"{name:<6}{wall[name]:8.2f} s {cpu[name]:8.2f} processor s   {a_cell}")
    overhead, speedup = cpu["one"] / cpu["bare"] - 1, wall["one"] / wall["two"]
    print(f"overhead {overhead:.1%}, two processes {speedup:.2f} times one")
    finish(
        {"overhead": round(overhead, 4), "speedup": round(speedup, 3)},
        {"overhead under 5%": overhead < 0.05, "two cores at least 1.7 times one": speedup >= 1.7},
    )


if __name__ == "__main__":
    main()
