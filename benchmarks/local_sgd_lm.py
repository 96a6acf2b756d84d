"""A language model by asynchronous Local-SGD (arXiv:2401.09135, Tables 1 and Figure 2, small).

Four workers, H local steps of AdamW, the texts of Python's help; all start from a model that one
worker trained for a while, as in the paper.  Four levels of unevenness, from equal devices to the
released profile (0.58, 0.75, 1.51 and 3.33 s a step; its geometric interpolations towards equal
ones are ours, the paper's are in a figure).  All arms make the same number of local steps and have
the same steady outer step, lr weight updates / (1 - beta) by four pseudo-gradients.  Reported:
perplexity on held-out text at the end, its spread over seeds, and local steps a virtual second;
under the released profile also on the way, by local step and by virtual second (and drawn, with
``--picture``).

Then the later methods under that profile, at the best of three outer learning rates, beside the
same of the methods above: one seed, not a comparison of papers.

Then throughput: local steps a second of the engine on the 1M model, beside a bare torch loop
(nn.Module, AdamW) of the same model and batch, interleaved.
"""

import statistics
import time

import numpy as np
import torch
from common import arguments, finish, where
from numpy.typing import NDArray

import offbeat
from offbeat.runtime.api.plots import COLOURS
from offbeat.workers.tasks import LanguageModel, lm
from offbeat.workers.tasks.lm import BYTES, SHAPES
from offbeat.workers.tasks.transformer import Transformer, next_token_loss

PROFILE = np.array([0.58, 0.75, 1.51, 3.33])
LEVELS = {"none": 0.0, "slight": 1 / 3, "moderate": 2 / 3, "very": 1.0}
H, LR, POINTS = 20, 0.7, 20
ASYNC = "charged=false, sample_shards=true, grace_s="
ARMS = {
    "sync DiLoCo": f"diloco(lr={LR}, sample_shards=true)",
    "async Nesterov": f"async-local-sgd(lr={LR / 4}, {ASYNC}0.5)",
    "async buffer": f"async-local-sgd(lr={LR}, buffer=4, {ASYNC}0.5)",
    "async DN": f"delayed-nesterov(lr={LR}, {ASYNC}0.5)",
    "DyLU, 0.5 s": f"delayed-nesterov(lr={LR}, dylu=true, {ASYNC}0.5, seconds=%s)",
    "async DN + DyLU": f"delayed-nesterov(lr={LR}, dylu=true, {ASYNC}2.5, seconds=%s)",
}


# Methods that came later; asynchronous Nesterov and the synchronous round are tried as they are.
RATES = (0.7, 0.3, 0.1)
LATER = {
    "sync DiLoCo": "diloco(lr=%s)",
    "async Nesterov": "async-local-sgd(lr=%s)",
    "async DN": "delayed-nesterov(lr=%s)",
    "look-ahead (MLA)": "look-ahead(lr=%s)",
    "HeLoCo": "heloco(lr=%s)",
    "Decoupled, quorum 2": "decoupled-diloco(lr=%s)",
    "Streaming, 4 fragments": "streaming-diloco(lr=%s)",
    "Eager": "eager-diloco(lr=%s)",
    "MuLoCo, 2 bits": "muloco(lr=%s)",
    "NoLoCo, random pairs": "noloco(lr=%s, momentum=0.7)",
}
INNER = "adamw(lr=0.001, weight_decay=0.1)"


def seconds(level: str) -> list[float]:
    """Seconds a step at a level: the profile's spread around its harmonic mean, to a power."""
    made = PROFILE ** LEVELS[level]
    return [float(s) for s in np.round(made * np.mean(1 / made) / np.mean(1 / PROFILE), 4)]


def start(task: LanguageModel, steps: int) -> NDArray:
    """A model to begin with: one worker's AdamW."""
    result = offbeat.run(
        task, "sgd(lr=1.0)", offbeat.Fleet(workers=4),
        work=f"local-steps(adamw(lr=0.003, weight_decay=0.1), steps={steps}, clip=1.0, warmup=20)",
        stop={"steps": 1}, evaluate={"steps": 1},
    )  # fmt: skip
    return result.x


def train(
    task: LanguageModel, method: str, times: list[float], budget: int, seed: int,
    inner: str = INNER, steps: int = H, topology: str | None = None,
) -> offbeat.Result:  # fmt: skip
    """One run, evaluated at twenty points."""
    work = f"local-steps({inner}, steps={steps}, clip=1.0, total={budget // 4}, last_lr=0.0001)"
    return offbeat.run(
        task, method, offbeat.Fleet(workers=4, speeds=times), topology, work=work, seed=seed,
        stop={"gradients": budget}, evaluate={"gradients": budget // POINTS},
    )  # fmt: skip


def tasks(seeds: int) -> list[LanguageModel]:
    """One a seed, each beginning with a model of its own."""
    made = []
    for seed in range(seeds):
        task = lm(size="0.1M", length=32, batch=8, workers=4, seed=seed, evaluated=256)
        begin = start(task, 300)
        task.initial = lambda _, x=begin: x.copy()  # type: ignore[misc]
        made.append(task)
    return made


def quality(
    made: list[LanguageModel], budget: int, levels: list[str], picture: str
) -> tuple[dict[str, float], dict[str, bool]]:
    figures: dict[str, float] = {}
    print(f"# perplexity after {budget} local steps (half the spread of {len(made)} seed(s)), "
          "local steps a virtual second")  # fmt: skip
    print(f"{'':<16}" + "".join(f"{level:>26}" for level in levels), flush=True)
    figures["start"] = float(np.mean([t.evaluate(t.initial(0))["perplexity"] for t in made]))
    print(f"{'start':<16}{figures['start']:>13.3f}")
    drawn = {}
    for arm, method in ARMS.items():
        line = f"{arm:<16}"
        for level in levels:
            times = seconds(level)
            text = method % times if "%s" in method else method
            runs = [train(task, text, times, budget, seed) for seed, task in enumerate(made)]
            found = [run.final["perplexity"] for run in runs]
            rate = runs[0].final["gradients"] / runs[0].final["time_s"]
            figures[f"{arm}, {level}"] = float(np.mean(found))
            figures[f"{arm}, {level}, steps/s"] = rate
            half = (max(found) - min(found)) / 2
            line += f"{np.mean(found):>13.3f} ({half:.3f}) {rate:>4.2f}"
        drawn[arm] = runs  # of the last level
        print(line, flush=True)
    print(f"# perplexity on the way, {levels[-1]}: by local step, and by virtual second")
    at = {"gradients": [budget * k // 8 for k in (1, 2, 4, 6, 8)], "time_s": [50, 100, 200, 400]}
    print(f"{'':<16}" + "".join(f"{n:>8}" for n in at["gradients"])
          + "".join(f"{n:>7}s" for n in at["time_s"]))  # fmt: skip
    for arm, runs in drawn.items():
        line = f"{arm:<16}"
        for key, marks in at.items():
            for mark in marks:
                value = float(np.mean([between(run, key, mark) for run in runs]))
                if value == value:
                    figures[f"{arm}, at {key} {mark}"] = value
                line += f"{value:>8.2f}"
        print(line, flush=True)
    if picture:
        draw(drawn, picture)
    f, last = figures, levels[-1]
    sync, dylu = "sync DiLoCo", "async DN + DyLU"
    targets = {
        "DN + DyLU at most 1% worse than sync at every level": all(
            f[f"{dylu}, {v}"] < 1.01 * f[f"{sync}, {v}"] for v in levels
        ),
        f"more than 3x the local steps a second, {last}": f[f"{dylu}, {last}, steps/s"]
        > 3 * f[f"{sync}, {last}, steps/s"],
        f"async Nesterov worse than sync, {last}": f[f"async Nesterov, {last}"]
        > f[f"{sync}, {last}"],
    }
    return figures, targets


def between(run: offbeat.Result, key: str, mark: float) -> float:
    """Perplexity where ``key`` is ``mark``, on the line between evaluations; nan beyond the end."""
    return float(np.interp(mark, run.column(key), run.column("perplexity"), right=np.nan))


def draw(drawn: dict[str, list[offbeat.Result]], path: str) -> None:
    """Perplexity by local step and by virtual second: means of the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, (key, label) in zip(
        axes, (("gradients", "local steps of all workers"), ("time_s", "virtual seconds")),
        strict=True,
    ):  # fmt: skip
        for (arm, runs), colour in zip(drawn.items(), COLOURS, strict=False):
            x = runs[0].column(key)
            y = np.array([[between(run, key, at) for at in x] for run in runs])
            axis.plot(x, y.mean(axis=0), label=arm, color=colour, lw=1.6)
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, lw=0)
        axis.set(xlabel=label)
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="perplexity, held-out text")
    axes[1].set_xlim(0, 600)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def later(task: LanguageModel, budget: int) -> dict[str, float]:
    figures, times = {}, seconds("very")
    print(f"# later methods, very uneven, {budget} local steps, one seed: perplexity by outer lr")
    print(f"{'':<24}" + "".join(f"{lr:>8}" for lr in RATES) + "   virtual s")
    for name, method in LATER.items():
        inner = INNER.replace("adamw", "muon") if "MuLoCo" in name else INNER
        steps = H // 4 if "4 fragments" in name else H
        graph = "matching" if "pairs" in name else None
        runs = [train(task, method % lr, times, budget, 0, inner, steps, graph) for lr in RATES]
        found = [run.final["perplexity"] for run in runs]
        figures[f"{name}, best"] = min(found)
        print(f"{name:<24}" + "".join(f"{value:>8.2f}" for value in found)
              + f"{runs[0].final['time_s']:>12.0f}", flush=True)  # fmt: skip
    return figures


def throughput(steps: int, repeats: int) -> tuple[dict[str, float], dict[str, bool]]:
    task = lm(size="1M", length=128, batch=16, workers=4, evaluated=1)
    module = Transformer(BYTES, 128, *SHAPES["1M"])
    optimiser = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.1)

    def bare() -> None:
        for draw in range(steps):
            inputs, targets = task._samples(
                task._order[task._draws.rows(np.array([0]), np.array([draw]))[0]]
            )
            optimiser.zero_grad()
            next_token_loss(module(inputs), targets).backward()
            optimiser.step()

    def engine() -> None:
        work = "local-steps(adamw(lr=0.001, weight_decay=0.1), steps=5)"
        offbeat.run(
            task, "delayed-nesterov", offbeat.Fleet(workers=4, speeds=PROFILE.tolist()), work=work,
            stop={"gradients": steps}, evaluate={"gradients": 10 * steps},
        )  # fmt: skip

    def spent(call) -> float:  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    bare(), engine()
    rates: dict[str, list[float]] = {"bare": [], "engine": []}
    for _ in range(repeats):
        rates["bare"].append(steps / spent(bare))
        rates["engine"].append(steps / spent(engine))
    found = {name: statistics.median(each) for name, each in rates.items()}
    ratio = statistics.median(e / b for e, b in zip(rates["engine"], rates["bare"], strict=True))
    print(f"# {task.dim:,} parameters, 16 x 128 bytes: {found['engine']:.2f} local steps/s in the "
          f"engine, {found['bare']:.2f} in a bare loop, ratio {ratio:.3f}")  # fmt: skip
    figures = {"engine steps/s": found["engine"], "bare steps/s": found["bare"], "ratio": ratio}
    return figures, {"engine at least 0.9 of a bare loop": ratio >= 0.9}


def main() -> None:
    options = arguments(
        str(__doc__),
        seeds={"type": int, "default": 2},
        steps={"type": int, "default": 1600, "help": "local steps of a run"},
        levels={"default": ",".join(LEVELS), "help": "of unevenness; the last one is drawn"},
        picture={"default": "", "help": "file to draw the curves in"},
        parts={"default": "throughput,quality,later", "help": "which of them"},
    )
    torch.set_num_threads(1)
    print(f"# local-SGD, language model, {where()}")
    quick, parts = options.quick, options.parts.split(",")
    figures: dict[str, float] = {}
    targets: dict[str, bool] = {}
    if "throughput" in parts:
        figures, targets = throughput(10 if quick else 20, 3 if quick else 5)
    seeds, budget = (1, 400) if quick else (options.seeds, options.steps)
    made = tasks(seeds)
    if "quality" in parts:
        levels = ["very"] if quick else options.levels.split(",")
        found, met = quality(made, budget, levels, options.picture)
        figures, targets = figures | found, targets | ({} if quick else met)
    if "later" in parts and not quick:
        figures |= later(made[0], budget)
    finish(figures, targets)


if __name__ == "__main__":
    main()
