"""A worker on a GPU: what crosses, local steps beside a bare torch loop, updates compressed there.

*crossing*: a vector to the GPU and back, in the page-locked memory that workers use and in numpy's.
*steps*: jobs of 20 local steps of AdamW on a language model, computed as a worker computes them,
beside a bare torch loop (nn.Module, AdamW) of the same model and batches that sends nothing; then
the same jobs in a run over ZeroMQ, server and one worker process on this machine.
*compressed*: from an update on the GPU to the bytes that travel, with error feedback, compressed
there and fetched to be compressed here.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, finish, where

import offbeat
from offbeat.runtime.base import tensors
from offbeat.runtime.compute.backend import JobRequest, Runner
from offbeat.runtime.run.records import column
from offbeat.workers.compressed import SENT, Compressed
from offbeat.workers.tasks import device as devices
from offbeat.workers.tasks import lm
from offbeat.workers.tasks.lm import BYTES, SHAPES
from offbeat.workers.tasks.transformer import Transformer, next_token_loss
from offbeat.workers.work import WORK

LENGTH, BATCH, STEPS = 128, 16, 20
COMPRESSORS = ("topk(0.01)", "scaled-sign", "bf16")


def ms(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of ``call``, until the GPU has done it; the first two are not timed."""
    spent = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - began))
    return statistics.median(spent[2:])


def crossing(device: Any, repeats: int) -> dict[str, float]:
    """GB/s by size and way."""
    found = {}
    for mb in (1, 10, 100):
        d = mb * 10**6 // 4
        plain = np.ones(d, np.float32)
        locked = tensors.memory(d, torch.float32, device).fill_(1).numpy()
        there = tensors.load(plain, device)
        ways: dict[str, Callable[[], object]] = {
            "there, page-locked": lambda x=locked: tensors.load(x, device),  # type: ignore[misc]
            "there, numpy's": lambda x=plain: torch.from_numpy(x).to(device),  # type: ignore[misc]
            "back, page-locked": lambda x=there: tensors.fetch(x),  # type: ignore[misc]
            "back, numpy's": lambda x=there: x.cpu(),  # type: ignore[misc]
        }
        for name, way in ways.items():
            found[f"{mb} MB {name}"] = mb / ms(way, repeats)
    for name, rate in found.items():
        print(f"# {name}: {rate:.1f} GB/s")
    return found


def steps(device: Any, size: str, repeats: int) -> tuple[dict[str, float], dict[str, bool]]:
    """Local steps a second, in turns."""
    task: Any = lm(
        size=size, length=LENGTH, batch=BATCH, workers=1, evaluated=1, device=str(device)
    )  # type: ignore[arg-type]
    text = f"local-steps(adamw(lr=0.001, weight_decay=0.1), steps={STEPS})"
    work = WORK.parse(text)
    runner, received = Runner(task, work), task.initial(0)
    x = task.memory(received.nbytes).view(received.dtype)  # as a worker process receives it
    x[:] = received
    module = Transformer(BYTES, LENGTH, *SHAPES[size]).to(device)
    optimiser = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.1)
    draw = iter(range(0, 10**9, STEPS))

    def bare() -> None:
        for at in range(first := next(draw), first + STEPS):
            rows = task._draws.rows(np.array([0]), np.array([at]))[0]
            inputs, targets = task._samples(task._order[rows])
            optimiser.zero_grad()
            next_token_loss(module(inputs), targets).backward()
            optimiser.step()

    def ours() -> None:
        runner.compute([JobRequest(0, 0, 0, next(draw), STEPS, 0, x, None)])

    spent: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(repeats):
        spent["bare"].append(ms(bare, 3))
        spent["ours"].append(ms(ours, 3))
    rates = {name: 1000 * STEPS / statistics.median(each) for name, each in spent.items()}
    ratio = statistics.median(b / o for b, o in zip(spent["bare"], spent["ours"], strict=True))
    jobs = 3 * repeats
    result = offbeat.run(
        task, "async-local-sgd", offbeat.Fleet(workers=1, speeds="real"), work=text,
        engine="zmq", stop={"steps": jobs + 5}, evaluate={"steps": jobs + 5},
    )  # fmt: skip
    at = column(result.trace, "time_s")
    rates["served"] = STEPS * jobs / float(at[-1] - at[-1 - jobs])
    print(
        f"# {task.dim:,} parameters, {BATCH} x {LENGTH} bytes: {rates['bare']:.1f} local steps/s "
        f"in a bare loop, {rates['ours']:.1f} in jobs of {STEPS} (ratio {ratio:.3f}), "
        f"{rates['served']:.1f} in a run over ZeroMQ"
    )
    figures = {f"{size} {name} steps/s": rate for name, rate in rates.items()}
    return figures | {f"{size} ratio": ratio}, {f"{size}: 0.9 of a bare loop": ratio >= 0.9}


class Given:
    """Work whose update is there already."""

    spec, steps = None, 1

    def __init__(self, update: Any) -> None:
        self._update = update

    def keep(self, n: int, x: Any) -> dict[str, Any]:
        return {}

    def update(self, task: Any, x: Any, *job: Any) -> tuple[Any, Any]:
        u = self._update.clone()
        return np.zeros(1), u if tensors.is_tensor(x) else tensors.fetch(u)


def compressed(device: Any, d: int, repeats: int) -> tuple[dict[str, float], dict[str, bool]]:
    """Milliseconds an update, compressed there and here."""
    u = torch.randn(1, d, device=device)
    x, job = np.zeros((1, d), np.float32), (np.zeros(1, int), np.zeros(1, int), np.ones(1, int))

    class Task:
        apart = True

        def load(self, x: Any) -> Any:
            return x if tensors.is_tensor(x) else tensors.load(x, device)

    found, faster = {}, {}
    for text in COMPRESSORS:
        for place in ("there", "here"):
            work = WORK.parse(f"compressed({text})")
            work.work = Given(u)
            kept = work.keep(1, x[0])
            if place == "there":
                kept[SENT] = tensors.load(kept[SENT], device)
            else:
                work.there = lambda task: False

            def once(work: Compressed = work, kept: dict[str, Any] = kept) -> None:
                task: Any = Task()
                there = task.load(x) if tensors.is_tensor(kept[SENT]) else x
                work.coded(task, there, *job, kept)[2].encode()

            found[f"{text} {place}"] = ms(once, repeats)
        here, there = found[f"{text} here"], found[f"{text} there"]
        faster[f"{text}: sooner there"] = there < here
        print(f"# {text}, {d:,} numbers: {there:.1f} ms there, {here:.1f} ms here")
    return found, faster


def main() -> None:
    options = arguments(
        str(__doc__),
        device={"default": "cuda:0"},
        sizes={"default": "20M,150M", "help": "of the language model"},
        parts={"default": "crossing,steps,compressed", "help": "which of them"},
    )
    device, repeats = devices.found(options.device), 3 if options.quick else 9
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"# {name}, torch {torch.__version__}, {where()}")
    parts, figures, targets = options.parts.split(","), {}, {}
    if "crossing" in parts:
        figures |= crossing(device, repeats)
    if "steps" in parts:
        for size in options.sizes.split(","):
            found, met = steps(device, size, repeats)
            figures, targets = figures | found, targets | met
    if "compressed" in parts:
        found, met = compressed(device, 25 * 10**6, repeats)
        figures, targets = figures | found, targets | met
    finish(figures, targets)


if __name__ == "__main__":
    main()
