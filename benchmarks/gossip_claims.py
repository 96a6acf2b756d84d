"""What is claimed of gossip methods, each claim with its magnitude, as one table.

The problems, in the order of the claims:

* *synthetic*, of MoTEF's authors: f_i = 1/2 ||A_i x - b_i||^2, A_i = (i+1)/sqrt(n) I, b_i drawn
  with variance zeta/(i+1)^2, d = 20, a ring; noise of variance sigma^2 in all;
* *centres*: f_i = 1/2 ||x - b_i||^2 with mean b = 0, so that n changes nothing but n;
* *sorted*: logistic regression on a ring of 10 nodes, sorted by label;
* *canonical*: 8 nodes, each with its own A_i and b_i, d = 20, exact gradients.

Errors are mean_i ||x_i - x*||^2 = ||xbar - x*||^2 + consensus on the first two, the root of that on
the last.  On reading the table:

* On *centres* the mean of D-SGD, CHOCO and BEER is the same SGD on averaged gradients whatever they
  send: the speed-up tests the engine's noise more than the methods, and only consensus tells them
  apart.  The mean has an error of its own, which no method can lower at this step size; with it,
  the methods are closer together than their consensus is.
* D-SGD, CHOCO and DeepSqueeze are read after a step and before the averaging that follows it: one
  local step farther out than published figures.
* On *sorted*, gradients are exact for the bundled data, and of batch 100 for a file.
* Claims that need a server (EF14, EF21, EControl, DIANA, Clip21; signs against noise and heavy
  tails) are not gossip, and are not here.
"""

from typing import Any, NamedTuple

import numpy as np
from common import arguments, finish, where
from numpy.typing import NDArray

import offbeat
from offbeat.algorithms.gossip import Gossip, beer, motef
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.runtime.gossip.stacked import Broadcast, RoundGraph
from offbeat.runtime.run.records import Records
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.tasks import LeastSquares, Quadratic, Task

D, TOP = 20, "topk(2)"
EVERY = 10  # rounds between two measurements


class Row(NamedTuple):
    """One line of the table."""

    claim: str
    said: str
    found: str
    seeds: int
    holds: bool


class Synthetic(LeastSquares):
    """The problem of MoTEF's authors, started ``offset`` away from the optimum."""

    def __init__(self, n: int, zeta: float, sigma: float, offset: float, seed: int) -> None:
        scale = np.arange(1, n + 1)
        a = scale[:, None, None] / np.sqrt(n) * np.eye(D)
        b = np.random.default_rng(seed).standard_normal((n, D)) * np.sqrt(zeta) / scale[:, None]
        super().__init__(a, b, sigma / np.sqrt(D), seed)
        self.offset = offset

    def initial(self, seed: int) -> NDArray:
        """Near the optimum."""
        return self.optimum + self.offset


def centres(n: int, seed: int, sigma: float = 10.0, variance: float = 10.0) -> Quadratic:
    b = np.random.default_rng(seed).standard_normal((n, D)) * np.sqrt(variance)
    return Quadratic(b - b.mean(axis=0), None, sigma / np.sqrt(D), seed)


def canonical() -> LeastSquares:
    r = np.random.RandomState(0)  # so that others can draw the same
    common, a = r.randn(D), r.randn(8, 30, D) / np.sqrt(30)
    own = [(r.randn(D), r.randn(30)) for _ in range(8)]
    b = [a[i] @ (common + apart) + 0.1 * noise for i, (apart, noise) in enumerate(own)]
    return LeastSquares(a, np.array(b))


def errors(task: Task, method: str, rounds: int, tail: int) -> NDArray:
    """||xbar - x*||^2 and consensus, mean of the last ``tail`` rounds on a ring."""
    result = offbeat.run(
        task,
        method,
        topology="ring",
        stop={"steps": rounds},
        evaluate={"steps": EVERY},
        record={"trace": False},
    )
    kept = slice(-(tail // EVERY), None)
    mean, apart = result.column("distance2")[kept], result.column("consensus")[kept]
    return np.array([mean.mean(), (apart**2).mean()])


def shown(values: Any) -> str:
    """Mean and spread over the seeds."""
    spread = f" ±{np.std(values):.1g}" if np.size(values) > 1 else ""
    return f"{np.mean(values):.2g}{spread}"


# -- 1..4: noise, nodes, consensus, heterogeneity ---------------------------------------------


def momentum(quick: bool) -> list[Row]:
    seeds, rounds = (2, 4000) if quick else (5, 10_000)
    lams = (1.0, 0.05) if quick else (1.0, 0.5, 0.05, 0.005)
    found = {
        lam: [
            errors(
                Synthetic(16, 10, 10, 1 / D, seed),
                f"motef(lr=0.0005, gamma=0.1, lam={lam}, compressor={TOP})",
                rounds,
                500,
            ).sum()
            for seed in range(seeds)
        ]
        for lam in lams
    }
    ratio = np.mean(found[1.0]) / np.mean(found[0.05])
    text = ", ".join(f"{lam:g}: {shown(values)}" for lam, values in found.items())
    return [
        Row(
            "1 MoTEF's momentum lowers the noise floor (synthetic, n=16)",
            "lam 1/.5/.05/.005: .0037/.0009/.0005/.0004; ratio 1 to .05 at least 5",
            f"{text}; ratio {ratio:.1f}",
            seeds,
            ratio >= 5,
        )
    ]


def nodes(quick: bool) -> list[Row]:
    lr, sigma2, burn = 2e-3, 100.0, 2000
    seeds, rounds = (2, 6000) if quick else (5, 10_000)
    rest = f"lr={lr}, gamma=0.1, compressor={TOP})"
    methods = {
        "MoTEF(.05)": f"motef(lam=0.05, {rest}",
        "D-SGD": f"dsgd(lr={lr})",
        "BEER": f"beer({rest}",
        "CHOCO": f"choco({rest}",
    }

    def measured(name: str, n: int) -> NDArray:
        found = [
            errors(centres(n, seed), methods[name], rounds, rounds - burn) for seed in range(seeds)
        ]
        return np.array(found)

    sizes = (2, 8, 16, 32) if quick else (2, 4, 8, 16, 32)
    by_size = {n: measured("MoTEF(.05)", n) for n in sizes}
    off = {n: found[:, 0].mean() / (lr * sigma2 / (2 * n)) for n, found in by_size.items()}
    speedup = Row(
        "2 linear speed-up of the mean model (centres, MoTEF(.05))",
        "E‖xbar‖² = lr sigma²/(2n), within 15%",
        ", ".join(
            f"n={n}: {shown(by_size[n][:, 0])} ({100 * (ratio - 1):+.0f}%)"
            for n, ratio in off.items()
        ),
        seeds,
        all(abs(ratio - 1) <= 0.15 for ratio in off.values()),
    )
    by_method = {
        name: by_size[16] if n == 0 else measured(name, 16) for n, name in enumerate(methods)
    }
    apart = {name: found[:, 1].mean() for name, found in by_method.items()}
    consensus = Row(
        "3 consensus separates methods (centres, n=16): mean ‖x_i - xbar‖²",
        "MoTEF .0024, D-SGD .032, BEER .046, CHOCO 2.08; MoTEF < BEER/10 < CHOCO/100",
        ", ".join(f"{name}: {shown(found[:, 1])}" for name, found in by_method.items()),
        seeds,
        apart["MoTEF(.05)"] < apart["BEER"] / 10 < apart["CHOCO"] / 100,
    )
    total = {name: found.sum(axis=1).mean() for name, found in by_method.items()}
    everything = Row(
        "3' the same with the mean's own error: mean ‖x_i - x*‖²",
        "the same order of the methods",
        ", ".join(f"{name}: {shown(found.sum(axis=1))}" for name, found in by_method.items())
        + f"; BEER/MoTEF {total['BEER'] / total['MoTEF(.05)']:.1f}",
        seeds,
        total["MoTEF(.05)"] < min(total["D-SGD"], total["BEER"]) < total["CHOCO"],
    )
    return [speedup, consensus, everything]


def heterogeneity(quick: bool) -> list[Row]:
    """Of the published nine lr and three gamma, larger lr and smaller gamma are no better.

    (One seed, lr up to 3e-3; MoTEF with lam 0.1 only, where gamma 0.01 was a tenth better at
    lr 1e-4.)  At lr 1e-4, 5e-4 of the error is left of the start: tuned, CHOCO grows by less than
    its floor does, and the levels of BEER and MoTEF are above the .00056 and .00049 said, near
    theory's 7e-4 (the start's, and lr sigma^2/(2 n h), h = 1.875).  All zeta have the same noise:
    ratios spread less than levels.
    """
    seeds, rounds = (1, 8000) if quick else (3, 20_000)
    zetas, lrs = ((20, 100), (5e-4,)) if quick else ((20, 60, 100), (1e-4, 5e-4))
    rest = f"gamma=0.1, compressor={TOP})"
    methods = {"CHOCO": "choco(", "BEER": "beer(", "MoTEF": "motef(lam=0.1, "}
    found = {
        (name, zeta, lr): [
            errors(
                Synthetic(4, zeta, 5, 1 / np.sqrt(D), seed), f"{head}lr={lr}, {rest}", rounds, 500
            ).sum()
            for seed in range(seeds)
        ]
        for name, head in methods.items()
        for zeta in zetas
        for lr in lrs
    }

    def row(claim: str, allowed: tuple[float, ...], said: str) -> Row:
        best = {
            (name, zeta): min((found[name, zeta, lr] for lr in allowed), key=np.mean)
            for name in methods
            for zeta in zetas
        }
        grown = {
            name: np.mean(best[name, zetas[-1]]) / np.mean(best[name, zetas[0]]) for name in methods
        }
        text = "; ".join(
            f"{name}: {', '.join(shown(best[name, zeta]) for zeta in zetas)} (x{grown[name]:.2f})"
            for name in methods
        )
        holds = grown["CHOCO"] > 1.5 and max(grown["BEER"], grown["MoTEF"]) < 1.15
        return Row(claim, said, text, seeds, bool(holds))

    zeta_text = "/".join(map(str, zetas))
    rows = [
        row(
            f"4 heterogeneity zeta {zeta_text}, lr 5e-4 (synthetic, n=4)",
            (5e-4,),
            "CHOCO grows by more than 1.5, BEER and MoTEF by less than 1.15",
        )
    ]
    if not quick:
        rows.append(
            row(
                f"4' the same, each lr tuned over {' '.join(f'{lr:g}' for lr in lrs)}",
                lrs,
                "CHOCO .00098/.00147/.00193, BEER .00056, MoTEF .00049; limits as above",
            )
        )
    return rows


# -- 5: data sorted by label --------------------------------------------------------------------


def sorted_labels(quick: bool, data: str) -> list[Row]:
    """Every method takes its best step size by ||grad f(xbar)||: small steps lower the floors of
    D-SGD and CHOCO, and slow all down."""
    lrs = (0.5, 0.1)
    rest = "gamma=0.3, compressor=topk(0.2), "
    methods = {
        "D-SGD": "dsgd(",
        "CHOCO": f"choco({rest}",
        "DSGT": "dsgt(",
        "BEER": f"beer({rest}",
        "MoTEF(.1)": f"motef(lam=0.1, {rest}",
    }
    bundled = data == "digits"
    task = {
        "name": "logistic",
        "data": data,
        "partition": "sorted",
        "batch": "full" if bundled else 100,
        "l2": 1e-3,
        "dtype": "float64",
    }

    def measured(method: str) -> tuple[float, float]:
        result = offbeat.run(
            task,
            method,
            "10",
            topology="ring",
            stop={"steps": 2000 if quick else 3000},
            evaluate={"steps": 50},
            record={"trace": False},
        )
        norm, apart = (result.column(key)[-5:].mean() for key in ("grad_norm", "consensus"))
        return float(norm), float(apart)

    found = {
        name: min((*measured(f"{head}lr={lr})"), lr) for lr in lrs)
        for name, head in methods.items()
    }
    tracked = max(found[name][0] for name in ("DSGT", "BEER", "MoTEF(.1)"))
    ratio = min(found["D-SGD"][0], found["CHOCO"][0]) / tracked
    return [
        Row(
            f"5 tracking removes the floor ({data if bundled else 'file'} sorted by label, n=10 "
            f"ring, lr tuned over {lrs}): ‖grad f(xbar)‖, consensus",
            "a9a: D-SGD/CHOCO .044/.048, BEER/MoTEF .0027/.0024; at least 8 times lower",
            ", ".join(
                f"{name}: {g:.2g}, {apart:.2g} (lr {lr:g})"
                for name, (g, apart, lr) in found.items()
            )
            + f"; at least {ratio:.3g} times lower",
            1,
            bool(ratio >= 8),
        )
    ]


# -- 6: changing graphs ------------------------------------------------------------------------


class PlainSum(Broadcast):
    """s <- s + W_k q: the sum of copies as nodes keep it where the weights never change."""

    total: Any = 0.0
    known: Any = 0.0  # of what is published, when messages travelled last

    def start(self, value: NDArray) -> None:
        super().start(value)
        self.total, self.known = value, value.copy()

    def exchange(self, now: RoundGraph) -> NDArray:
        if self.value is not None:
            self.total = self.total + now.matrix @ (self.value - self.known)
            self.known = self.value.copy()
        return super().exchange(now)

    def mix(self) -> NDArray:
        return self.total - self.known


class Plain(Rounds):
    """Rounds with plain sums, wrong as soon as weights change."""

    def _wire(self, name: str, seed: int) -> PlainSum:
        method = self.method
        channel = method.channels[name]
        return PlainSum(method.compressor, channel, False, seed, name)


def changing(quick: bool) -> list[Row]:
    rounds = 3000
    task = canonical()
    lr = 0.1 / task.smoothness
    methods = {
        "BEER": beer(lr=lr, gamma=0.2, compressor="topk(4)"),
        "MoTEF": motef(lr=lr, gamma=0.2, lam=0.2, compressor="topk(4)"),
    }
    kinds: dict[str, tuple[type[Rounds], str]] = {
        "link copies": (Rounds, "links"),
        "global copies": (Rounds, "global"),
        "plain sum": (Plain, "links"),
    }

    def error(method: Gossip, graph: str, kind: type[Rounds], replicas: str) -> float:
        fleet = offbeat.Fleet(workers=8)
        engine = kind(
            task,
            method,
            TOPOLOGIES.parse(graph, n=8),
            fleet,
            fleet.timing(0, 0),
            Records(fleet, None),
            seed=0,
            replicas=replicas,
            stop=Stop(steps=rounds),
            evaluate=Evaluate(steps=rounds),
        )
        return distance(engine.run()[1])

    rows = []
    for graph in ("matching", "one-peer-exponential"):
        found = {
            kind: [error(method, graph, *how) for method in methods.values()]
            for kind, how in kinds.items()
        }
        right = max(*found["link copies"], *found["global copies"])
        texts = (f"{kind} {' / '.join(f'{e:.2g}' for e in by)}" for kind, by in found.items())
        rows.append(
            Row(
                f"6 BEER / MoTEF on changing graphs: {graph} (canonical, {rounds} rounds)",
                "copies of links or of all: 1e-12; the plain sum of differences stalls (1.2)",
                "; ".join(texts),
                1,
                right < 1e-12 and min(found["plain sum"]) > 0.1,
            )
        )
    return rows


def distance(row: dict[str, float]) -> float:
    """The root of mean_i ||x_i - x*||^2."""
    return float(np.sqrt(row["distance2"] + row["consensus"] ** 2))


# -- 7, 8: unequal speeds; what compression leaves ----------------------------------------------


def unequal(quick: bool) -> list[Row]:
    task = canonical()
    lr = 0.1 / task.smoothness
    methods = {"D-SGD": f"dsgd(lr={lr})", "AD-PSGD": f"ad-psgd(lr={lr})", "DSGT": f"dsgt(lr={lr})"}
    if not quick:
        methods["BEER"] = f"beer(lr={lr}, gamma=0.2, compressor=topk(4))"
        methods["MoTEF"] = f"motef(lr={lr}, gamma=0.2, lam=0.2, compressor=topk(4))"
    # Where each node counts as often as it answers: argmin sum_i f_i / seconds_i.
    a = task.a / np.sqrt(np.arange(1, 9))[:, None, None]
    b = task.b / np.sqrt(np.arange(1, 9))[:, None]
    often = LeastSquares(a, b).optimum
    found, texts = {}, []
    for name, method in methods.items():
        result = offbeat.run(
            task,
            method,
            "8 1..8",
            topology="ring",
            mode="asynchronous",
            stop={"steps": 3000},
            record={"trace": False},
        )
        found[name] = distance(result.final)
        biased = np.linalg.norm(result.x - often)
        texts.append(f"{name}: {found[name]:.2g}" + (f" ({biased:.2g})" if biased < 1 else ""))
    tracked = max(e for name, e in found.items() if name not in ("D-SGD", "AD-PSGD"))
    return [
        Row(
            "7 asynchronous gossip at speeds 1..8 (canonical, 3000 rounds a node on average)",
            "D-SGD and AD-PSGD end 1.2 away, where fast nodes count more (in brackets: how far "
            "from that point); tracking ends at the optimum, 1e-14",
            ", ".join(texts),
            1,
            tracked < 1e-12 and min(found["D-SGD"], found["AD-PSGD"]) > 1,
        )
    ]


def compression(quick: bool) -> list[Row]:
    task = canonical()
    lr = 0.1 / task.smoothness
    methods = {
        "CHOCO top-4": f"choco(lr={lr}, gamma=0.2, compressor=topk(4))",
        "DeepSqueeze top-4": f"deepsqueeze(lr={lr}, gamma=0.1, compressor=topk(4))",
        "DSGT": f"dsgt(lr={lr})",
        "BEER top-4": f"beer(lr={lr}, gamma=0.2, compressor=topk(4))",
        "BEER signs": f"beer(lr={lr}, gamma=0.2, compressor=scaled-sign)",
    }
    found = {}
    for name, method in methods.items():
        result = offbeat.run(
            task, method, topology="ring", stop={"steps": 1000}, record={"trace": False}
        )
        found[name] = distance(result.final)
    return [
        Row(
            "8 error feedback and signs without a server (canonical, round 1000)",
            "CHOCO stops at 1.02, DeepSqueeze at 1.57; DSGT 4e-9, BEER 6e-7, on its way with "
            "signs too",
            ", ".join(f"{name}: {e:.2g}" for name, e in found.items()),
            1,
            min(found["CHOCO top-4"], found["DeepSqueeze top-4"]) > 0.9
            and max(found["DSGT"], found["BEER top-4"], found["BEER signs"]) < 1e-4,
        )
    ]


def main() -> None:
    options = arguments(
        str(__doc__),
        data={
            "default": "digits",
            "help": "for claim 5: digits, or a LibSVM or .npz file [%(default)s]",
        },
        only={"default": "12345678", "help": "digits of the claims to measure [%(default)s]"},
    )
    parts = {
        "1": momentum,
        "23": nodes,
        "4": heterogeneity,
        "5": lambda quick: sorted_labels(quick, options.data),
        "6": changing,
        "7": unequal,
        "8": compression,
    }
    print(f"# {where()}")
    print("| claim | theory or paper says | found (mean ± spread over seeds) | seeds | holds |")
    print("|---|---|---|---|---|")
    rows: list[Row] = []
    for numbers, measure in parts.items():
        if set(numbers) & set(options.only):
            for row in measure(options.quick):
                *texts, holds = row
                print(f"| {' | '.join(map(str, texts))} | {'yes' if holds else 'NO'} |", flush=True)
                rows.append(row)
    names = [row.claim.split(" (")[0] for row in rows]
    finish(
        dict(zip(names, (row.found for row in rows), strict=True)),
        dict(zip(names, (bool(row.holds) for row in rows), strict=True)),
    )


if __name__ == "__main__":
    main()
