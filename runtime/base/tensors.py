"""Arrays here, and torch's tensors of a device: which is which, and what crosses between them.

Memory that a GPU copies from and to is page-locked; torch keeps what is freed of it for the next
that asks.  "cpu:0" is the CPU as such a device: the same lines as on a GPU, without one.
"""

import ctypes
import ctypes.util
import math
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 8192  # numbers; BLAS takes longer products for work of many threads, which is not worth it
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST_BYTES = 2**31 - 1


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


def finite(x: Any) -> bool:
    """Whether all entries of ``x`` are, a contiguous array or a tensor; of many, x x tells fastest.

    >>> finite(np.full(10**5, 1e300)), finite(np.full(10**5, np.inf))
    (True, False)
    """
    if is_tensor(x):
        return bool(x.isfinite().all())
    if x.size > BLOCK:
        flat = x.reshape(-1)
        whole = len(flat) // BLOCK * BLOCK
        blocks, rest = flat[:whole].reshape(-1, BLOCK), flat[whole:]
        with np.errstate(all="ignore"):
            if math.isfinite(np.vecdot(blocks, blocks).sum() + rest.dot(rest)):
                return True  # else it may be the product that is not
    return bool(np.count_nonzero(np.isfinite(x)) == x.size)


def keep_freed() -> bool:
    """Ask glibc not to give back to the system what is freed from now on; whether it will.

    Where arrays come and go, a first touch costs more than the arithmetic.  By default it
    returns every large block when it is freed and gets a new one, page by page, for the next
    array: a round of a thousand nodes takes twice as long, and so does a server's step of a
    model of 25 million numbers.  What was freed before, as graphs are made, goes back.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(
        libc.mallopt(TRIM_THRESHOLD, MOST_BYTES) and libc.mallopt(MMAP_THRESHOLD, MOST_BYTES)
    )


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c")
    libc = ctypes.CDLL(name) if name else None
    return libc if hasattr(libc, "mallopt") else None
