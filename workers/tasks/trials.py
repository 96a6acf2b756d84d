"""A user's module, loss and data set, tried on a few samples before the run.

    hits, vmaps = tried(task, accuracy)

Looked at are the shapes of one batch, its outputs and its loss, and whether a job computed again
gives the same: after another one and after evaluations, with the generators as they were for it.
What it cannot see: a state that shows only later (a counter that first matters in its tenth epoch),
draws from a generator of the data set's own that are remembered from then on, what changes on the
disk, and another process's or another machine's environment.
"""

import math
import warnings
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.workers.tasks.samples import drawn, leaves, mapped
from offbeat.workers.tasks.scores import Hits, known, said

log = getLogger("offbeat")
FEW = 8  # samples at most that are looked at together
UNMAPPED = "this module cannot be vmapped (%s); jobs are computed singly"
CLOSE = 1e-3  # relative difference of what is equal but for rounding
STATE = (
    "a job's result must follow from seed, worker and job alone; draw from the global generators "
    "of torch, numpy or Python, which are seeded for each job, and keep no counter or cache that "
    "matters"
)


class Calls(NamedTuple):
    """What came of a job; what was drawn once its batch was there, and at its end."""

    batch: list[Any]
    fetched: tuple[Any, ...]
    numbers: Any
    drawn: tuple[Any, ...]


def tried(task: Any, accuracy: Hits | None) -> tuple[Hits | None, bool]:
    """What counts as right, None where nobody knows; and whether many jobs can be one call.

    Args:
        task: a ``TorchTask``, but for these.
        accuracy: what its user says is right.

    Raises:
        ConfigError: something is not understood, or keeps a state.
    """
    order = task._order
    rows = order[np.linspace(0, len(order) - 1, min(FEW, len(order))).astype(int)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes, which are looked at here
        with task._seeding() as seed:
            seed(0)
            hits = _shapes(task, rows, accuracy)
        _repeats(task)
        return hits, task._vmaps and _maps(task)


def _shapes(task: Any, rows: NDArray, accuracy: Hits | None) -> Hits | None:
    """See the module: one batch, its outputs, its loss."""
    torch = task._torch
    inputs, targets = _attempt(f"{len(rows)} samples make no batch", task._samples, rows)
    pieces = task._pieces(task._private(task.load(task._initial)))
    pieces = [piece.requires_grad_() for piece in pieces]
    sizes = ", ".join(_size(leaf) for leaf in leaves(inputs))
    outputs = _attempt(
        f"the module cannot compute a batch of inputs {sizes}", task._outputs, pieces, inputs
    )
    about = ", ".join(_size(leaf) for leaf in [*leaves(outputs), *leaves(targets)])
    value = _attempt(
        f"the loss cannot be computed of outputs and targets {about}",
        task._loss,
        outputs,
        mapped(torch.clone, targets),
    )
    if not torch.is_tensor(value) or value.numel() != 1:
        shape = list(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ConfigError(
            f"TorchTask: the loss of a batch of {len(rows)} is {shape}, not one number; give its "
            "mean over the batch"
        )
    if not value.requires_grad:
        raise ConfigError("TorchTask: the loss does not depend on the module's parameters")
    own = [p for p in task._module.parameters() if p.requires_grad]
    beside = torch.autograd.grad(value, own, allow_unused=True, retain_graph=True)
    if any(part is not None for part in beside):
        raise ConfigError(
            "TorchTask: the loss looks at the module's own parameters, which stay as they were at "
            "the start; have the module answer what it needs of them, or take weight_decay"
        )
    if torch.is_tensor(outputs) and torch.is_tensor(targets):
        _mean(task._loss, outputs.detach(), targets, float(value.detach()))
    if accuracy is None:
        return known(task._loss, outputs, targets)
    return _attempt(
        "accuracy cannot be computed",
        said,
        accuracy,
        mapped(torch.detach, outputs),
        targets,
        len(rows),
    )


def _mean(loss: Hits, outputs: Any, targets: Any, value: float) -> None:
    """Refuse sums over the batch, and outputs that meet all targets instead of their own."""
    import torch

    def of(outputs: Any, targets: Any) -> float:
        try:
            return float(loss(outputs.clone(), targets.clone()))
        except Exception:  # it takes no such batch
            return math.nan

    twice = of(torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    if value and math.isclose(twice, 2 * value, rel_tol=1e-5):
        raise ConfigError(
            "TorchTask: the loss of a batch taken twice is twice as large: it is a sum over the "
            'batch; give its mean, reduction="mean"'
        )
    shapes = outputs.shape, targets.shape
    if shapes[0] == shapes[1] or outputs.numel() != targets.numel():
        return
    singly = np.array([[of(z[None], y[None]) for y in targets] for z in outputs])
    crossed, beside, together = singly.mean(), singly.diagonal().mean(), of(outputs, targets)
    if abs(together - crossed) <= CLOSE * abs(crossed) < abs(together - beside):
        raise ConfigError(
            f"TorchTask: outputs {list(shapes[0])} and targets {list(shapes[1])} differ in shape, "
            "and the loss compares each output to every target; give them one shape"
        )


def _repeats(task: Any) -> None:
    """See the module: jobs a, a, b, evaluation, b, a, evaluation."""
    jobs, x = [(0, 0), (task.workers - 1, 1)], task._initial
    noise = rng(0, "trial").standard_normal(len(x)) * (0.1 * x.std() + 0.01)
    points = [x, (x + noise).astype(x.dtype)]  # what follows the model shows where it moves
    there = _state(task)
    with task._seeding() as seed:
        few = min(FEW, task._draws.batch) if task._draws.batch != "full" else FEW

        def job(at: int) -> Calls:
            worker, draw = (np.array([part]) for part in jobs[at])
            rows = task._order[task._draws.share(jobs[at][0])]
            if task._draws.batch != "full":
                rows = task._order[task._draws.rows(worker, draw)[0]]
            seed(task.numbers(worker, draw)[0])
            inputs, targets = task._samples(rows[:few])
            batch = [leaf.clone() for leaf in leaves([inputs, targets])]
            fetched = drawn()
            what = f"a job of {len(rows[:few])} samples cannot be computed"
            value, gradient = _attempt(what, task._one, task.load(points[at]), inputs, targets)
            numbers = task._torch.cat([value.reshape(1), gradient])
            return Calls(batch, fetched, numbers, drawn())

        def look() -> Any:
            # As many samples as share no divisor with a job's: no counter comes round to where it
            # was in all of these.
            count = next(c for c in range(2, few + 4) if math.gcd(c, few) == 1)
            with task.evaluating() as seed:
                seed(0)
                inputs, targets = task._samples(task._order[:count])
                with task._torch.no_grad():
                    pieces = task._pieces(task._private(task.load(task._initial)))
                    return task._loss(task._outputs(pieces, inputs), targets).reshape(1)

        first, again, other = job(0), job(0), job(1)
        before = look()
        pairs = [(first, again), (other, job(1)), (first, job(0))]
        after = look()
    for one, two in pairs:
        _compare(task, one, two)
    if not _equal(task, before, after):
        raise ConfigError(f"TorchTask: an evaluation done again gives another loss; {STATE}")
    for name, held in there.items():
        if not task._torch.equal(held, _state(task)[name]):
            raise ConfigError(
                f'TorchTask: the module changes its "{name}" as it computes, which is not part of '
                "the model vector, so that a job would depend on those before it"
            )


def _compare(task: Any, one: Calls, two: Calls) -> None:
    samples = len(one.batch) == len(two.batch) and all(
        a.shape == b.shape and _equal(task, a, b) for a, b in zip(one.batch, two.batch, strict=True)
    )
    if not samples:
        raise ConfigError(f"TorchTask: the same samples, asked for again, are others; {STATE}")
    if one.fetched != two.fetched:
        raise ConfigError(
            "TorchTask: the data set draws for a sample only when it is first asked for, and "
            f"remembers; {STATE}"
        )
    if not _equal(task, one.numbers, two.numbers) or one.drawn != two.drawn:
        raise ConfigError(
            f"TorchTask: module and loss, given the same again, answer otherwise; {STATE}"
        )


def _equal(task: Any, one: Any, two: Any) -> bool:
    """To the bit on a CPU; elsewhere to rounding."""
    if not one.is_floating_point() or task.device.type == "cpu":
        both = one == two
        return bool((both | (one != one) & (two != two)).all())
    return bool((one - two).norm() <= CLOSE * one.norm()) or bool(one.isnan().any())


def _state(task: Any) -> dict[str, Any]:
    """Copies of buffers and frozen parameters, and of those that are trained, by name."""
    held = [*task._module.named_buffers(), *task._module.named_parameters()]
    return {name: tensor.detach().clone() for name, tensor in held}


def _maps(task: Any) -> bool:
    """Whether jobs in one call give what they give singly."""
    worker, draw = np.array([0, task.workers - 1]), np.array([0, 1])
    rows, numbers = task._order[task._draws.rows(worker, draw)], task.numbers(worker, draw)
    rows, x = rows[:, :FEW], task.load(np.stack([task._initial] * 2))
    with task._seeding() as seed:
        try:
            _, gradients = task.together(x, rows, numbers, seed)
        except Exception as error:
            log.warning(UNMAPPED, error)
            return False
        for mine, number, found in zip(rows, numbers, gradients, strict=True):
            seed(number)
            _, single = task._one(x[0], *task._samples(mine))
            if not bool((single - found).norm() <= CLOSE * single.norm() + 1e-12):
                log.warning("jobs in one call differ from single ones; they are computed singly")
                return False
    return True


def _attempt(what: str, call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except ConfigError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"TorchTask: {what} ({type(error).__name__}: {said})") from error


def _size(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
