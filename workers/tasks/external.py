"""A task that only training loops of their own can compute; see ``offbeat.runtime.join``."""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, File, Spec
from offbeat.runtime.base.shapes import stripped
from offbeat.workers.tasks.contract import TASKS
from offbeat.workers.tasks.shards import DType

ELSEWHERE = (
    "only training loops that join can compute it (offbeat.join); give "
    'work = "own-loop(steps=50)" and begin it with: offbeat serve EXPERIMENT.toml; gossip needs no '
    "server, and on Ray the work needs its loop"
)
Shapes = Sequence[tuple[str, tuple[int, ...]]]
_FORMATS = {"F32": np.float32, "F64": np.float64}


class External:
    """f is the mean of the losses that the loops report; nobody here could say more.

    The model is the loops' parameters one after the other, in alphabetical order of their names.

    Args:
        shapes: of the parameters by name, where they are known; ``arrange`` says them else.
        dim: d.
        dtype: of the model.
        workers: n.
        start: ``[d]``, where it is known; ``begin`` says it else.
    """

    spec: Spec | None = None

    def __init__(
        self,
        shapes: Shapes,
        dim: int,
        dtype: str = "float32",
        workers: int = 10,
        start: NDArray | None = None,
    ) -> None:
        self.dim, self.workers, self.start = dim, workers, start
        self.shapes: Shapes = ()
        self.tensors = [dim]
        self.arrange(shapes)
        self._zeros = np.zeros(dim, dtype)
        self._losses: deque[float] = deque(maxlen=workers)  # of the last results

    def arrange(self, shapes: Shapes) -> None:
        """The model is made of ``shapes``, in this order."""
        if shapes:
            self.shapes, self.tensors = shapes, [math.prod(shape) for _, shape in shapes]

    def begin(self, x: NDArray) -> None:
        """The run begins at ``x [d]``."""
        self.start = x

    def initial(self, seed: int) -> NDArray:
        """The starting point ``[d]``, for every seed; zero where it is not known yet."""
        return (self._zeros if self.start is None else self.start).copy()

    def gradient(self, x: NDArray, worker: NDArray, draw: NDArray) -> tuple[NDArray, NDArray]:
        """Refuses."""
        raise ConfigError(f"external: {ELSEWHERE}")

    def report(self, loss: float) -> None:
        """A loop's mean loss in a job."""
        self._losses.append(loss)

    def evaluate(self, x: NDArray) -> dict[str, float]:
        """``loss`` is the mean of the last n results'; nothing before the first."""
        losses = self._losses.copy()  # another thread may report
        return {"loss": float(np.mean(losses))} if losses else {}

    def digest(self) -> str:
        """What tells models apart that have other parameters, or begin otherwise."""
        found = hashlib.blake2b(repr([*self.shapes]).encode(), digest_size=8)
        found.update(self.initial(0).data)
        return found.hexdigest()


@TASKS.register("external")
def external(
    dim: Count | None = None, *, file: File = "", workers: Count = 10, dtype: DType = "float32"
) -> External:
    """What training loops of their own compute, which join with ``offbeat.join``.

    Args:
        dim: trainable parameters of their model, which the first loop that joins brings (among
            peers every one brings its own, all alike); or
        file: the model to begin with, as
            ``safetensors.torch.save_file(dict(model.named_parameters()), file)`` writes it.
        workers: n.
        dtype: of the parameters, where no file says it.
    """
    if (dim is None) == (not file):
        raise ConfigError(
            "external: give either dim, the model's sum(p.numel() for p in model.parameters()), or "
            "a file with the model to begin with"
        )
    if dim is not None:
        return External((), dim, dtype, workers)
    shapes, start = _read(Path(file).expanduser())
    return External(shapes, len(start), start.dtype.str, workers, start)


def _read(path: Path) -> tuple[Shapes, NDArray]:
    """Names and shapes in a safetensors file, and its entries ``[d]``, in order of names."""
    try:
        with safe_open(path, framework="numpy") as source:
            called = stripped(source.keys())
            names = sorted(called, key=called.__getitem__)
            formats = {name: source.get_slice(name).get_dtype() for name in names}
            if odd := [name for name in names if formats[name] not in _FORMATS]:
                raise ConfigError(
                    f"{path}: {odd[0]} is of type {formats[odd[0]]}; a model is of float32 or "
                    "float64, and holds trainable parameters alone"
                )
            found = [(name, source.get_tensor(name)) for name in names]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if len(set(formats.values())) != 1:
        raise ConfigError(f"{path}: needs parameters of one type, not {len(set(formats.values()))}")
    shapes = [(called[name], tensor.shape) for name, tensor in found]
    return shapes, np.concatenate([tensor.reshape(-1) for _, tensor in found])
