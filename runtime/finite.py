"""Whether numbers are finite."""

import math
from typing import Any

import numpy as np

from offbeat.runtime.tensors import is_tensor

BLOCK = 8192  # numbers; BLAS takes longer products for work of many threads, which is not worth it


def finite(x: Any) -> bool:
    """Whether all entries of ``x`` are, a contiguous array or a tensor; of many, x x tells fastest.

    >>> import numpy as np
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
    return bool(np.isfinite(x).all())
