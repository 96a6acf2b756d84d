"""A module's parameters as views into one flat vector, on the CPU or a GPU."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.halves import BFloat
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.shapes import Shapes, difference
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.workers.tasks.external import External

DTYPES = ("torch.float32", "torch.float64")


def names(module: Any) -> dict[str, str]:
    """Its parameters' names, without what wrappers add -> with it.

    ``torch.compile`` adds ``_orig_mod``, around the module or any part of it; ``DataParallel`` and
    ``DistributedDataParallel`` add ``module``.  A part that is called so otherwise stays.

    >>> import torch
    >>> names(torch.nn.DataParallel(torch.nn.Linear(2, 1)))
    {'weight': 'module.weight', 'bias': 'module.bias'}
    """
    import torch

    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    added = {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name in part._modules
        if name == "_orig_mod" or (name == "module" and isinstance(part, parallel))
    }
    found = {}
    for name, _ in module.named_parameters():
        steps = name.split(".")
        kept = [s for at, s in enumerate(steps) if ".".join(steps[: at + 1]) not in added]
        found[".".join(kept)] = name
    return found


class Flat:
    """The trainable parameters of a module, one after the other in order of their names.

    They lie in one vector on their own device: on the CPU a C-contiguous numpy array with torch
    looking at it, on a GPU a torch tensor, beside which the model received is kept for the
    difference.  Frozen parameters and buffers (the running statistics of BatchNorm) stay the
    process's own, as they do in torch's own periodic model averaging; ``torch.optim.swa_utils
    .update_bn`` recomputes the latter for a model of the run.

    Args:
        module: whose parameters become views; their values stay.
        bf16: differences travel as bfloat16, converted on the device: half of the bytes.

    Raises:
        ConfigError: no trainable parameters, or of several types or devices.
    """

    def __init__(self, module: Any, bf16: bool = False) -> None:
        import torch

        self._torch, self._bf16 = torch, bf16
        if any(isinstance(p, torch.nn.UninitializedParameter) for p in module.parameters()):
            raise ConfigError(
                "the model is lazy, its parameters are not made yet; give it a batch first, "
                "model(inputs), and make the optimiser then"
            )
        all_of_them = dict(module.named_parameters())
        named = sorted((bare, all_of_them[name]) for bare, name in names(module).items())
        named = [(name, p) for name, p in named if p.requires_grad]
        if not named:
            raise ConfigError("the model has no trainable parameters")
        for what in ("dtype", "device"):
            if len(found := sorted({str(getattr(p, what)) for _, p in named})) > 1:
                raise ConfigError(
                    f"the model's parameters are of several {what}s ({', '.join(found)}); give "
                    "them one, for example with model.to(...)"
                )
        first = named[0][1]
        if str(first.dtype) not in DTYPES:
            raise ConfigError(
                f"the model's parameters are {first.dtype}; keep them in torch.float32, and "
                "compute in less with torch.autocast"
            )
        self.shapes = [(name, tuple(p.shape)) for name, p in named]
        self.parameters = [p for _, p in named]
        self.dim = sum(p.numel() for p in self.parameters)
        self._gpu = first.device.type != "cpu"
        host = self._host(self.dim, first.dtype)
        self.dtype = host.numpy().dtype
        self._vector = torch.empty_like(host, device=first.device) if self._gpu else host
        self._out = self._host(self.dim, first.dtype)
        self._half = self._host(self.dim, torch.int16) if bf16 else None
        self._base: Any = None  # the model received
        at = 0
        with torch.no_grad():
            for p in self.parameters:
                view = self._vector[at : at + p.numel()].view(p.shape)
                view.copy_(p)
                p.data = view
                at += p.numel()

    def _host(self, size: int, dtype: Any) -> Any:
        """Memory here ``[size]``; page-locked, where a GPU is to copy from and to it."""
        return self._torch.empty(size, dtype=dtype, pin_memory=self._gpu)

    def values(self) -> NDArray:
        """A copy of them ``[d]``."""
        found: NDArray = self._vector.cpu().numpy().copy()
        return found

    def memory(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer in which a model can be received."""
        made: NDArray[np.uint8] = self._host(nbytes, self._torch.uint8).numpy()
        return made

    def receive(self, x: NDArray) -> None:
        """``x [d]`` is what the next difference is from; it is not to be changed before."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            here = self._torch.from_numpy(x)
        # On the CPU that is x itself; on a GPU a copy, ordered before whatever is computed next.
        self._base = here.to(self._vector.device, non_blocking=True)

    def load(self) -> None:
        """The parameters become what was received, in place."""
        self._vector.copy_(self._base)

    def moved(self, fresh: bool = False) -> NDArray | bytes:
        """x_received - x, once: ``[d]``, or a compressor's frame.

        Args:
            fresh: in new memory; else in that of the answer before.
        """
        torch, out = self._torch, self._out
        if fresh:
            out = self._host(self.dim, out.dtype)
        if self._gpu:  # the copy that was received is not needed any more
            change = self._base.sub_(self._vector)
        else:
            change = torch.sub(self._base, self._vector, out=out)
        self._base = None
        if self._half is not None:
            short = change.to(torch.bfloat16)
            if bool(torch.isfinite(short).all()):  # else the server is to see what it is
                self._half.copy_(short.view(torch.int16))
                upper = self._half.numpy().view(np.uint16)
                return BFloat(upper[None], np.dtype(self.dtype)).encode()[0]
        if self._gpu:
            out.copy_(change)
        told: NDArray = out.numpy()
        return told


def fit(experiment: Experiment, found: Shapes, x: NDArray) -> None:
    """Let the experiment's model be the loop's.

    Args:
        experiment: of loops.
        found: names and shapes of the loop's parameters.
        x: these ``[d]``.

    Raises:
        ConfigError: it is another.
    """
    task, like = experiment.task, experiment.task.initial(experiment.seed)
    said = ""
    if (x.dtype, x.size) != (like.dtype, like.size):
        said = f"{x.dtype}[{x.size}], not {like.dtype}[{like.size}]"
    elif isinstance(task, External) and task.shapes:
        said = difference(found, list(task.shapes))
    if said:
        raise ConfigError(f"the loop's model is another than the experiment's: {said}")
    if isinstance(task, External):
        task.arrange(found)
        if task.start is None:
            task.begin(x)
