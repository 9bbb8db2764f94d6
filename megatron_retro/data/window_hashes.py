"""Hashes of all runs of so many tokens: what finds text that comes back, verbatim or nearly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15  # odd, so that no token is lost in the powers of two


def window_hashes(tokens: NDArray[np.generic], length: int) -> NDArray[np.uint64]:
    """A polynomial hash of each run of `length` tokens, modulo 2^64, from those of runs half as long."""
    count = len(tokens) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    unit, size = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9), 1
    unit ^= unit >> np.uint64(29)
    result, covered = np.zeros(count, np.uint64), 0
    while covered < length:
        if length & size:
            result = result * np.uint64(pow(_BASE, size, 1 << 64)) + unit[covered : covered + count]
            covered += size
        unit = unit[:-size] * np.uint64(pow(_BASE, size, 1 << 64)) + unit[size:]
        size *= 2
    result ^= (result >> np.uint64(31)) * np.uint64(_BASE)
    return result
