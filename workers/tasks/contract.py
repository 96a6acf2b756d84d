"""The contract of a task."""

import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial, wraps
from numbers import Real
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Registry, Spec

F = TypeVar("F", bound=Callable[..., Any])
TASKS = Registry("task")


class Task(Protocol):
    """f(x) = (1/n) sum_i f_i(x), worker i holding f_i; x is one flat vector.

    A task that divides data also has ``sizes [n]``, how much each f_i is of; one whose model is of
    several tensors has ``tensors``, their sizes in order.  One with metrics of its own says which
    way these are better, as ``better = {"auc": "higher"}``.
    """

    spec: Spec | None
    workers: int
    dim: int

    def initial(self, seed: int) -> NDArray:
        """The starting point ``[d]``."""
        ...

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Losses ``[k]`` and gradients ``[k, d]`` of k jobs at once.

        Row j is the gradient of f_i, i = ``worker[j]``, at ``x[j]`` on the sample addressed by
        ``(worker[j], draw[j])``; it does not depend on the other rows.  The answer is new memory.
        """
        ...

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """Facts about the full objective at ``x [d]``: loss, grad_norm, accuracy, ..."""
        ...


_ALONE = threading.RLock()


def alone(method: F) -> F:
    """Decorator: of a process's threads, one at a time.

    A peer evaluates while it computes a job; torch puts the parameters of either into one module,
    and both seed the process's generators.  A user's code may be no better prepared.
    """

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _ALONE:
            return method(*args, **kwargs)

    return call  # type: ignore[return-value]


def ours(part: Any) -> bool:
    """Whether no code of a user's is in ``part``, which may change whatever memory it is given.

    numpy's read-only flag does not stop it: torch computes on the same memory without heed to it.

    >>> from offbeat.workers.tasks import quadratic
    >>> ours(quadratic(3)), ours(sorted)
    (True, False)
    """
    kind = part if hasattr(part, "__code__") else type(part)
    if str(kind.__module__).split(".")[0] != "offbeat":
        return False
    inside = [getattr(part, name, None) for name in ("model", "work", "schedule", "order", "outer")]
    inside += getattr(part, "rules", [])
    return all(ours(one) for one in inside if one is not None)


class Guarded:
    """A task of a user's own: what it is given and what it answers, nobody else has.

    All else is the task's.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.task, name)

    def initial(self, seed: int) -> NDArray:
        return deepcopy(self.task.initial(seed))

    @alone
    def gradient(self, x: Any, worker: NDArray, draw: NDArray) -> tuple[Any, Any]:
        return deepcopy(self.task.gradient(deepcopy(x), worker, draw))

    @alone
    def evaluate(self, x: NDArray) -> dict[str, float]:
        return self.task.evaluate(x.copy())

    def repeat(self, seed: int) -> None:
        """Compute two jobs of the run's beginning, evaluate, and compute them again.

        Raises:
            ConfigError: what it answers is not the contract's, or it keeps a state that shows.
        """
        name, x = type(self.task).__name__, self.initial(seed)
        _fits(f"{name}: the starting point", x, [self.task.dim])
        jobs = [(np.array([at]), np.array([at])) for at in (0, self.workers - 1)]
        first = [self.gradient(x[None], *job) for job in jobs]
        if not getattr(self.task, "apart", False):
            for losses, gradients in first:
                _fits(f"{name}: the loss of one job", losses, [1])
                _fits(f"{name}: the gradient of one job", gradients, [1, len(x)])
        facts = self.evaluate(x)
        if not (isinstance(facts, Mapping) and all(isinstance(f, Real) for f in facts.values())):
            raise ConfigError(
                f"{name}: evaluate answered {facts!r}; numbers by name are wanted, as "
                '{"loss": 0.5}'
            )
        again = [self.gradient(x[None], *job) for job in reversed(jobs)][::-1]
        for one, other in zip(first, again, strict=True):
            if not all(map(partial(np.array_equal, equal_nan=True), one, other)):
                raise ConfigError(
                    f"{name}: a job computed again, after another, gives another result; it must "
                    "follow from x, worker and draw alone, so that a run can be resumed and "
                    "replayed: see offbeat.runtime.base.randomness"
                )


def _fits(what: str, found: Any, shape: list[int]) -> None:
    """Refuse what is no array of floats of that shape."""
    array = isinstance(found, np.ndarray) and found.dtype.kind == "f"
    if not array or [*found.shape] != shape:
        told = getattr(found, "dtype", type(found).__name__)
        raise ConfigError(
            f"{what} is {told}{list(np.shape(found))}; an array of floats {shape} is wanted"
        )


def guarded(task: Task) -> Task:
    """``task``, guarded where it is a user's own."""
    return task if isinstance(task, Guarded) or ours(task) else Guarded(task)
