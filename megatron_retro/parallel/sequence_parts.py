"""Context parallelism: which part of every sequence a rank holds, and what it exchanges with those that hold the rest.

A sequence of S tokens is cut in 2C spans of whole chunks, of which rank c of C holds the c-th from the front and the
c-th from the end: under a causal mask every rank then has the same work. What a layer needs of other ranks is gathered
whole, with its gradient scattered back: keys and values of all tokens, and the encoded neighbours of the chunk before
each span. Neighbours are encoded where their chunk is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_retro.microbatch import Array, Microbatch, Neighbors
from megatron_retro.parallel.collectives import Axis, gathered

ArrayT = TypeVar("ArrayT", Array, Tensor)
NUM_SPANS = 2


def spans_of(length: int, rank: int, size: int) -> tuple[range, ...]:
    """The positions that one rank holds of a sequence, in order; the length divides by twice the ranks."""
    span = length // (NUM_SPANS * size)
    return tuple(range(number * span, (number + 1) * span) for number in _numbers(rank, size))


def _numbers(rank: int, size: int) -> tuple[int, int]:
    return rank, NUM_SPANS * size - 1 - rank


def part_of(batch: Microbatch[ArrayT], rank: int, size: int) -> Microbatch[ArrayT]:
    """One rank's part of every sequence of a microbatch; of documents it keeps the ids of the whole."""
    if size == 1:
        return batch
    own = np.concatenate(spans_of(batch.tokens_BS.shape[1], rank, size))
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[:, own],
        labels_BS=batch.labels_BS[:, own],
        loss_mask_BS=batch.loss_mask_BS[:, own],
        position_ids_BS=None if batch.position_ids_BS is None else batch.position_ids_BS[:, own],
        neighbors=None if batch.neighbors is None else _part_of_neighbors(batch.neighbors, rank, size),
    )


def _part_of_neighbors(neighbors: Neighbors[ArrayT], rank: int, size: int) -> Neighbors[ArrayT]:
    spans = spans_of(neighbors.num_chunks, rank, size)
    own, before = np.concatenate(spans), np.array([max(span.start - 1, 0) for span in spans])
    mask_before = neighbors.mask_BCKR[:, before]  # a copy
    if rank == 0:
        mask_before[:, 0] = False
    return Neighbors(neighbors.tokens_BCKR[:, own], neighbors.mask_BCKR[:, own], mask_before)


@dataclass(frozen=True)
class ContextAxis(Axis):
    """The ranks that share every sequence; all of them must call what gathers."""

    def spans(self, length: int) -> tuple[range, ...]:
        """Where `length` tokens here stand in the sequence."""
        return spans_of(length * self.size, self.rank, self.size)

    def whole(self, part_BSX: Tensor) -> Tensor:
        """[B, S, ...] in the order of the sequence, from all parts [B, S / C, ...] (all-gather / reduce-scatter)."""
        halves = torch.unflatten(gathered(part_BSX, self.group, 1), 1, (self.size, NUM_SPANS, -1))
        ranks = range(self.size)
        return torch.cat([halves[:, rank, 0] for rank in ranks] + [halves[:, rank, 1] for rank in reversed(ranks)], 1)

    def behind_chunk_before(self, part_BCX: Tensor) -> Tensor:
        """[B * 2, 1 + C / 2, ...]: each span's chunks behind the last of the span before; zeros before the first."""
        spans = torch.unflatten(part_BCX, 1, (NUM_SPANS, -1))
        last = self.whole(spans[:, :, -1])
        shifted = torch.cat((torch.zeros_like(last[:, :1]), last[:, :-1]), 1)
        before = torch.stack([shifted[:, number] for number in _numbers(self.rank, self.size)], 1)
        return torch.cat((before[:, :, None], spans), 2).flatten(0, 1)
