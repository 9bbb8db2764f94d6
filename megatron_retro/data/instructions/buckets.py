"""Rows of like length together: a step of short conversations is a short step.

Rows are arranged so that each block of `size` rows (a step's) holds rows of like length, and a block's rows are all cut
to its longest, rounded up to an eighth of a whole row: a run meets eight shapes at most. Blocks come in a shuffled
order, and a row's place is a function of (seed, number) as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_retro.data.order import permuted

_SHAPES = 8
_BLOCKS_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class Buckets:
    """`size` rows share a length, which is a multiple of `multiple`."""

    size: int
    multiple: int

    def row_length(self, longest: int, whole: int) -> int:
        """What rows of up to `longest` positions are cut to."""
        step = -(-whole // (_SHAPES * self.multiple)) * self.multiple
        return min(whole, -(-longest // step) * step)

    def arranged(self, lengths: Sequence[int], first: int, key: int) -> list[int]:
        """The order of an epoch's rows, given in a shuffled order; `first` is the number of its first row."""
        window = _BLOCKS_SORTED_TOGETHER * self.size
        order: list[int] = []
        for start in range(0, len(lengths), window):
            order += sorted(range(start, min(start + window, len(lengths))), key=lambda row: lengths[row])
        head = min(-first % self.size, len(order))
        count = (len(order) - head) // self.size
        blocks = [order[head + number * self.size : head + (number + 1) * self.size] for number in range(count)]
        shuffled = permuted(np.arange(count), count, key) if count else ()
        inner = [row for number in shuffled for row in blocks[int(number)]]
        return [*order[:head], *inner, *order[head + count * self.size :]]
