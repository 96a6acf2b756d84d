"""What a worker does with a job: one gradient, or local steps of an inner optimiser.

    work.update(task, x[k, d], worker[k], draw[k], steps[k], kept) -> losses[k], updates[k, d]

Work knows rows, and nothing of servers or neighbours.  What workers keep between jobs (an inner
optimiser's moments) is not in it but in ``kept``: named arrays with one row a job, changed in
place, that whoever runs the workers stores.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Registry,
    Spec,
)
from offbeat.runtime.base.tensors import dtype_of, fetch, is_tensor, library, load
from offbeat.runtime.moved import renamed
from offbeat.workers.tasks.contract import Task, ours
from offbeat.workers.tasks.external import ELSEWHERE

WORK = Registry("work")
INNERS = Registry("inner optimiser")
Kept = dict[str, NDArray]  # name -> [n, ...], a row a worker
BLOCK = 2**15  # entries an inner optimiser goes through at a time: they stay in the cache


class Work(Protocol):
    """The contract of work."""

    spec: Spec | None
    steps: int
    """Local steps of a job where nothing else is said."""

    def keep(self, n: int, x: NDArray) -> Kept:
        """What n workers with models like ``x [d]`` keep between jobs, at the start."""
        ...

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` and updates ``[k, d]`` of k jobs, each of another worker.

        Args:
            task: whose gradients.
            x: ``[k, d]``, the models received; not changed.  Where it is a tensor of the task's
                device, the updates are, too.
            worker: ``[k]``, whose data.
            draw: ``[k]``, the first sample of each job; it uses ``steps`` of them.
            steps: ``[k]``, local steps.
            kept: rows ``[k, ...]`` of what the jobs' workers keep, those ``[k, d]`` beside x or
                here; changed in place.
        """
        ...


def updated(
    work: Work, task: Task, x: Any, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
) -> tuple[Any, Any]:
    """``work.update``; what a user's own work is given and answers, nobody else has."""
    if type(work) is Gradient or ours(work):
        return work.update(task, x, worker, draw, steps, kept)
    copied = library(x).asarray(x, copy=True)
    losses, updates = work.update(task, copied, worker, draw, steps, kept)
    return losses, library(updates).asarray(updates, copy=True)


class Gradient:
    """The gradient at the model received."""

    spec: Spec | None = None
    steps = 1

    def keep(self, n: int, x: NDArray) -> Kept:
        """Nothing."""
        return {}

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        return task.gradient(x, worker, draw)


@WORK.register("gradient")
def gradient() -> Gradient:
    """One stochastic gradient a job."""
    return Gradient()


class OwnLoop:
    """So many steps of a training loop that is not here: nothing can be computed without it.

    Args:
        steps: of a job.
        loop: what Ray's actors run, called with the address to join: a function, or
            "module:function"; "": the loops join by themselves.
    """

    spec: Spec | None = None

    def __init__(self, steps: int, loop: str | Callable[[str], object] = "") -> None:
        self.steps, self.loop = steps, loop

    def keep(self, n: int, x: NDArray) -> Kept:
        """Nothing: the loop keeps what it wants to."""
        return {}

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        """Refuses."""
        raise ConfigError(f"own-loop: {ELSEWHERE}")


@WORK.register("own-loop")
def own_loop(*, steps: Count = 50, loop: str = "") -> OwnLoop:
    """Steps of a user's own training loop, which joins with ``offbeat.join``.

    Args:
        steps: of the loop's optimiser in a job.
        loop: with engine = "ray", the "module:function" that its actors run with the address to
            join; "": the loops join by themselves.
    """
    if loop and not re.fullmatch(r"[\w.]+:\w+", loop):
        raise ConfigError(f'own-loop: loop = "{loop}" is no function; write "module:function"')
    return OwnLoop(steps, loop)


class Inner(ABC):
    """An inner optimiser over rows; moments are named rows ``[k, d]``, zero at the start.

    Rows are arrays, or tensors where a task keeps models elsewhere; the arithmetic is one.
    """

    spec: Spec | None = None
    lr: float
    moments: tuple[str, ...] = ()

    @abstractmethod
    def step(self, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray) -> None:
        """One step of k models, in place.

        Args:
            y: ``[k, c]``, models or columns of them.
            g: ``[k, c]``, their gradients; may be overwritten.
            rate: ``[k, 1]``, learning rates.
            t: ``[k]``, how many steps each worker has made, this one included.
            m: moments ``[k, c]``, in the order of ``moments``.
        """

    def rows(
        self, task: Task, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray
    ) -> None:
        """``step`` of whole rows ``[k, d]``, on the CPU a block of columns at a time."""
        size = y.shape[1] if is_tensor(y) else max(BLOCK // len(y), 1024)
        for first in range(0, y.shape[1], size):
            part = slice(None), slice(first, first + size)
            self.step(y[part], g[part], rate, t, *(row[part] for row in m))


class SGD(Inner):
    """y -= rate (g + wd y)."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay

    def step(self, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray) -> None:
        if self.weight_decay:
            g += self.weight_decay * y
        g *= rate
        y -= g


class MomentumSGD(Inner):
    """m = beta m + g; y -= rate m, or rate (g + beta m) with Nesterov's."""

    moments = ("momentum",)

    def __init__(self, lr: float, beta: float, nesterov: bool, weight_decay: float) -> None:
        self.lr, self.beta, self.nesterov = lr, beta, nesterov
        self.weight_decay = weight_decay

    def step(self, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray) -> None:
        (mean,) = m
        if self.weight_decay:
            g += self.weight_decay * y
        mean *= self.beta
        mean += g
        if self.nesterov:
            g += self.beta * mean
            g *= rate
        else:
            library(g).multiply(mean, rate, out=g)
        y -= g


class AdamW(Inner):
    """Decoupled weight decay (Loshchilov and Hutter, ICLR 2019), as torch.optim.AdamW."""

    moments = ("first", "second")

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
    ) -> None:
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps
        self.weight_decay = weight_decay

    def step(self, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray) -> None:
        first, second = m
        if self.weight_decay:
            y *= 1 - rate * self.weight_decay
        first *= self.beta1
        first += (1 - self.beta1) * g
        g *= g
        g *= 1 - self.beta2
        second *= self.beta2
        second += g
        lib = library(g)
        root = lib.sqrt(second, out=g)
        root /= column([math.sqrt(1 - self.beta2**s) for s in t], y)
        root += self.eps
        lib.divide(first, root, out=root)
        root *= rate / column([1 - self.beta1**s for s in t], y)
        y -= root


class Muon(AdamW):
    """Orthogonalised momentum for the matrices between layers, AdamW for everything else.

    Jordan et al., 2024; as torch.optim.Muon, with updates scaled to AdamW's size, so that one
    learning rate serves both, and in full precision.
    """

    def __init__(self, lr: float, beta: float, weight_decay: float) -> None:
        super().__init__(lr, 0.9, 0.999, 1e-8, weight_decay)
        self.beta = beta

    def rows(
        self, task: Task, y: NDArray, g: NDArray, rate: NDArray, t: list[int], *m: NDArray
    ) -> None:
        """See ``Inner``; ``task.matrices`` says where (first entry, rows, columns) they are."""
        matrices = getattr(task, "matrices", [])
        if not matrices:
            raise ConfigError(
                "muon needs a task with torch's linear layers, such as lm; take adamw"
            )
        at = 0
        for first, a, b in [*matrices, (y.shape[1], 0, 0)]:
            if at < first:
                rest = slice(None), slice(at, first)
                super().rows(task, y[rest], g[rest], rate, t, *(row[rest] for row in m))
            at = first + a * b
            if at == first:
                break
            mine = slice(None), slice(first, at)
            mean, here = m[0][mine], g[mine]
            mean *= self.beta
            mean += (1 - self.beta) * here
            ahead = (1 - self.beta) * here + self.beta * mean
            turned = orthogonal(ahead.reshape(-1, a, b)).reshape(here.shape)
            y[mine] *= 1 - rate * self.weight_decay
            y[mine] -= (rate * (0.2 * math.sqrt(max(a, b)))) * turned


def orthogonal(x: NDArray) -> NDArray:
    """``[k, a, b]`` with singular values near 1 and the same singular vectors: Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.swapaxes(1, 2)).swapaxes(1, 2)
    flat, lib = x.reshape(len(x), -1), library(x)
    x = x / lib.sqrt(lib.linalg.vecdot(flat, flat)).clip(1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * (gram @ gram)) @ x
    return x


@INNERS.register("sgd")
def sgd(lr: Positive = 0.1, *, weight_decay: NonNegative = 0.0) -> SGD:
    """Stochastic gradient descent."""
    return SGD(lr, weight_decay)


@INNERS.register("momentum")
def momentum(
    lr: Positive = 0.1,
    *,
    beta: Fraction = 0.9,
    nesterov: bool = False,
    weight_decay: NonNegative = 0.0,
) -> MomentumSGD:
    """SGD with momentum: heavy ball, or Nesterov's."""
    return MomentumSGD(lr, beta, nesterov, weight_decay)


@INNERS.register("adamw")
def adamw(
    lr: Positive = 1e-3,
    *,
    beta1: Fraction = 0.9,
    beta2: Fraction = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> AdamW:
    """Adam with decoupled weight decay."""
    return AdamW(lr, beta1, beta2, eps, weight_decay)


@INNERS.register("muon")
def muon(lr: Positive = 1e-3, *, beta: Fraction = 0.95, weight_decay: NonNegative = 0.0) -> Muon:
    """Muon, MuLoCo's inner optimiser (arXiv:2505.23725); for tasks with torch's linear layers."""
    return Muon(lr, beta, weight_decay)


def column(values: list[float], like: NDArray) -> NDArray:
    """``[k, 1]`` in the precision of ``like``, and beside it."""
    made = np.array(values, dtype_of(like))[:, None]
    return load(made, like.device) if is_tensor(like) else made


class LocalSteps:
    """``steps`` steps of an inner optimiser; the update is x_received - x_after.

    The learning rate of a step follows the position in its *shard*: the number of gradients
    taken of that shard's data before it, by whichever worker (Liu et al., arXiv:2401.09135).
    With T = ``total`` and eta the inner learning rate,

        eta_t = eta t / warmup                                                   t < warmup
        eta_t = last + (eta - last)(1 + cos(pi min(1, (t - warmup) / (T - warmup)))) / 2   beyond

    Args:
        inner: the optimiser.
        steps: local steps of a job where the method says nothing else.
        clip: gradients longer than this are shortened to it.
        warmup: positions of linear warm-up.
        total: position at which the cosine reaches ``last_lr``; None: no decay.
        last_lr: the learning rate from there on.
        fresh: moments begin at zero in every job, instead of staying with the worker.
    """

    spec: Spec | None = None

    def __init__(
        self,
        inner: Inner,
        steps: int,
        clip: float | None = None,
        warmup: int = 0,
        total: int | None = None,
        last_lr: float = 0.0,
        fresh: bool = False,
    ) -> None:
        self.inner, self.steps, self.clip, self.fresh = inner, steps, clip, fresh
        self.warmup, self.total, self.last_lr = warmup, total, last_lr

    def keep(self, n: int, x: NDArray) -> Kept:
        """Moments ``[n, d]`` and the number of steps made ``[n]``."""
        return {} if self.fresh else self._blank(n, x)

    def _blank(self, n: int, x: NDArray) -> Kept:
        zeros, like = library(x).zeros, {"dtype": x.dtype, "device": x.device}
        kept: Kept = {name: zeros((n, len(x)), **like) for name in self.inner.moments}
        return kept | {"steps": np.zeros(n, np.int64)} if kept else {}

    def rate(self, position: int, step: int) -> float:
        """The learning rate at ``position``, which is local step ``step`` of its job."""
        t, eta = position, self.inner.lr
        if t < self.warmup:
            return eta * t / self.warmup
        if self.total is None:
            return eta
        done = min(1.0, (t - self.warmup) / max(1, self.total - self.warmup))
        return self.last_lr + 0.5 * (eta - self.last_lr) * (1 + math.cos(math.pi * done))

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        if (steps[1:] > steps[:-1]).any():  # most first: rows that are done leave at the end
            order = np.argsort(-steps, kind="stable")
            rows = {name: held[order] for name, held in kept.items()}
            found = self.update(task, x[order], worker[order], draw[order], steps[order], rows)
            for name, held in kept.items():
                held[order] = rows[name]
            back = np.argsort(order)
            return found[0][back], found[1][back]
        if getattr(task, "apart", False) and not is_tensor(x):
            there = task.load(x)  # type: ignore[attr-defined]
            losses, updates = self.update(task, there, worker, draw, steps, kept)
            return losses, fetch(updates)
        state = self._blank(len(x), x[0]) if self.fresh else kept
        y: Any = library(x).asarray(x, copy=True)
        crossing: Any = ()
        if is_tensor(x):
            crossing = [m for m in self.inner.moments if not is_tensor(state[m])]
            state = state | {name: load(state[name], y.device) for name in crossing}
        told: list[Any] = []  # losses of each step: where a GPU computes, they are not waited for
        active, counts = len(x), steps.tolist()
        for step in range(counts[0] if counts else 0):
            while counts[active - 1] <= step:
                active -= 1
            at = draw[:active] + step
            losses, g = task.gradient(y[:active], worker[:active], at)
            told.append(losses)
            rates = [self.rate(position, step) for position in at.tolist()]
            rows = {name: row[:active] for name, row in state.items()}
            self._step(task, y[:active], g, rates, rows)
        for name in crossing:
            kept[name][:] = fetch(state[name])
        total = np.zeros(len(x))
        for losses in told:
            total[: len(losses)] += losses.tolist()
        return total / steps, library(y).subtract(x, y, out=y)

    def _step(self, task: Task, y: NDArray, g: NDArray, rates: list[float], state: Kept) -> None:
        """One inner step of rows ``[k, d]``."""
        if self.clip is not None:
            lib = library(g)
            lengths = lib.sqrt(lib.linalg.vecdot(g, g))  # row by row: same bits in a batch
            if is_tensor(g):  # which is not waited for
                g *= (self.clip / lengths).clip(max=1)[:, None]
            elif lengths.max() > self.clip:
                g *= column([min(1.0, self.clip / s) if s else 1.0 for s in lengths.tolist()], g)
        t: list[int] = []
        if "steps" in state:
            state["steps"] += 1
            t = state["steps"].tolist()
        rate, moments = column(rates, y), [state[name] for name in self.inner.moments]
        self.inner.rows(task, y, g, rate, t, *moments)


@WORK.register("local-steps")
def local_steps(
    inner: str | Inner = "sgd",
    *,
    steps: Count = 50,
    clip: Positive | None = None,
    warmup: Natural = 0,
    total: Count | None = None,
    last_lr: NonNegative = 0.0,
    fresh: bool = False,
) -> LocalSteps:
    """Local steps of an inner optimiser; the update is what they moved, x_received - x_after.

    >>> str(WORK.parse("local-steps(adamw(lr=1e-3), steps=20)").inner.spec)
    'adamw(lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0)'
    >>> WORK.parse("local-steps(adam)")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: no inner optimiser is called "adam"; did you mean "adamw"?
    """
    made = INNERS.parse(inner) if isinstance(inner, str) else inner
    if total is not None and total <= warmup:
        raise ConfigError(f"local-steps: total={total} must be more than warmup={warmup}")
    if last_lr and total is None:
        raise ConfigError(f"local-steps: last_lr={last_lr} is where a cosine ends; give its total")
    if last_lr > made.lr:
        raise ConfigError(f"local-steps: last_lr={last_lr} is above the learning rate {made.lr}")
    return LocalSteps(made, steps, clip, warmup, total, last_lr, fresh)


__getattr__ = renamed(__name__, {"Momentum": "MomentumSGD"})
