"""Asynchronous gossip under the virtual clock: gradients a second, of nodes at their own pace.

Every node is a live node; what is measured is what an event costs: a gradient of a quadratic, and
the messages of its exchanges.  ``python benchmarks/against.py REVISION asynchronous_gossip.py``
compares with another build.
"""

import time

from common import arguments, finish, where

import offbeat

# Method, nodes, dimension, rounds: small models, where the arithmetic is not all; and a large one.
CELLS = [
    ("dsgd(lr=0.05)", 64, 20, 100),
    ("dsgd(lr=0.05)", 16, 100_000, 20),
    ("dsgt(lr=0.05)", 64, 20, 60),
    ("ad-psgd(lr=0.05)", 64, 20, 150),
    ("choco(lr=0.05, compressor='topk(0.1)')", 64, 1000, 50),
    ("beer(lr=0.01, compressor='topk(0.1)')", 64, 1000, 30),
    ("gradient-push(lr=0.05)", 64, 20, 100),
]
FLEETS = {"alike": "{n} 1.0", "unequal, latency": "{n} lognormal(0.5) latency_s=0.3"}


def main() -> None:
    args = arguments(__doc__)
    print(where())
    print(f"{'method, nodes, d':52} {'fleet':18} {'gradients/s':>12}")
    figures = {}
    offbeat.run("quadratic", "dsgd", "4", "ring", mode="asynchronous", stop={"steps": 1})  # imports
    for method, n, d, rounds in CELLS:
        for name, fleet in FLEETS.items():
            words = f"quadratic({d}, workers={n})", method, fleet.format(n=n), "ring"
            stop = {"steps": rounds if args.quick else 5 * rounds}
            began_s = time.perf_counter()
            result = offbeat.run(*words, mode="asynchronous", stop=stop, evaluate={"steps": 10**6})
            rate = result.final["gradients"] / (time.perf_counter() - began_s)
            cell = f"{method.split('(')[0]} n={n} d={d}"
            figures[f"{cell}, {name}"] = round(rate, 1)
            print(f"{cell:52} {name:18} {rate:12.0f}", flush=True)
    finish(figures, {})


if __name__ == "__main__":
    main()
