"""AsGrad's experiment on a LibSVM file: which order of handing out work gets furthest.

Logistic regression with the non-convex regulariser (lambda = 0.1), 10 workers with contiguous
blocks of rows, full local gradients, x_0 = 1, 500 server steps, speeds 1..10.  Each method takes
its best step size of a grid by its *tail*, the mean of ||grad f|| over the last 100 steps.
"""

import numpy as np
from common import arguments, finish, where

import offbeat
from offbeat.algorithms.server import ALGORITHMS
from offbeat.workers.data import load
from offbeat.workers.tasks import EmpiricalRisk
from offbeat.workers.tasks.logistic import Binary
from offbeat.workers.tasks.shards import Shards

N, STEPS, TAIL, EVERY = 10, 500, 100, 4
LAWS = {
    "fixed": "1..10",
    "poisson": "poisson(1..10)",
    "normal": "normal(1..10)",
    "uniform": "uniform(1..10)",
}
METHODS = {
    "pure": {},
    "pure wait=5": {"wait": 5},
    "random": {},
    "random wait=5": {"wait": 5},
    "shuffled": {},
    "minibatch": {},
    "random-reshuffling": {},
}


def tail(task: EmpiricalRisk, name: str, power: int, law: str, seed: int) -> tuple[float, float]:
    """(mean ||grad f|| over the last steps, virtual seconds of the run)."""
    method = ALGORITHMS[name.split()[0]](lr=2.0**-power, **METHODS[name])
    result = offbeat.run(
        task,
        method,
        offbeat.Fleet(workers=N, speeds=law),
        stop={"steps": STEPS},
        evaluate={"steps": EVERY},
        record={"trace": False},
        seed=seed,
    )
    rows = [row["grad_norm"] for row in result.metrics if row["step"] > STEPS - TAIL]
    return float(np.mean(rows)), result.final["time_s"]


def main() -> None:
    options = arguments(
        str(__doc__),
        file={"positional": True, "help": "w7a or phishing as LibSVM (plain, .gz, .bz2)"},
        rows={"type": int, "default": None, "help": "use the first so many rows [all]"},
    )
    features, labels = load(options.file)
    rows = (options.rows or len(labels)) // N * N
    parts = np.array_split(np.arange(rows), N)
    shards = Shards(features[:rows], labels[:rows], parts, batch="full")
    task = EmpiricalRisk(shards, Binary(shards.width, start=1.0), nonconvex=0.1)
    laws = {"fixed": LAWS["fixed"]} if options.quick else LAWS
    powers, seeds = ((2, 3, 4), (0,)) if options.quick else ((1, 2, 3, 4, 5, 6), (0, 1, 2))
    methods = ("pure", "random", "shuffled", "minibatch") if options.quick else tuple(METHODS)
    print(f"# {options.file}: {rows} rows, d = {shards.width}; {where()}")
    print("# tail of ||grad f|| (best step size) [virtual seconds], mean of the seeds")
    print(f"{'method':<20}" + "".join(f"{law:>26}" for law in laws))
    figures: dict[str, dict[str, float]] = {law: {} for law in laws}
    for name in methods:
        line = f"{name:<20}"
        for law, text in laws.items():
            found = {
                p: np.mean([tail(task, name, p, text, seed) for seed in seeds], axis=0)
                for p in powers
            }
            best = min(found, key=lambda p: found[p][0])
            figures[law][name] = round(float(found[best][0]), 5)
            line += f"{found[best][0]:>12.4f} (2^-{best}) [{found[best][1]:>5.0f}]"
        print(line, flush=True)
    targets = {}
    for law, by in figures.items():
        by["pure/shuffled"] = round(by["pure"] / by["shuffled"], 2)
        by["random/shuffled"] = round(by["random"] / by["shuffled"], 2)
        print(
            f"{law}: pure/shuffled {by['pure/shuffled']}, random/shuffled {by['random/shuffled']}"
        )
        targets[f"{law}: shuffled < random < pure"] = by["shuffled"] < by["random"] < by["pure"]
    finish(figures, targets)


if __name__ == "__main__":
    main()
