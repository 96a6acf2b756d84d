"""Gossip on Ray actors beside a bare exchange between actors that does nothing else.

    python benchmarks/ray_gossip.py [--nodes 2 8] [--dims 1000 250000] [--seconds 5] [--repeat 3]

Both are rings in which a node goes on when both its neighbours' vectors of the round are there.
Ours also mixes, computes a gradient (of a quadratic), records every round and can lose an actor;
the bare one sends a vector and counts.  Rounds/s, medians of runs that alternate; one Ray for all.
"""

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np

import offbeat
from offbeat.runtime.actors.crew import INLINE_BYTES
from offbeat.runtime.actors.start import load, start
from offbeat.workers.tasks import quadratic

WARM_S = 1.0


class Bare:
    """A node that sends its vector to its neighbours, round by round."""

    def __init__(self, d):
        self.x, self.round, self.heard = np.ones(d), 0, defaultdict(int)

    def meet(self, neighbours):
        self.post = [actor.hear.options(num_returns=0) for actor in neighbours]

    def begin(self):
        self._send()

    def hear(self, k, x):
        self.heard[k] += 1
        while self.heard[self.round] == len(self.post):
            del self.heard[self.round]
            self.round += 1
            self._send()

    def _send(self):
        x = self.x if self.x.nbytes <= INLINE_BYTES else ray.put(self.x)
        for post in self.post:
            post.remote(self.round, x)

    def done(self):
        return self.round


def bare(n, d, seconds):
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
    return rate


def ours(n, d, seconds):
    result = offbeat.run(
        quadratic(d, workers=n), "dsgd(lr=0.01)", f"{n} real", "ring" if n > 2 else "complete",
        stop={"seconds": WARM_S + seconds}, evaluate={"seconds": 10 * seconds}, engine="ray",
    )  # fmt: skip
    ends = result.trace[result.trace[:, 1] == 0][:, 0]
    late = ends[ends >= WARM_S]
    return (len(late) - 1) / (late[-1] - late[0])


def main():
    global ray
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dims", type=int, nargs="+", default=[1000, 250_000])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    ray, session = load(), start()
    try:
        print(f"{'nodes':>5} {'d':>9} {'bare':>9} {'offbeat':>9} {'ratio':>6}   rounds/s")
        for n in options.nodes:
            for d in options.dims:
                pairs = [
                    (bare(n, d, options.seconds), ours(n, d, options.seconds))
                    for _ in range(options.repeat)
                ]
                one, other = (statistics.median(rates) for rates in zip(*pairs, strict=True))
                print(f"{n:5} {d:9} {one:9.1f} {other:9.1f} {other / one:6.2f}", flush=True)
    finally:
        session.stop()


if __name__ == "__main__":
    main()
