"""Work whose updates travel compressed, with error feedback in the form of EF21.

Richtarik, Sokolov, Fatkhullin, EF21: A New, Simpler, Theoretically Better, and Practically Faster
Error Feedback, NeurIPS 2021 (arXiv:2106.05203), for several nodes.  Worker i and the server both
hold h_i, zero at the start.  For the update u of a job

    c = C(u - h_i)        the worker sends it
    h_i <- h_i + c        at both ends; what the method sees as the update is the new h_i

What a worker keeps so follows from what it sent, and only c travels.  A job that is lost, taken
back or handed to another worker has not changed the server's h_i, and it is the server's that
counts: a worker of which the server cannot be sure is given h_i again with its next job.

Where a task computes on a device and C can, too, u - h is compressed there, h stays there, and of
the update only c crosses.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression import Compressor, Message
from offbeat.algorithms.compression.contract import made
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Seed, Spec
from offbeat.runtime.base.tensors import fetch, finite, is_tensor, library, load
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import WORK, Kept, OwnLoop, Work, updated

SENT = "sent"  # h among what is kept: the sum of all that was sent


class Compressed:
    """``work``, of whose updates a compressor's messages travel.

    Args:
        compressor: C.
        work: what is done with a job.
        feedback: False: the update is C(u), and nothing is kept for it.
        seed: of what C draws, which is a function of it and of the job's shard and draw.
    """

    spec: Spec | None = None

    def __init__(self, compressor: Compressor, work: Work, feedback: bool, seed: int) -> None:
        self.compressor, self.work, self.feedback, self.seed = compressor, work, feedback, seed
        self.steps = work.steps

    def keep(self, n: int, x: NDArray) -> Kept:
        """What ``work`` keeps, and h ``[n, d]`` where a message can lack something.

        Raises:
            ConfigError: differences that C compresses need not get smaller.
        """
        kept = self.work.keep(n, x)
        alpha = self.compressor.alpha(x.size)
        if not self.feedback or alpha == 1:
            return kept
        if alpha is None and self.compressor.omega(x.size) is not None:
            raise ConfigError(
                f"compressed: {self.compressor} is unbiased but not contractive, and error "
                f"feedback would not converge; take contractive({self.compressor}), or "
                "feedback = false"
            )
        return kept | {SENT: np.zeros((n, x.size), x.dtype)}

    def __init_subclass__(cls) -> None:
        if "update" in vars(cls) and "coded" not in vars(cls):
            raise ConfigError(
                f"{cls.__name__}: runs ask compressed work for its message; write coded in place "
                "of update, which is made of it"
            )

    def there(self, task: Task) -> bool:
        """Whether updates of ``task`` are compressed on its device."""
        return self.compressor.apart and getattr(task, "apart", False)

    def update(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray]:
        """See ``Work``: the updates as the server will see them."""
        return self.coded(task, x, worker, draw, steps, kept)[:2]

    def coded(
        self, task: Task, x: NDArray, worker: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> tuple[NDArray, NDArray, Message]:
        """``update``, and the message of k rows that travels.

        The rows of h are not changed, but replaced in ``kept``, and are the updates: tensors of
        the task's device where they were, else arrays.  What is not finite cannot be compressed:
        its loss is not a number, and tells.
        """
        own = {name: rows for name, rows in kept.items() if name != SENT}
        h: Any = kept.get(SENT)
        there, stays = self.there(task), is_tensor(h)
        if there and not is_tensor(x):
            x = task.load(x)  # type: ignore[attr-defined]
        losses, updates = updated(self.work, task, x, worker, draw, steps, own)
        losses, updates = fetch(losses), updates if there else fetch(updates)
        if there and h is not None and not stays:
            h = load(h, updates.device)
        lib = library(updates)
        apart = updates if h is None else lib.subtract(updates, h, out=updates)
        if not finite(apart):
            bad = ~lib.isfinite(apart).all(-1)
            apart = lib.where(bad[:, None], 0, apart)
            losses = np.where(fetch(bad), np.nan, losses)
        generators: Any = None
        if self.compressor.draws:
            jobs = zip(worker.tolist(), draw.tolist(), strict=True)
            generators = [rng(self.seed, "compress update", *job) for job in jobs]
        message = self.compressor.compress(apart, generators)
        if h is None:
            return losses, message.dense(), message
        seen = message.dense(updates.device if there else None)
        seen += h
        kept[SENT] = seen if stays else fetch(seen)
        return losses, kept[SENT], message


@WORK.register("compressed")
def compressed(
    compressor: str | Compressor = "topk(0.01)",
    work: Any = "gradient",
    *,
    feedback: bool = True,
    seed: Seed = 0,
) -> Compressed:
    """Another work whose updates travel compressed, with error feedback (EF21) or without.

    >>> work = WORK.parse("compressed(topk(0.1), local-steps(adamw, steps=20))")
    >>> str(work.compressor), work.steps
    ('topk(k=0.1)', 20)
    >>> compressed("topk(0.1)", "own-loop")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: compressed: own-loop sends its updates as they are; \
take gradient or local-steps
    """
    inner = WORK.parse(work) if isinstance(work, str) else work
    if isinstance(inner, OwnLoop | Compressed) or not hasattr(inner, "update"):
        named = getattr(inner, "spec", None)
        raise ConfigError(
            f"compressed: {named.name if named else repr(inner)} sends its updates as they are; "
            "take gradient or local-steps"
        )
    if lacking := [name for name in ("steps", "keep") if not hasattr(inner, name)]:
        raise ConfigError(
            f"compressed: {type(inner).__name__} is no work: it has no {' and no '.join(lacking)}"
        )
    return Compressed(made(compressor), inner, feedback, seed)
