"""Whether numbers are finite."""

import math

import numpy as np
from numpy.typing import NDArray

DOT_PAYS = 4096  # numbers from which the product is faster


def finite(x: NDArray) -> bool:
    """Whether all entries of ``x [d]`` are; of many, x x knows fastest, unless it overflows."""
    if x.size > DOT_PAYS:
        with np.errstate(all="ignore"):
            if math.isfinite(x.dot(x)):
                return True
    return bool(np.isfinite(x).all())
