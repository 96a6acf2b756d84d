"""Updates a second: the Ray engine beside a bare ``ray.wait`` loop that does the same work.

Asynchronous SGD, x <- x - lr g, on one Ray with n actors of one worker each.  The work is the
least there is: a gradient is a copy of the model, so that what is left is moving models and
updates.  *bare* is a hand-written loop: one job an actor, one ``ray.put`` a model above 100 kB,
one ``ray.wait`` over all, all ready answers taken; it records nothing, checks nothing and knows
no failure.  *engine* is ``offbeat.run`` under a real clock with speeds "real": it records every
arrival, checks that gradients are finite, and goes through the method.  Both run in turn, several
times; medians are compared.  The start of actors is not in the rates, and is told apart.

Expected: a call costs Ray about a millisecond of two cores, the engine's own share is some tens
of microseconds an update, so 0.9 of the bare loop at d = 1,000; at 1M and 10M the check that
gradients are finite reads them once more, about 5% of what copying them four times costs.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
from common import arguments, finish, where
from numpy.typing import NDArray

import offbeat
from offbeat.algorithms.server import pure
from offbeat.runtime.base.registry import Spec
from offbeat.runtime.base.tensors import keep_freed
from offbeat.runtime.experiment import engines as backends
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.on_ray.server import INLINE_BYTES, ActorSlot, RayBackend, ServerActor
from offbeat.runtime.on_ray.start import load, start

LR = 0.01


class Copy:
    """A task whose gradient is the model itself."""

    spec: Spec | None = None

    def __init__(self, workers: int, dim: int) -> None:
        self.workers, self.dim = workers, dim

    def initial(self, seed: int) -> NDArray:
        return np.ones(self.dim, np.float32)

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        return np.zeros(len(x)), x.copy()

    def evaluate(self, x: NDArray) -> dict[str, float]:
        return {"loss": 0.0}


class Bare:
    """What an actor is at the least."""

    def ready(self) -> None:
        pass

    def gradient(self, x: NDArray) -> NDArray:
        return x.copy()


def bare(ray: Any, actors: list[Any], d: int, updates: int) -> float:
    """Seconds for ``updates`` updates."""
    x = np.ones(d, np.float32)
    large = x.nbytes > INLINE_BYTES

    def give(actor: Any) -> None:
        pending[actor.gradient.remote(ray.put(x) if large else x)] = actor

    pending: dict[Any, Any] = {}
    began_s = time.perf_counter()
    for actor in actors:
        give(actor)
    done = 0
    while done < updates:
        refs = list(pending)
        ready, _ = ray.wait(refs, num_returns=1)
        if len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            x = x - LR * ray.get(ref)
            give(pending.pop(ref))
            done += 1
    spent_s = time.perf_counter() - began_s
    ray.wait(list(pending), num_returns=len(pending))
    return spent_s


class Kept(RayBackend):
    """Takes actors that are there already, and leaves them."""

    held: ClassVar[list[Any]] = []

    def _fill(self, seat: ActorSlot) -> None:
        if not self.held:
            super()._fill(seat)
            return
        seat.actor = self.held.pop()
        seat.ready = seat.actor.__ray_call__.remote(ServerActor.__init__, *self._parts)

    def close(self) -> None:
        for seat in self._seats:
            if seat.actor is not None and seat.ready is None:
                self.held.append(seat.actor)
                seat.actor = None
        super().close()


class Engine(backends.Ray):
    """``ray``, whose actors stay for the next run."""

    def backend(self, experiment: Experiment, folder: Path | None = None) -> RayBackend:
        return Kept(experiment, self)


def engine(n: int, d: int, updates: int) -> float:
    """The same: of the run, without the start of its actors."""
    result = offbeat.run(
        Copy(n, d),
        pure(lr=LR),
        f"{n} real",
        engine=Engine(1, "local", 0.0, 0.0, None, "spread", 0, "cpu"),
        clock="real",
        stop={"gradients": updates},
        evaluate={"steps": 10**9},
    )
    assert len(result.trace) == updates
    return float(result.final["time_s"])


def private(process: psutil.Process) -> float:
    """MB that are a process's own."""
    return float(process.memory_full_info().uss) / 1e6


def main() -> None:
    options = arguments(str(__doc__))
    repeats = 3 if options.quick else 5
    keep_freed()
    print(f"# Ray engine, {where()}, Ray {load().__version__}")
    began_s = time.perf_counter()
    session = start()
    ray = load()
    print(f"# Ray itself: {time.perf_counter() - began_s:.1f} s to start")
    counts = (2, 8) if options.quick else (2, 8, 16)
    sizes = {1_000: 2000, 1_000_000: 150} | ({} if options.quick else {10_000_000: 40})
    figures: dict[str, Any] = {}
    targets = {}
    host = ray.remote(num_cpus=0)(Bare)
    print("# updates/s, medians")
    print(f"{'n':>4} {'d':>10} {'engine':>8} {'bare':>8} {'ratio':>6}")
    for n in counts:
        actors = [host.remote() for _ in range(n)]
        ray.get([actor.ready.remote() for actor in actors])
        for d, updates in sizes.items():
            updates = max(updates, 3 * n)
            runs: dict[str, Callable[[], float]] = {
                "engine": lambda: engine(n, d, updates),  # noqa: B023
                "bare": lambda: bare(ray, actors, d, updates),  # noqa: B023
            }
            spent: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, call in runs.items():
                    spent[name].append(call())
            rates = {name: updates / statistics.median(s) for name, s in spent.items()}
            ratio = statistics.median(
                b / e for b, e in zip(spent["bare"], spent["engine"], strict=True)
            )
            key = f"n={n} d={d:,}"
            figures[key] = {name: round(rate, 1) for name, rate in rates.items()} | {
                "ratio": round(ratio, 3)
            }
            targets[f"{key}: at least 0.85x bare"] = ratio >= 0.85
            print(
                f"{n:>4} {d:>10,} {rates['engine']:8.1f} {rates['bare']:8.1f} {ratio:6.2f}",
                flush=True,
            )
        for actor in actors + Kept.held:
            ray.kill(actor)
        Kept.held.clear()
    for n in counts:
        figures[f"start n={n}"] = starting(n)
    session.stop()
    finish(figures, targets)


def starting(n: int) -> dict[str, float]:
    """How long n actors take to be there, and what each has of its own."""
    experiment = Experiment(
        task=Copy(n, 1000), algorithm=pure(), fleet=offbeat.Fleet(workers=n),
        stop=offbeat.Stop(steps=1), evaluate=offbeat.Evaluate(),
    )  # fmt: skip
    began_s = time.perf_counter()
    backend = RayBackend(experiment, backends.ray())
    took_s = time.perf_counter() - began_s
    mine = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[:1] == ["ray::Host"]
    ]
    each = statistics.median(map(private, mine))
    backend.close()
    print(f"# {n} actors: {took_s:.1f} s to start, {each:.0f} MB each of its own")
    return {"start_s": round(took_s, 2), "mb_each": round(each, 1)}


if __name__ == "__main__":
    main()
