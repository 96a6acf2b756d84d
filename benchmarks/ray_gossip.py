"""Rounds a second of gossip on Ray actors, beside a bare exchange that does the same arithmetic.

Rings (of two: one link) in which a node goes on when its neighbours' vectors of the round are
there: D-SGD whose gradient is a copy of the model, so that what is left is moving and mixing
vectors.  *bare* is a hand-written actor: it sends its vector to its neighbours by calls without an
answer, above 100 kB through one ``ray.put``, and mixes and steps when all have come; it records
nothing, checks nothing and knows no failure.  *engine* is ``offbeat.run`` under a real clock with
speeds "real": it records every round, checks what came and that gradients are finite, and can lose
an actor.  Both run in turn, several times, on one Ray; medians are compared.

Expected: the nodes' own thread and its queue cost 0.1 ms a round beside a Ray call's millisecond,
0.85 of the bare exchange at d = 1,000; with megabytes, what Ray's store costs hides the rest.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
from common import arguments, finish, where
from ray_engine import Copy

import offbeat
from offbeat.runtime.base.tensors import keep_freed
from offbeat.runtime.on_ray.server import INLINE_BYTES
from offbeat.runtime.on_ray.start import load, start

LR = 0.01
WARM_S = 1.0


class Bare:
    """A node that mixes its vector with its neighbours', round by round."""

    def __init__(self, d: int) -> None:
        keep_freed()
        self.begun = False
        self.x, self.round = np.ones(d, np.float32), 0
        self.heard: dict[int, list[Any]] = defaultdict(list)

    def meet(self, neighbours: list[Any]) -> None:
        self.put = load().put
        self.post = [actor.hear.options(num_returns=0) for actor in neighbours]

    def begin(self) -> None:
        self.begun = True
        self.send()
        self.go_on()

    def send(self) -> None:
        x = self.put(self.x) if self.x.nbytes > INLINE_BYTES else self.x
        for post in self.post:
            post.remote(self.round, x)

    def hear(self, k: int, x: Any) -> None:
        self.heard[k].append(x)
        if self.begun:
            self.go_on()

    def go_on(self) -> None:
        while len(self.heard[self.round]) == len(self.post):
            gradient = self.x.copy()
            weight = np.float32(1 / (len(self.post) + 1))
            mixed = weight * self.x
            for other in self.heard.pop(self.round):
                mixed += weight * other
            self.x = mixed - np.float32(LR) * gradient
            self.round += 1
            self.send()

    def done(self) -> int:
        return self.round


def bare(ray: Any, n: int, d: int, seconds: float) -> float:
    """Rounds a second."""
    actors = [ray.remote(num_cpus=0)(Bare).remote(d) for _ in range(n)]
    for i, actor in enumerate(actors):
        actor.meet.remote([actors[j] for j in sorted({(i - 1) % n, (i + 1) % n})])
    ray.get([actor.done.remote() for actor in actors])
    for actor in actors:
        actor.begin.remote()
    time.sleep(WARM_S)
    first, began_s = ray.get(actors[0].done.remote()), time.perf_counter()
    time.sleep(seconds)
    rate = (ray.get(actors[0].done.remote()) - first) / (time.perf_counter() - began_s)
    for actor in actors:
        ray.kill(actor)
    return float(rate)


def ours(n: int, d: int, seconds: float) -> float:
    """Rounds a second."""
    result = offbeat.run(
        Copy(n, d), f"dsgd(lr={LR})", f"{n} real", "ring" if n > 2 else "complete",
        stop={"seconds": WARM_S + seconds}, evaluate={"seconds": 10 * seconds}, engine="ray",
    )  # fmt: skip
    ends = result.trace[result.trace[:, 1] == 0][:, 0]
    late = ends[ends >= WARM_S]
    return float((len(late) - 1) / (late[-1] - late[0]))


def main() -> None:
    """Run it."""
    given = arguments(str(__doc__).split("\n")[0], seconds={"type": float, "default": 4.0})
    seconds, repeat = (1.0, 1) if given.quick else (given.seconds, 3)
    ray, session = load(), start()
    print(f"# Ray gossip, {where()}, Ray {ray.__version__}")
    print("# rounds/s, medians")
    print(f"{'n':>4} {'d':>9} {'engine':>8} {'bare':>8} {'ratio':>6}")
    figures: dict[str, Any] = {}
    targets = {}
    try:
        for n in (2, 8):
            for d in (1_000, 1_000_000):
                pairs = [(ours(n, d, seconds), bare(ray, n, d, seconds)) for _ in range(repeat)]
                engine, plain = (statistics.median(rates) for rates in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"{n:4} {d:9,} {engine:8.1f} {plain:8.1f} {ratio:6.2f}", flush=True)
                name = f"n={n} d={d:,}"
                figures[name] = {"engine": round(engine, 1), "bare": round(plain, 1),
                                 "ratio": round(ratio, 3)}  # fmt: skip
                targets[f"{name}: at least 0.8x bare"] = ratio >= 0.8
    finally:
        session.stop()
    finish(figures, targets)


if __name__ == "__main__":
    main()
