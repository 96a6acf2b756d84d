"""The contract of a task."""

from typing import Protocol

from numpy.typing import NDArray

from offbeat.runtime.registry import Registry, Spec

TASKS = Registry("task")


class Task(Protocol):
    """f(x) = (1/n) sum_i f_i(x), worker i holding f_i; x is one flat vector.

    A task that divides data also has ``sizes [n]``, how much each f_i is of; one whose model is of
    several tensors has ``tensors``, their sizes in order.
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
