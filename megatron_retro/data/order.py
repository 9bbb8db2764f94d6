"""The order of samples without a table: a keyed permutation of [0, size), computed for any position at once.

A Feistel network over a grid of about sqrt(size) by sqrt(size) cells; positions outside [0, size) walk on along
their cycle, which stays a permutation. 19 billion samples cost no memory and no start-up.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MASK = (1 << 64) - 1
MAX_SIZE = 1 << 60


def mix(value: int) -> int:
    """A 64-bit number thoroughly mixed (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def key_of(*parts: int) -> int:
    """One key of several numbers; their order counts."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & _MASK))
    return key


def permuted(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where the keyed permutation of [0, size) puts each position."""
    if size < 1 or size > MAX_SIZE:
        raise ValueError(f"a permutation of {size} elements")
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    keys = [np.uint64(key_of(key, number)) for number in range(_ROUNDS)]
    found = np.asarray(positions, np.int64).astype(np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        found[outside] = _network(found[outside], np.uint64(width), np.uint64(height), keys)
        outside = found >= np.uint64(size)
    return found.astype(np.int64)


def _network(
    values: NDArray[np.uint64], width: np.uint64, height: np.uint64, keys: list[np.uint64]
) -> NDArray[np.uint64]:
    left, right = values % width, values // width
    for number in range(0, len(keys), 2):
        left = (left + mix_array(right ^ keys[number]) % width) % width
        right = (right + mix_array(left ^ keys[number + 1]) % height) % height
    return right * width + left
