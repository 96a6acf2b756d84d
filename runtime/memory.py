"""Freed memory is kept: where arrays come and go, a first touch costs more than the arithmetic."""

import ctypes
import ctypes.util
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST = 2**31 - 1


def keep_freed() -> bool:
    """Ask glibc not to give back to the system what is freed from now on; whether it will.

    By default it returns every large block when it is freed and gets a new one, page by page, for
    the next array: a round of a thousand nodes takes twice as long, and so does a server's step of
    a model of 25 million numbers.  What was freed before, as graphs are made, goes back.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(_TRIM_THRESHOLD, _MOST) and libc.mallopt(_MMAP_THRESHOLD, _MOST))


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c")
    libc = ctypes.CDLL(name) if name else None
    return libc if hasattr(libc, "mallopt") else None
