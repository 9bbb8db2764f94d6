"""A worse retriever on purpose: a stated share of chunks read another chunk's neighbours, or none.

Chunks are drawn by a hash of their number, so a chunk has the same fate at every visit, in training and in evaluation,
and the chunks of a smaller share are among those of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.order import key_of, mix_array

_FATE_KEY, _OTHER_KEY = 21, 22


@dataclass(frozen=True)
class Degradation:
    """Shares of all chunks; together at most 1."""

    random: float = 0.0
    absent: float = 0.0

    def rows(self, chunks: NDArray[np.int64], row_ranges: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """The row of the table that each chunk reads: its own, or any other."""
        sizes = np.array([last - first for first, last in row_ranges], np.int64)
        drawn = (_uniform(chunks, _OTHER_KEY) * int(sizes.sum())).astype(np.int64)
        ends = np.cumsum(sizes)
        place = np.searchsorted(ends, drawn, side="right")
        firsts = np.array([first for first, _ in row_ranges], np.int64)
        other = drawn - (ends - sizes)[place] + firsts[place]
        return np.where(_uniform(chunks, _FATE_KEY) < self.random, other, chunks)

    def loses(self, chunks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a chunk reads nothing."""
        return _uniform(chunks, _FATE_KEY) >= 1.0 - self.absent


def _uniform(numbers: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    mixed = mix_array(numbers.astype(np.uint64) ^ np.uint64(key_of(key)))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)
