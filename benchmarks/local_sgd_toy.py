"""The toy of asynchronous Local-SGD (google-deepmind/asyncdiloco): sync, async, buffer, delayed.

Four workers of 0.58, 0.75, 1.51 and 3.33 s a step, H = 20 steps of AdamW, 8,000 local steps in
all.  "step" is the steady displacement by four pseudo-gradients, lr weight updates / (1 - beta):
only arms of like step can be compared, which is why ``async Nesterov`` is here twice.  Beside the
losses stand those of an independent program written from the released code's definition (seeds
42 to 44), where one was run.  As released: AdamW begins anew in every job, and its first step has
the full learning rate; the window's rest is not waited out.  Not as released: shards are drawn by
how far they lag behind, not the least visited; other random numbers, so seeds differ.
"""

import time

import numpy as np
from common import arguments, finish, where

import offbeat
from offbeat.workers.tasks import mixtures
from offbeat.workers.work import LocalSteps, adamw

SECONDS = [0.58, 0.75, 1.51, 3.33]
H, ALL = 20, 8000
WINDOW = "grace_s=0.5, charged=false, sample_shards=true"
DYLU = f"dylu=true, seconds={SECONDS}"
# Arm -> method, step, and the other program's final loss by hidden width.
ARMS = {
    "sync DiLoCo": ("diloco(lr=0.7, sample_shards=true)", 7.0, {2048: 1.1356, 16384: 1.028}),
    "async Nesterov, tuned": (
        f"async-local-sgd(lr=0.07, weight=0.5, {WINDOW})", 1.4, {2048: 1.1745, 16384: 1.145}
    ),
    "async Nesterov, matched": (
        f"async-local-sgd(lr=0.35, weight=0.5, {WINDOW})", 7.0, {2048: 1.1317, 16384: 1.092}
    ),
    "async buffer of 4": (f"async-local-sgd(lr=0.7, buffer=4, {WINDOW})", 7.0, {2048: 1.1404}),
    "async DN": (f"delayed-nesterov(lr=0.7, {WINDOW})", 7.0, {2048: 1.1408, 16384: 1.070}),
    "async DN + DyLU": (
        f"delayed-nesterov(lr=0.7, {WINDOW}, {DYLU})", 7.0, {2048: 1.1351, 16384: 1.074}
    ),
    "sync SGD": ("diloco(lr=0.7, outer=sgd, sample_shards=true)", 0.7, {2048: 1.1918}),
    "async SGD": (f"async-local-sgd(lr=0.7, outer=sgd, weight=0.5, {WINDOW})", 1.4, {2048: 1.1734}),
    "async SGD, matched": (
        f"async-local-sgd(lr=0.7, outer=sgd, weight=0.25, {WINDOW})", 0.7, {2048: 1.1918}
    ),
}  # fmt: skip


class Released(LocalSteps):
    """Local steps whose first has the full learning rate, as in the released code."""

    def rate(self, position: int, step: int) -> float:
        return super().rate(position, step) if step else self.inner.lr


def main() -> None:
    options = arguments(
        str(__doc__),
        hidden={"type": int, "default": 2048},
        seeds={"type": int, "default": 1},
        arms={"default": "", "help": "some of them, by name, with semicolons between"},
    )
    hidden = 256 if options.quick else options.hidden
    chosen = options.arms.split(";") if options.arms else list(ARMS)
    print(f"# local-SGD toy, hidden {hidden}, {options.seeds} seed(s), {where()}")
    print(f"{'arm':<24}{'step':>5} {'other':>7} {'final':>7} {'spread':>7} {'accuracy':>9} "
          f"{'virtual s':>10} {'highest':>8} {'wall s':>7}")  # fmt: skip
    work = Released(adamw(2e-4, weight_decay=1e-3), H, total=ALL // 4, last_lr=1e-6, fresh=True)
    figures: dict[str, float] = {}
    times: dict[str, float] = {}
    for arm in chosen:
        method, step, other = ARMS[arm]
        runs, began = [], time.perf_counter()
        for seed in range(options.seeds):
            task = mixtures(
                hidden, samples=128_000, clusters=8, seed=seed, evaluated=10_000, workers=4
            )
            runs.append(offbeat.run(
                task, method, offbeat.Fleet(workers=4, speeds=SECONDS), work=work, seed=seed,
                stop={"gradients": ALL}, evaluate={"gradients": ALL // 10},
            ))  # fmt: skip
        losses = [run.final["loss"] for run in runs]
        figures[arm], times[arm] = float(np.mean(losses)), runs[0].final["time_s"]
        print(f"{arm:<24}{step:>5} {other.get(hidden, ''):>7} {figures[arm]:>7.4f} "
              f"{max(losses) - min(losses):>7.4f} {runs[0].final['accuracy']:>9.3f} "
              f"{times[arm]:>10.1f} {max(run.column('loss').max() for run in runs):>8.3f} "
              f"{(time.perf_counter() - began) / options.seeds:>7.1f}", flush=True)  # fmt: skip
    targets: dict[str, bool] = {}
    if set(chosen) == set(ARMS):
        gap = abs(figures["async SGD, matched"] / figures["sync SGD"] - 1)
        targets["matched async SGD within 0.5% of sync SGD"] = gap < 0.005
        gap = abs(figures["async DN"] / figures["sync DiLoCo"] - 1)
        targets["DN within 5% of sync at its learning rate"] = gap < 0.05
        targets["DN in 31% of its time"] = times["async DN"] < 0.31 * times["sync DiLoCo"]
    finish(figures | {f"{arm}, virtual s": t for arm, t in times.items()}, targets)


if __name__ == "__main__":
    main()
