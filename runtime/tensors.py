"""Arrays here, and torch's tensors of a device: which is which, and what crosses between them.

Memory that a GPU copies from and to is page-locked; torch keeps what is freed of it for the next
that asks.  "cpu:0" is the CPU as such a device: the same lines as on a GPU, without one.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_tensor(x: object) -> bool:
    """Whether ``x`` is torch's; torch is not loaded to find out."""
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def library(x: Any) -> Any:
    """What computes with ``x``: numpy, or torch, whose functions used here are called the same."""
    return sys.modules["torch"] if is_tensor(x) else np


def dtype_of(x: Any) -> np.dtype:
    """numpy's name for the numbers in ``x``.

    >>> dtype_of(np.zeros(3, np.float32))
    dtype('float32')
    """
    return np.dtype(str(x.dtype).removeprefix("torch.")) if is_tensor(x) else x.dtype


def joined(parts: Sequence[Any]) -> Any:
    """``parts``, alike, one after the other along their first axis."""
    return library(parts[0]).concatenate(parts)


def memory(size: Any, dtype: Any, device: Any) -> Any:
    """A CPU tensor of that size, from and to which ``device`` copies fast."""
    import torch

    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")


def load(x: NDArray, device: Any) -> Any:
    """``x`` on ``device``, before whatever is computed there next; not to be changed so long.

    On the CPU it is the same memory.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        here = torch.from_numpy(x)
    if device.type == "cuda":
        here = here.pin_memory()  # itself, where it is so already
    return here.to(device, non_blocking=True)


def fetch(x: Any) -> NDArray:
    """``x`` as an array here, once it is computed and copied; what is here is not copied."""
    if not is_tensor(x):
        array: NDArray = x
        return array
    if x.device.type == "cuda":
        import torch

        here = memory(x.shape, x.dtype, x.device)
        here.copy_(x, non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
        x = here
    array = x.numpy()
    return array
