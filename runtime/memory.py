"""Freed memory is kept: where arrays come and go, a first touch costs more than the arithmetic."""

import ctypes
import ctypes.util
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST = 2**31 - 1


@cache
def keep_freed() -> bool:
    """Ask glibc not to give freed blocks back to the system; whether there was one to ask.

    By default it returns every large block when it is freed and gets a new one, page by page, for
    the next array: a round of a thousand nodes takes twice as long.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _MOST) and mallopt(_MMAP_THRESHOLD, _MOST))
