"""Any torch module as a task."""

import logging
import runpy
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.errors import ConfigError, nearest
from offbeat.runtime.randomness import Streams
from offbeat.runtime.registry import Count, Reads, Seed, Spec, validated
from offbeat.runtime.tensors import fetch, load, memory
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.tasks import device as devices
from offbeat.workers.tasks.contract import TASKS
from offbeat.workers.tasks.shards import BatchSize, Draws, Sampling

log = logging.getLogger("offbeat")
VMAP_FROM = 16  # jobs from which one vmapped call beats a loop (it costs a fixed millisecond)
EVALUATED = 1024  # samples evaluated at a time
OWN_FILE = "torch"  # the task that runs a file of the user's


class TorchTask:
    """f_i(x) = mean loss of a module with parameters x over worker i's samples.

    The trainable parameters, in the module's order, are one flat vector; frozen ones stay.  Many
    jobs at once are one call of ``vmap(grad)``; a module that cannot be vmapped, for example one
    with dropout, is looped over (said once in the log), and so are few jobs.  The two agree to
    rounding, not to the bit.

    Args:
        module: maps a batch of inputs to outputs; its present parameters are the start.  Its
            buffers stay as they are, so BatchNorm with running statistics is refused.
        loss: ``loss(outputs, targets)``, a scalar mean over the batch.
        dataset: map-style, of (input, target) pairs; a ``TensorDataset`` is fastest.
        workers: n.
        partition: how the samples are divided; by target where those are whole numbers.
        batch: samples a job, or "full".
        sampling: "replacement" or "passes".
        seed: of division, sampling and dropout.
        device: where gradients are computed, and a ``TensorDataset`` is kept.

    Raises:
        ConfigError: no such device, running statistics, no data, parameters of several types.
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
        seed: Seed = 0,
        device: str = "cpu",
    ) -> None:
        import torch

        self._torch, self.workers, self._module = torch, workers, module.train()
        self._loss, self._data = loss, dataset
        self._tensors = getattr(dataset, "tensors", ())
        self.to(device)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        twice = sum(1 for _ in module.named_parameters(remove_duplicate=False))
        self._tied = twice > sum(1 for _ in module.parameters())  # to look for them takes long
        self._names, self._shapes = list(named), [p.shape for p in named.values()]
        self.tensors = [p.numel() for p in named.values()]
        self.dim = sum(self.tensors)
        self.matrices = self._between()  # of linear layers: (first entry, rows, columns)
        self._check(named, dataset)
        self._initial = torch.nn.utils.parameters_to_vector(named.values()).detach().cpu().numpy()
        labels = self._labels() if partition.split("(")[0] != "iid" else np.zeros(len(dataset))
        parts = PARTITIONS.parse(partition)(labels, workers, seed)
        self._order = np.concatenate(parts)
        self._draws = Draws(parts, batch=batch, sampling=sampling, seed=seed)
        self.sizes = self._draws.sizes
        self._dropout = Streams(seed, "dropout", workers)
        self._vmaps = True
        self._grad = torch.func.grad_and_value(self._value)

    def to(self, device: str) -> "TorchTask":
        """Compute on ``device`` from now on; answers the task itself."""
        self.device = devices.found(device)
        self._module = self._module.to(self.device)
        self._tensors = tuple(tensor.to(self.device) for tensor in self._tensors)
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

    def _check(self, named: dict[str, Any], dataset: Sized) -> None:
        if not len(dataset):
            raise ConfigError("TorchTask: the dataset is empty")
        if len({p.dtype for p in named.values()}) != 1:
            raise ConfigError("TorchTask: the module needs trainable parameters of one dtype")
        for name, part in self._module.named_modules():
            if getattr(part, "running_mean", None) is not None:
                raise ConfigError(
                    f"TorchTask: {name or 'the module'} keeps running statistics, which are not "
                    "part of the model vector; use track_running_stats=False or GroupNorm"
                )

    def _labels(self) -> NDArray:
        if self._tensors:
            return np.asarray(self._tensors[1].reshape(len(self._data), -1)[:, 0].cpu())
        return np.array([int(self._data[i][1]) for i in range(len(self._data))])

    def _samples(self, rows: NDArray) -> tuple[Any, Any]:
        """Inputs and targets of dataset rows ``[...]``, stacked to ``[..., *]``, on the device."""
        torch = self._torch
        if self._tensors:
            at = self.load(rows)
            inputs, targets = (tensor[at] for tensor in self._tensors)
        else:
            collate = torch.utils.data.default_collate
            inputs, targets = collate([self._data[i] for i in rows.ravel().tolist()])
            inputs = inputs.reshape(*rows.shape, *inputs.shape[1:])
            targets = targets.reshape(*rows.shape, *targets.shape[1:])
        return inputs.to(self.device), targets.to(self.device)

    def _outputs(self, flat: Any, inputs: Any) -> Any:
        """The module's answer with parameters ``flat [d]``."""
        pieces = self._torch.split(flat, self.tensors)
        named = zip(self._names, pieces, self._shapes, strict=True)
        parameters = {name: piece.view(shape) for name, piece, shape in named}
        call = self._torch.func.functional_call
        return call(self._module, parameters, (inputs,), tie_weights=self._tied)

    def _value(self, flat: Any, inputs: Any, targets: Any) -> Any:
        return self._loss(self._outputs(flat, inputs), targets)

    def initial(self, seed: int) -> NDArray:
        """The module's parameters as they were given, for every seed."""
        return self._initial.copy()

    def gradient(self, x: Any, worker: NDArray, draw: NDArray) -> tuple[Any, Any]:
        """Losses ``[k]`` and gradients ``[k, d]``; see ``Task``.

        Where ``x`` is a tensor of the device, they are, too.
        """
        if isinstance(x, np.ndarray):
            losses, gradients = self.gradient(self.load(x), worker, draw)
            return fetch(losses), fetch(gradients)
        torch = self._torch
        if len(x) >= VMAP_FROM and self._vmaps and self._draws.batch != "full":
            inputs, targets = self._samples(self._order[self._draws.rows(worker, draw)])
            try:
                found = torch.func.vmap(self._grad)(x, inputs, targets)
            except (RuntimeError, ValueError) as error:  # a real mistake comes back in the loop
                self._vmaps = False
                log.warning("this module cannot be vmapped (%s); jobs are computed singly", error)
            else:
                gradients, losses = found
                return losses.detach(), gradients.detach()
        jobs = zip(x, worker.tolist(), draw.tolist(), strict=True)
        values, rows = zip(*(self._one(*job) for job in jobs), strict=True)
        gradients = torch.stack(rows) if len(rows) > 1 else rows[0][None]  # large: not copied
        return torch.stack(values), gradients

    def _one(self, x: Any, worker: int, draw: int) -> tuple[Any, Any]:
        """A loss and a gradient ``[d]``."""
        torch = self._torch
        address = np.array([worker]), np.array([draw])
        if self._draws.batch == "full":
            rows = self._order[self._draws.share(worker)]
        else:
            rows = self._order[self._draws.rows(*address)[0]]
        inputs, targets = self._samples(rows)
        flat = x.detach().requires_grad_()
        with self._seeded(int(self._dropout.bits(*address, 1)[0, 0] >> 1)):
            value = self._value(flat, inputs, targets)
        (gradient,) = torch.autograd.grad(value, flat)
        return value.detach().reshape(()), gradient.contiguous()

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Dropout, if any, is addressed like the samples; who draws besides draws on as before.

        As ``fork_rng`` and ``manual_seed``, which look for all devices that torch knows of.
        """
        torch = self._torch
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            at = self.device.index
            at = torch.cuda.current_device() if at is None else at
            generators.append(torch.cuda.default_generators[at])
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """loss and grad_norm of f, in evaluation mode; accuracy where targets are classes."""
        torch, draws = self._torch, self._draws
        flat = self.load(x).detach().requires_grad_()
        total, right, classes = 0.0, 0, False
        gradient = torch.zeros_like(flat)
        self._module.eval()
        for worker in range(self.workers):
            mine = self._order[draws.share(worker)]
            for first in range(0, len(mine), EVALUATED):
                inputs, targets = self._samples(mine[first : first + EVALUATED])
                outputs = self._outputs(flat, inputs)
                share = len(targets) / (len(mine) * self.workers)
                value = self._loss(outputs, targets) * share
                gradient += torch.autograd.grad(value, flat)[0]
                total += float(value.detach())
                classes = not targets.is_floating_point() and outputs.ndim == 2
                if classes:
                    right += int((outputs.argmax(1) == targets).sum())
        self._module.train()
        facts = {"loss": total, "grad_norm": float(gradient.norm())}
        return facts | ({"accuracy": right / len(self._order)} if classes else {})


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
    seed: Seed = 0,
    device: str = "cpu",
) -> TorchTask:
    """Any torch module on any dataset, made by a Python file of yours; see ``TorchTask``.

    Args:
        file: of Python, which is run; its imports are looked for beside it, too. They are part of
            what a run is known by, and deployed with it; data that it opens by itself is not.
        make: a function there, called without arguments when torch is seeded with ``seed``; it
            answers (module, loss, dataset).
        workers, partition, batch, sampling, seed, device: see ``TorchTask``.
    """
    import torch

    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f'task "{OWN_FILE}": there is no file {path}')
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    found = runpy.run_path(str(path))
    if not callable(found.get(make)):
        known = [name for name, value in found.items() if callable(value) and name[0] != "_"]
        raise ConfigError(
            f'task "{OWN_FILE}": {path} has no function "{make}"{nearest(make, known)}'
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = found[make]()
    if not isinstance(made, tuple) or len(made) != 3:
        raise ConfigError(
            f'task "{OWN_FILE}": {make}() in {path} answered {type(made).__name__}, not '
            "(module, loss, dataset)"
        )
    return TorchTask(
        *made,
        workers=workers,
        partition=partition,
        batch=batch,
        sampling=sampling,
        seed=seed,
        device=device,
    )
