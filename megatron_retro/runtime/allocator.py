"""How the C library keeps memory that a long-lived process has freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_THRESHOLD_BYTES = 128 * 1024


def return_freed_blocks() -> bool:
    """Give large blocks back to the system as soon as they are freed; False where the C library knows no such setting.

    By itself glibc raises the size from which it does so up to 32 MB. A service whose requests differ in length then
    grows for minutes, until its heap has met every mixture of sizes. Training wants the opposite: its sizes recur.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
