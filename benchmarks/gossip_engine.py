"""Rounds a second of the gossip engine, beside bare loops of the same methods in matrix form.

The bare loops are what one writes by hand: numpy, a scipy sparse product, top-k by argpartition.
They record nothing, count no bytes, keep no time, check nothing.  Both call the same gradient of
the same task (a quadratic a node, float32), in turn, many times; medians are compared.  Steps are
small: at the end of a run on a quadratic, where everything is equal, top-k would meet only ties.
Memory is measured in processes of their own: the most that was resident, less what was before the
network was made.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
from common import arguments, finish, where
from numpy.typing import NDArray
from scipy import sparse

from offbeat.algorithms.gossip import Gossip, beer, choco, dsgd, motef
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.runtime.run.records import Records
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet
from offbeat.workers.tasks import Quadratic

LR, GAMMA, LAM, K = 0.001, 0.1, 0.1, 0.1
TOPK = f"topk({K})"
METHODS: dict[str, Callable[[], Gossip]] = {
    "dsgd": lambda: dsgd(lr=LR),
    "choco": lambda: choco(lr=LR, gamma=GAMMA, compressor=TOPK),
    "beer": lambda: beer(lr=LR, gamma=GAMMA, compressor=TOPK),
    "motef": lambda: motef(lr=LR, gamma=GAMMA, lam=LAM, compressor=TOPK),
}
VECTORS = {"dsgd": 1, "choco": 3, "beer": 7, "motef": 7}  # of state a node, as the papers count
SIZES = [(64, 100), (1000, 100), (10_000, 100), (100_000, 100), (16, 1_000_000)]
GRAPHS = {"ring": "ring", "6-regular": "random-regular(degree=6)"}


def centers(n: int, d: int) -> NDArray:
    return np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)


def top(x: NDArray) -> NDArray:
    d = x.shape[1]
    k = round(K * d)
    index = np.argpartition(np.abs(x), d - k, axis=1)[:, d - k :]
    q = np.zeros_like(x)
    np.put_along_axis(q, index, np.take_along_axis(x, index, axis=1), axis=1)
    return q


def bare(name: str, w: sparse.csr_array, task: Quadratic) -> Iterator[NDArray]:
    """A hand-written loop; X after each round."""
    n = w.shape[0]
    w, worker, draw = w.astype(np.float32), np.arange(n), np.zeros(n, np.int64)
    x = np.zeros((n, task.dim), np.float32)

    def grad(x: NDArray) -> NDArray:
        return task.gradient(x, worker, draw)[1]

    if name == "dsgd":
        while True:
            x = w @ (x - LR * grad(x))
            yield x
    h = np.zeros_like(x)
    if name == "choco":
        while True:
            x = x - LR * grad(x)
            h += top(x - h)
            x = x + GAMMA * (w @ h - h)
            yield x
    g = np.zeros_like(x)
    v = m = grad(x)
    lam = LAM if name == "motef" else 1.0
    while True:
        x = x + GAMMA * (w @ h - h) - LR * v
        h += top(x - h)
        m_new = (1 - lam) * m + lam * grad(x) if lam < 1 else grad(x)
        v = v + GAMMA * (w @ g - g) + m_new - m
        m = m_new
        g += top(v - g)
        yield x


def engine(name: str, graph: str, c: NDArray) -> Rounds:
    n = len(c)
    fleet, topology = Fleet(workers=n), TOPOLOGIES.parse(GRAPHS[graph], n=n)
    return Rounds(
        Quadratic(c), METHODS[name](), topology, fleet, fleet.timing(0, 0),
        Records(fleet, None, trace=False), seed=0,
        stop=Stop(steps=10**9), evaluate=Evaluate(steps=10**9),
    )  # fmt: skip


def compared(name: str, graph: str, n: int, d: int, seconds: float) -> tuple[float, float]:
    """Seconds a round, of the engine and of the bare loop."""
    c = centers(n, d)
    ours = engine(name, graph, c)
    ours._start()
    theirs = bare(name, ours.network.topology.matrix(0), ours.task)
    taken: tuple[list[float], list[float]] = ([], [])
    actions = (ours._advance, lambda: next(theirs))
    for action in actions:  # warm up
        action()
        action()
    began_s = time.perf_counter()
    burst = 0
    while time.perf_counter() - began_s < seconds or len(taken[0]) < 5:
        burst = burst or 1
        for times, action in zip(taken, actions, strict=True):
            start_s = time.perf_counter()
            for _ in range(burst):
                action()
            times.append((time.perf_counter() - start_s) / burst)
        if len(taken[0]) == 1:
            burst = max(1, int(0.02 / taken[0][0]))
    return statistics.median(taken[0]), statistics.median(taken[1])


def peak(name: str, graph: str, n: int, d: int, rounds: int = 6) -> float:
    """The most memory the engine needs, in vectors ``[n, d]`` of float32, the data left out."""
    code = f"import gossip_engine as g; g.measure({name!r}, {graph!r}, {n}, {d}, {rounds})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )  # fmt: skip
    return float(json.loads(done.stdout)) / (n * d * 4)


def measure(name: str, graph: str, n: int, d: int, rounds: int) -> None:
    """Print the bytes of which ``peak`` speaks."""
    engine(name, graph, centers(64, 100))._start()  # what is loaded once
    c = centers(n, d)
    process, most, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    made = engine(name, graph, c)
    made._start()
    for _ in range(rounds):
        made._advance()
    made._measured()
    done.set()
    watcher.join()
    print(most - before)


def main() -> None:
    args = arguments(__doc__ or "")
    print(where())
    sizes = SIZES[:3] if args.quick else SIZES
    print("rounds a second: engine, bare loop, engine / bare; peak memory in vectors [n, d]")
    figures, targets = {}, {}
    for n, d in sizes:
        for graph in GRAPHS:
            for name in METHODS:
                ours, theirs = compared(name, graph, n, d, 1.0 if args.quick else 3.0)
                line = f"{name:6} {graph:10} n={n:<7,} d={d:<10,}"
                line += f"{1 / ours:10.1f} {1 / theirs:10.1f} {theirs / ours:6.2f}"
                key = f"{name} {graph} {n}x{d}"
                figures[key] = round(theirs / ours, 3)
                targets[f"{key}: 0.8x the bare loop"] = theirs / ours >= 0.8
                if n * d >= 10**7:
                    vectors = peak(name, graph, n, d)
                    line += f"   memory {vectors:5.1f} (at most {VECTORS[name] + 4})"
                    figures[f"{key} memory"] = round(vectors, 2)
                    targets[f"{key}: memory"] = vectors <= VECTORS[name] + 4
                print(line, flush=True)
    finish(figures, targets)


if __name__ == "__main__":
    main()
