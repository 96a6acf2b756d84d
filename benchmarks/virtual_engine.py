"""Arrivals a second: the virtual engine beside two bare loops written by hand.

All three run pure asynchronous SGD on one logistic regression (d = 123, batch 32, float32), in
turn, several times; medians are compared.  *single* evaluates one gradient at each arrival;
*ideal* evaluates every missing gradient in one call when one is due.  The bare loops record
nothing, compute no losses, check nothing, and draw samples and durations in large blocks.
The engine records every arrival, checks that gradients are finite and goes through its facade.
Nobody evaluates the full objective: it would cost the engine as much at any number of arrivals.
"""

import heapq
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from common import arguments, finish, where
from numpy.typing import NDArray
from scipy.special import expit

import offbeat
from offbeat.algorithms.server import pure
from offbeat.runtime.base.registry import Spec
from offbeat.workers.tasks import EmpiricalRisk
from offbeat.workers.tasks.logistic import Binary
from offbeat.workers.tasks.shards import Shards

SAMPLES, D, BATCH, LR = 32_000, 123, 32, 0.01
LAWS = {"mild": 0.25, "strong": 1.5}  # sigma of lognormal durations


def data() -> tuple[NDArray, NDArray]:
    """A stand-in of a9a's shape: 14 of 123 binary features set, a quarter of the labels 1."""
    g = np.random.default_rng(0)
    features = (g.random((SAMPLES, D)) < 14 / D).astype(np.float32)
    return features, (g.random(SAMPLES) < 0.25).astype(np.int64)


def durations(sigma: float) -> Iterator[float]:
    g = np.random.default_rng(1)
    while True:
        yield from g.lognormal(-(sigma**2) / 2, sigma, 4096).tolist()


def bare(a: NDArray, y: NDArray, n: int, sigma: float, arrivals: int, lazy: bool) -> NDArray:
    """A hand-written loop; ``lazy`` computes all missing gradients at once."""
    sign = (2 * y - 1).astype(np.float32)
    share = SAMPLES // n
    times, g = durations(sigma), np.random.default_rng(2)
    x = np.zeros(D, np.float32)
    models = [x] * n
    heap = [(next(times), i) for i in range(n)]
    heapq.heapify(heap)
    gradients: list[NDArray | None] = [None] * n
    missing = list(range(n))
    chunk = max(1, 2**21 // (BATCH * D * 4))
    buffer = np.empty((chunk * BATCH, D), np.float32)
    picks, at = g.integers(share, size=(1024, BATCH)), 0
    for _ in range(arrivals):
        now, i = heap[0]
        gradient = gradients[i]
        if gradient is None and lazy:
            for first in range(0, len(missing), chunk):
                some = missing[first : first + chunk]
                k = len(some)
                if at + k > 1024:
                    picks, at = g.integers(share, size=(1024, BATCH)), 0
                rows = (picks[at : at + k] + np.array(some)[:, None] * share).ravel()
                at += k
                out = buffer[: k * BATCH]
                a.take(rows, axis=0, out=out, mode="clip")
                out3, s = out.reshape(k, BATCH, D), sign[rows].reshape(k, BATCH)
                stacked = np.array([models[j] for j in some])
                margin = np.matmul(out3, stacked[:, :, None])[:, :, 0]
                found = np.matmul((s * expit(-s * margin))[:, None, :], out3)[:, 0]
                found *= -1 / BATCH
                for j, row in zip(some, found, strict=True):
                    gradients[j] = row
            missing = []
            gradient = gradients[i]
        elif gradient is None:
            if at == 1024:
                picks, at = g.integers(share, size=(1024, BATCH)), 0
            rows = picks[at] + i * share
            at += 1
            mine, s = a[rows], sign[rows]
            gradient = (s * expit(-s * (mine @ models[i]))) @ mine
            gradient *= -1 / BATCH
        x = x - LR * gradient
        models[i] = x
        gradients[i] = None
        if lazy:
            missing.append(i)
        heapq.heapreplace(heap, (now + next(times), i))
    return x


def engine(task: EmpiricalRisk, n: int, sigma: float, arrivals: int) -> offbeat.Result:
    return offbeat.run(
        task,
        pure(lr=LR),
        offbeat.Fleet(workers=n, speeds=f"lognormal({sigma})"),
        stop={"gradients": arrivals},
        evaluate={"steps": 10**9},
    )


class Free:
    """A task whose gradients cost nothing: what is left is the engine."""

    spec: Spec | None = None

    def __init__(self, workers: int) -> None:
        self.workers, self.dim = workers, D
        self._rows: dict[int, tuple[NDArray, NDArray]] = {}

    def initial(self, seed: int) -> NDArray:
        return np.zeros(D, np.float32)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        k = len(x)
        if k not in self._rows:
            self._rows[k] = np.zeros(k, np.float32), np.zeros((k, D), np.float32)
        return self._rows[k]

    def evaluate(self, x: NDArray) -> dict[str, float]:
        return {"loss": 0.0}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    options = arguments(str(__doc__))
    repeats, base = (3, 10_000) if options.quick else (7, 40_000)
    print(f"# virtual engine, {where()}")
    print("# k arrivals/s, medians; overhead: us an arrival where gradients cost nothing")
    print(f"{'n':>6} {'spread':>7} {'engine':>8} {'ideal':>8} {'single':>8} "
          f"{'/ideal':>7} {'/single':>8} {'overhead':>9}")  # fmt: skip
    a, y = data()
    figures, targets = {}, {}
    for n in (10, 100, 1000, 10_000):
        shards = Shards(a, y, np.array_split(np.arange(SAMPLES), n), batch=BATCH)
        task, free = EmpiricalRisk(shards, Binary(D)), Free(n)
        task.evaluate = free.evaluate  # type: ignore[method-assign]
        arrivals = max(base, 4 * n)
        for label, sigma in LAWS.items():
            runs: dict[str, Callable[[], object]] = {
                "engine": lambda: engine(task, n, sigma, arrivals),  # noqa: B023
                "ideal": lambda: bare(a, y, n, sigma, arrivals, True),  # noqa: B023
                "single": lambda: bare(a, y, n, sigma, arrivals, False),  # noqa: B023
                "free": lambda: engine(free, n, sigma, arrivals),  # type: ignore[arg-type]  # noqa: B023
            }
            spent: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, call in runs.items():
                    spent[name].append(timed(call))
            rate = {name: arrivals / statistics.median(s) for name, s in spent.items()}
            to_ideal, to_single = (
                statistics.median(b / e for b, e in zip(spent[other], spent["engine"], strict=True))
                for other in ("ideal", "single")
            )
            overhead = 1e6 / rate["free"]
            key = f"{n} {label}"
            figures[key] = {
                **{name: round(value) for name, value in rate.items()},
                "to_ideal": round(to_ideal, 3),
                "to_single": round(to_single, 3),
                "overhead_us": round(overhead, 2),
            }
            if n >= 100:
                targets[f"{key}: at least 0.5x ideal"] = to_ideal >= 0.5
            targets[f"{key}: at least 0.9x single"] = to_single >= 0.9
            targets[f"{key}: overhead below 6 us"] = overhead < 6
            print(f"{n:>6} {label:>7} {rate['engine'] / 1e3:8.1f} {rate['ideal'] / 1e3:8.1f} "
                  f"{rate['single'] / 1e3:8.1f} {to_ideal:7.2f} {to_single:8.2f} "
                  f"{overhead:9.2f}", flush=True)  # fmt: skip
    print(f"# peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    finish(figures, targets)


if __name__ == "__main__":
    main()
