"""A language model by asynchronous Local-SGD (arXiv:2401.09135, Tables 1 and Figure 2, small).

Four workers, H local steps of AdamW, the texts of Python's help; all start from a model that one
worker trained for a while, as in the paper.  Four levels of unevenness, from equal devices to the
released profile (0.58, 0.75, 1.51 and 3.33 s a step; its geometric interpolations towards equal
ones are ours, the paper's are in a figure).  All arms make the same number of local steps and have
the same steady outer step, lr weight updates / (1 - beta) by four pseudo-gradients.  Reported:
perplexity on held-out text at the end, its spread over seeds, and local steps a virtual second.

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
from offbeat.workers.tasks import LanguageModel, lm
from offbeat.workers.tasks.lm import BYTES, SHAPES
from offbeat.workers.tasks.transformer import Transformer, next_token_loss

PROFILE = np.array([0.58, 0.75, 1.51, 3.33])
LEVELS = {"none": 0.0, "slight": 1 / 3, "moderate": 2 / 3, "very": 1.0}
H, LR = 20, 0.7
ASYNC = "charged=false, sample_shards=true, grace_s="
ARMS = {
    "sync DiLoCo": f"diloco(lr={LR}, sample_shards=true)",
    "async Nesterov": f"async-local-sgd(lr={LR / 4}, {ASYNC}0.5)",
    "async buffer": f"async-local-sgd(lr={LR}, buffer=4, {ASYNC}0.5)",
    "async DN": f"delayed-nesterov(lr={LR}, {ASYNC}0.5)",
    "DyLU, 0.5 s": f"delayed-nesterov(lr={LR}, dylu=true, {ASYNC}0.5, seconds=%s)",
    "async DN + DyLU": f"delayed-nesterov(lr={LR}, dylu=true, {ASYNC}2.5, seconds=%s)",
}


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


def quality(seeds: int, budget: int, levels: list[str]) -> tuple[dict[str, float], dict[str, bool]]:
    figures: dict[str, float] = {}
    print(f"# perplexity after {budget} local steps (half the spread of {seeds} seed(s)), "
          "local steps a virtual second")  # fmt: skip
    print(f"{'':<16}" + "".join(f"{level:>26}" for level in levels), flush=True)
    tasks, begins = [], []
    for seed in range(seeds):
        task = lm(size="0.1M", length=32, batch=8, workers=4, seed=seed, evaluated=256)
        begins.append(start(task, 300))
        task.initial = lambda _, x=begins[-1]: x.copy()  # type: ignore[misc]
        tasks.append(task)
    figures["start"] = float(
        np.mean([t.evaluate(x)["perplexity"] for t, x in zip(tasks, begins, strict=True)])
    )
    print(f"{'start':<16}{figures['start']:>13.3f}")
    work = (
        f"local-steps(adamw(lr=0.001, weight_decay=0.1), steps={H}, clip=1.0, "
        f"total={budget // 4}, last_lr=0.0001)"
    )
    for arm, method in ARMS.items():
        line = f"{arm:<16}"
        for level in levels:
            times = seconds(level)
            text = method % times if "%s" in method else method
            runs = [
                offbeat.run(
                    task, text, offbeat.Fleet(workers=4, speeds=times), work=work, seed=seed,
                    stop={"gradients": budget}, evaluate={"gradients": budget},
                )
                for seed, task in enumerate(tasks)
            ]  # fmt: skip
            found = [run.final["perplexity"] for run in runs]
            rate = runs[0].final["gradients"] / runs[0].final["time_s"]
            figures[f"{arm}, {level}"] = float(np.mean(found))
            figures[f"{arm}, {level}, steps/s"] = rate
            half = (max(found) - min(found)) / 2
            line += f"{np.mean(found):>13.3f} ({half:.3f}) {rate:>4.2f}"
        print(line, flush=True)
    f = figures
    sync, dylu = "sync DiLoCo", "async DN + DyLU"
    targets = {
        "DN + DyLU at most 1% worse than sync at every level": all(
            f[f"{dylu}, {v}"] < 1.01 * f[f"{sync}, {v}"] for v in levels
        ),
        "more than 3x the local steps a second, very uneven": f[f"{dylu}, very, steps/s"]
        > 3 * f[f"{sync}, very, steps/s"],
        "async Nesterov worse than sync, very uneven": f["async Nesterov, very"]
        > f[f"{sync}, very"],
    }
    return figures, targets


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
    )
    torch.set_num_threads(1)
    print(f"# local-SGD, language model, {where()}")
    quick = options.quick
    figures, targets = throughput(10 if quick else 20, 3 if quick else 5)
    levels = ["very"] if quick else list(LEVELS)
    more = quality(*((1, 400) if quick else (options.seeds, options.steps)), levels)
    finish(figures | more[0], targets | ({} if quick else more[1]))


if __name__ == "__main__":
    main()
