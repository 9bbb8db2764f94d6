"""Binary search in arrays that are mapped files: no copy, whatever their alignment, many values at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def last_at_or_before(
    read: Callable[[NDArray[np.int64]], NDArray[np.int64]], count: int, values: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each value the last i in [0, count) with read(i) <= value; `read` must not fall, and read(0) <= all."""
    low = np.zeros(values.shape, np.int64)
    high = np.full(values.shape, count, np.int64)
    for _ in range(max(count, 1).bit_length()):
        middle = (low + high) >> 1
        right = (high - low > 1) & (read(middle) <= values)
        high = np.where(right | (high - low <= 1), high, middle)
        low = np.where(right, middle, low)
    return low
