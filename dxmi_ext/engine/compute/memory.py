"""Memory of the process. Imports the standard library alone."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt in glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed() -> None:
    """Makes glibc keep freed blocks of up to 1 GiB for reuse.

    By default it returns blocks of 32 MiB or more to the system, so every layer that a CPU computes on large
    images writes to pages that are mapped anew. Without effect on other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 2**30)
    mallopt(_TRIM_THRESHOLD, _LARGEST)
