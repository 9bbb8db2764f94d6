"""How the tensor-parallel ranks of a Megatron-LM run share a tensor, undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_retro.errors import ArtifactError

Merge = Callable[[Sequence[Tensor]], Tensor]


def rows(shards: Sequence[Tensor]) -> Tensor:
    """Merge a column-parallel weight: each rank has some output rows."""
    return torch.cat(list(shards), 0)


def columns(shards: Sequence[Tensor]) -> Tensor:
    """Merge a row-parallel weight: each rank has some input columns."""
    return torch.cat(list(shards), 1)


def replica(shards: Sequence[Tensor]) -> Tensor:
    """Merge a replicated tensor, which must be the same on every rank."""
    if not all(torch.equal(shards[0], shard) for shard in shards[1:]):
        raise ArtifactError("a tensor that every rank should have alike differs between the shards")
    return shards[0]


def gated_rows(shards: Sequence[Tensor]) -> Tensor:
    """Merge a gated up-projection: each rank has [its gate; its up]."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.stack([torch.cat([half[number] for half in halves]) for number in (0, 1)])


def grouped(groups: int) -> Merge:
    """Merge rows of whole heads into [G, rows of a head, ...]."""

    def merge(shards: Sequence[Tensor]) -> Tensor:
        whole = rows(shards)
        return whole.reshape(groups, -1, *whole.shape[1:])

    return merge
