"""Any torch module as a task."""

import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import zip_longest
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.randomness import Streams
from offbeat.runtime.base.registry import Count, Fraction, Reads, Seed, Spec, validated
from offbeat.runtime.base.tensors import fetch, load, memory
from offbeat.workers.partition import divided, held_out
from offbeat.workers.tasks import device as devices
from offbeat.workers.tasks.contract import TASKS, alone, ours
from offbeat.workers.tasks.samples import Samples, generators, stacked
from offbeat.workers.tasks.scores import Hits
from offbeat.workers.tasks.shards import BatchSize, Draws, Sampling
from offbeat.workers.tasks.trials import UNMAPPED, tried

log = logging.getLogger("offbeat")
VMAP_FROM = 16  # jobs from which one vmapped call beats a loop (it costs a fixed millisecond)
EVALUATED = 1024  # samples evaluated at a time
OWN_FILE = "torch"  # the task that runs a file of the user's
MADE = {"labels", "accuracy", "target", "collate"}  # what such a file may say besides
DTYPES = ("torch.float32", "torch.float64")


class TorchTask:
    """f_i(x) = mean loss of a module with parameters x over worker i's samples.

    The trainable parameters, in the module's order, are one flat vector; frozen ones stay.  Many
    jobs at once are one call of ``vmap(grad)``; a module that cannot be vmapped, for example one
    with dropout, is looped over (said once in the log), and so are few jobs.  The two agree to
    rounding, not to the bit.

    Module, loss and data set are the user's: before the run they are tried on a few samples, see
    ``offbeat.workers.tasks.trials``.  They may draw from the global generators of torch, numpy and
    Python, which are seeded for each job and put back behind it; what keeps a state of its own is
    refused.  A module is given a copy of x, which it may change.

    Args:
        module: maps a batch of inputs to outputs; its present parameters are the start.  Its
            buffers stay as they are, so BatchNorm with running statistics is refused.
        loss: ``loss(outputs, targets)``, a scalar mean over the batch.
        dataset: map-style, of (input, target) pairs; a ``TensorDataset`` is fastest.
        workers: n.
        partition: how the samples are divided; by target where those are whole numbers or one-hot.
        batch: samples a job, or "full".
        sampling: "replacement" or "passes".
        holdout: fraction held out, at random, on which accuracy is measured.
        labels: ``[N]``, the samples' classes for the partition, where targets are none.
        accuracy: ``accuracy(outputs, targets)``, whether each sample is right; None: as the loss
            says, where it is a cross-entropy or a binary one of one output.
        target: which part of a sample is the target where samples are dicts (a key) or longer
            than pairs (a position); the module is given the others, by name or in order.
        collate: makes a batch of a list of samples; None: torch's ``default_collate``.
        seed: of division, sampling and what the user's code draws.
        device: where gradients are computed, and a ``TensorDataset`` is kept.

    Raises:
        ConfigError: no such device, running statistics, no data, parameters of several types; or
            what the trial found.
    """

    spec: Spec | None = None

    @validated("TorchTask")
    def __init__(
        self,
        module: Any,
        loss: Callable[[Any, Any], Any],
        dataset: Any,
        *,
        workers: Count = 10,
        partition: str = "iid",
        batch: BatchSize = 32,
        sampling: Sampling = "replacement",
        holdout: Fraction = 0.0,
        labels: Any = None,
        accuracy: Callable[[Any, Any], Any] | None = None,
        target: int | str | None = None,
        collate: Callable[[Any], Any] | None = None,
        seed: Seed = 0,
        device: str = "cpu",
    ) -> None:
        import torch

        self._torch, self.workers, self._module = torch, workers, module
        self._loss, self._data = loss, Samples(dataset, target, collate)
        # Of lm, whose samples are numbers, nothing is a user's; it draws and changes nothing.
        self._own = ours(module) and ours(loss) and isinstance(dataset, range)
        trainable(module)
        module.train()
        self.to(device)
        named = trainable(module)
        twice = sum(1 for _ in module.named_parameters(remove_duplicate=False))
        self._tied = twice > sum(1 for _ in module.parameters())  # to look for them takes long
        self._names, self._shapes = list(named), [p.shape for p in named.values()]
        self.tensors = [p.numel() for p in named.values()]
        self.dim = sum(self.tensors)
        self.matrices = self._between()  # of linear layers: (first entry, rows, columns)
        flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self._initial = flat.cpu().numpy()
        kept, away = held_out(len(self._data), holdout, seed)
        parts = divided(partition, kept, workers, seed, partial(self._classes, labels))
        self._order, self._away = np.concatenate(parts), away
        self._draws = Draws(parts, batch=batch, sampling=sampling, seed=seed)
        self.sizes = self._draws.sizes
        self._streams = Streams(seed, "dropout", workers)  # what the user's code draws
        self._vmaps = self._data.stacks and batch != "full"
        self._grad = torch.func.grad_and_value(self._value)
        self._hits: Hits | None = None
        if not self._own:
            self._hits, self._vmaps = tried(self, accuracy)
            if holdout and self._hits is None:
                raise ConfigError(
                    f"TorchTask: accuracy is what is measured on holdout={holdout}, and what is "
                    "right under this loss is not known; give accuracy=, or no holdout"
                )

    def to(self, device: str) -> "TorchTask":
        """Compute on ``device`` from now on; answers the task itself."""
        self.device = devices.found(device)
        self._module = self._module.to(self.device)
        self._data.to(self.device)
        return self

    @property
    def apart(self) -> bool:
        """Whether models are tensors of a device, not numpy's."""
        return str(self.device) != "cpu"

    def load(self, x: NDArray) -> Any:
        """``x`` as a tensor of the device; on the CPU the same memory, which nothing changes."""
        return load(x, self.device)

    def memory(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer from which ``load`` is fast."""
        made: NDArray[np.uint8] = memory(nbytes, self._torch.uint8, self.device).numpy()
        return made

    def _between(self) -> list[tuple[int, int, int]]:
        linear = {
            f"{name}.weight".removeprefix(".")
            for name, part in self._module.named_modules()
            if isinstance(part, self._torch.nn.Linear)
        }
        firsts = np.cumsum([0, *self.tensors]).tolist()
        found = zip(firsts, self._names, self._shapes, strict=False)
        return [(first, *shape) for first, name, shape in found if name in linear]

    def _classes(self, given: Any) -> NDArray:
        """``[N]``, what partitions by class go by."""
        if given is not None:
            said = np.asarray(given)
            if said.shape != (len(self._data),):
                raise ConfigError(
                    f"TorchTask: labels are of shape {list(said.shape)}; one for each of the "
                    f"{len(self._data)} samples is wanted"
                )
            return said
        with self._seeding() as seed:
            seed(0)
            found = self._data.labels()
        if found is None:
            raise ConfigError(
                "TorchTask: this partition divides by class, and the targets are no classes: "
                'neither whole numbers nor one-hot; give labels=, one a sample, or take "iid"'
            )
        return found

    def _samples(self, rows: NDArray) -> tuple[Any, Any]:
        """Inputs and targets of dataset rows ``[B]``, on the device."""
        return self._data.batch(rows)

    def _seeding(self) -> AbstractContextManager[Callable[[int], None]]:
        """See ``generators``; nothing, where no code is a user's."""
        return nullcontext(lambda number: None) if self._own else generators(self.device)

    def _private(self, x: Any) -> Any:
        """``x [...]`` as the module is given it, which may change it: a copy."""
        return x.detach() if self._own else x.detach().clone()

    def _pieces(self, flat: Any) -> list[Any]:
        """Views of ``flat [d]``, one a parameter, in their shapes."""
        pieces = zip(self._torch.split(flat, self.tensors), self._shapes, strict=True)
        return [piece.view(shape) for piece, shape in pieces]

    def _outputs(self, pieces: list[Any], inputs: Any) -> Any:
        """The module's answer with parameters ``pieces``."""
        args, named = self._data.called(inputs)
        call, parameters = self._torch.func.functional_call, zip(self._names, pieces, strict=True)
        return call(self._module, dict(parameters), args, named, tie_weights=self._tied)

    def _value(self, flat: Any, inputs: Any, targets: Any) -> Any:
        return self._loss(self._outputs(self._pieces(flat), inputs), targets)

    def initial(self, seed: int) -> NDArray:
        """The module's parameters as they were given, for every seed."""
        return self._initial.copy()

    @alone
    def gradient(self, x: Any, worker: NDArray, draw: NDArray) -> tuple[Any, Any]:
        """Losses ``[k]`` and gradients ``[k, d]``; see ``Task``.

        Where ``x`` is a tensor of the device, they are, too.
        """
        if isinstance(x, np.ndarray):
            losses, gradients = self.gradient(self.load(x), worker, draw)
            return fetch(losses), fetch(gradients)
        if self._draws.batch == "full":
            rows: Any = [self._order[self._draws.share(at)] for at in worker.tolist()]
        else:
            rows = self._order[self._draws.rows(worker, draw)]
        numbers = [] if self._own else self.numbers(worker, draw)
        with self._seeding() as seed:
            if len(x) >= VMAP_FROM and self._vmaps:
                try:
                    return self.together(x, rows, numbers, seed)
                except (RuntimeError, ValueError) as error:  # a real mistake is back in the loop
                    self._vmaps = False
                    log.warning(UNMAPPED, error)
            found = []
            for one, mine, number in zip_longest(x, rows, numbers):
                seed(number)
                found.append(self._one(one, *self._samples(mine)))
        values, each = zip(*found, strict=True)
        gradients = self._torch.stack(each) if len(each) > 1 else each[0][None]  # not copied
        return self._torch.stack(values), gradients

    def numbers(self, worker: NDArray, draw: NDArray) -> list[int]:
        """Seeds ``[k]`` of what the user's code draws in each job."""
        found: list[int] = (self._streams.bits(worker, draw, 1)[:, 0] >> 1).tolist()
        return found

    def together(self, x: Any, rows: NDArray, numbers: list[int], seed: Any) -> tuple[Any, Any]:
        """Losses and gradients of jobs on dataset ``rows [k, B]``, in one call.

        Raises:
            RuntimeError, ValueError: the module cannot be vmapped, or cannot be computed.
        """
        if self._data.direct:
            inputs, targets = self._samples(rows)
        else:
            batches = []
            for mine, number in zip(rows, numbers, strict=True):
                seed(number)
                batches.append(self._samples(mine))
            inputs, targets = stacked(batches)
        gradients, losses = self._torch.func.vmap(self._grad)(self._private(x), inputs, targets)
        return losses.detach().reshape(len(x)).to(x.dtype), gradients.detach()

    def _one(self, x: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """A loss and a gradient ``[d]``."""
        pieces = [piece.requires_grad_() for piece in self._pieces(self._private(x))]
        value = self._loss(self._outputs(pieces, inputs), targets)
        found = self._torch.autograd.grad(value, pieces, allow_unused=True)
        return value.detach().reshape(()).to(x.dtype), self._flat(pieces, found)

    def _flat(self, pieces: list[Any], found: Any) -> Any:
        """Gradients ``[d]`` of the pieces; zero where the loss does not depend on one."""
        gradients = [
            self._torch.zeros_like(piece) if gradient is None else gradient
            for piece, gradient in zip(pieces, found, strict=True)
        ]
        dense = (g if g.layout == self._torch.strided else g.to_dense() for g in gradients)
        return self._torch.cat([gradient.reshape(-1) for gradient in dense])

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[int], None]]:
        """The module in evaluation mode; what is drawn is seeded as told, and then forgotten."""
        self._module.eval()
        try:
            with self._seeding() as seed:
                yield seed
        finally:
            self._module.train()

    @alone
    def evaluate(self, x: NDArray) -> dict[str, float]:
        """Facts in evaluation mode: loss and grad_norm of f, over all workers' samples; accuracy.

        accuracy, where it is known what is right, is the share of targets that are: of the
        samples held out where there are any, else of all workers' samples.
        """
        flat, draws = self.load(x), self._draws
        total, gradient, marks = 0.0, self._torch.zeros_like(flat), list[Any]()
        shares = [self._order[draws.share(worker)] for worker in range(self.workers)]
        with self.evaluating() as seed:
            for mine in shares:
                for rows in chunks(mine):
                    seed(int(rows[0]))
                    inputs, targets = self._samples(rows)
                    pieces = [piece.requires_grad_() for piece in self._pieces(self._private(flat))]
                    outputs = self._outputs(pieces, inputs)
                    value = self._loss(outputs, targets) * (len(rows) / (len(mine) * self.workers))
                    found = self._torch.autograd.grad(value, pieces, allow_unused=True)
                    gradient += self._flat(pieces, found)
                    total += float(value.detach())
                    if self._hits is not None and not len(self._away):
                        marks.append(self._hits(outputs, targets))
            for rows in chunks(self._away):
                assert self._hits is not None
                seed(int(rows[0]))
                inputs, targets = self._samples(rows)
                with self._torch.no_grad():
                    outputs = self._outputs(self._pieces(self._private(flat)), inputs)
                    marks.append(self._hits(outputs, targets))
        facts = {"loss": total, "grad_norm": float(gradient.norm())}
        count = 0 if any(right is None for right in marks) else sum(r.numel() for r in marks)
        if count:
            facts["accuracy"] = sum(float(right.sum()) for right in marks) / count
        return facts


def chunks(rows: NDArray) -> list[NDArray]:
    """``rows``, so many as are evaluated at a time."""
    return [rows[first : first + EVALUATED] for first in range(0, len(rows), EVALUATED)]


def trainable(module: Any) -> dict[str, Any]:
    """The trainable parameters by name.

    Raises:
        ConfigError: they cannot be a model vector.
    """
    import torch

    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in module.parameters()):
        raise ConfigError(
            "TorchTask: the module is lazy, its parameters are not made yet; give it a batch "
            "first, module(inputs)"
        )
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    if isinstance(module, parallel):
        raise ConfigError(
            f"TorchTask: a {type(module).__name__} is given; give its .module: a job is computed "
            "on one device"
        )
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if len(types := {str(p.dtype) for p in named.values()}) != 1:
        raise ConfigError("TorchTask: the module needs trainable parameters of one dtype")
    if not types <= set(DTYPES):
        raise ConfigError(
            f"TorchTask: the module's parameters are {types.pop()}; keep them in torch.float32, "
            "and compute in less with torch.autocast"
        )
    for name, part in module.named_modules():
        if getattr(part, "running_mean", None) is not None:
            raise ConfigError(
                f"TorchTask: {name or 'the module'} keeps running statistics, which are not "
                "part of the model vector; use track_running_stats=False or GroupNorm"
            )
    return named


def imported(path: Path) -> list[Path]:
    """A Python file, and what it imports from beside it; what they open besides is not known."""
    finder = ModuleFinder([str(path.parent)])
    with suppress(SyntaxError):  # told when it is run
        finder.run_script(str(path))
    places = (getattr(part, "__file__", None) for part in finder.modules.values())
    found = {Path(place) for place in places if place is not None}
    return [path, *sorted(found - {path})]


@TASKS.register(OWN_FILE)
def torch_file(
    file: Annotated[str, Reads(files=imported)],
    *,
    make: str = "make",
    workers: Count = 10,
    partition: str = "iid",
    batch: BatchSize = 32,
    sampling: Sampling = "replacement",
    holdout: Fraction = 0.0,
    seed: Seed = 0,
    device: str = "cpu",
) -> TorchTask:
    """Any torch module on any dataset, made by a Python file of yours; see ``TorchTask``.

    Args:
        file: of Python, which is run; its imports are looked for beside it, too. They are part of
            what a run is known by, and deployed with it; data that it opens by itself is not.
        make: a function there, called without arguments when torch, numpy and Python's random
            are seeded with ``seed``; it answers (module, loss, dataset), and behind them, if need
            be, a dict of labels, accuracy, target or collate.
        workers, partition, batch, sampling, holdout, seed, device: see ``TorchTask``.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f'task "{OWN_FILE}": there is no file {path}')
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    with generators(devices.found("cpu")) as seeding:
        seeding(seed)
        found = runpy.run_path(str(path))
    if not callable(found.get(make)):
        known = [name for name, value in found.items() if callable(value) and name[0] != "_"]
        raise ConfigError(
            f'task "{OWN_FILE}": {path} has no function "{make}"{nearest(make, known)}'
        )
    with generators(devices.found("cpu")) as seeding:
        seeding(seed)
        made = found[make]()
    more = made[3] if isinstance(made, tuple) and len(made) == 4 else {}
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(more, dict):
        raise ConfigError(
            f'task "{OWN_FILE}": {make}() in {path} answered {type(made).__name__}, not '
            "(module, loss, dataset)"
        )
    if unknown := more.keys() - MADE:
        raise ConfigError(
            f'task "{OWN_FILE}": {make}() in {path} answered the unknown "{min(unknown)}"'
            f"{nearest(min(unknown), MADE)}; known: {', '.join(sorted(MADE))}"
        )
    return TorchTask(
        *made[:3],
        **more,
        workers=workers,
        partition=partition,
        batch=batch,
        sampling=sampling,
        holdout=holdout,
        seed=seed,
        device=device,
    )
