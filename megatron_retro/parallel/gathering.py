"""From the ranks that hold the model's end to the first rank: each sends what is its own, once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.parallel.mesh import CONTEXT, DATA, PIPELINE, TENSOR, ParallelMesh


def gather_to_first(row: Tensor | None, length: int, mesh: ParallelMesh) -> Tensor | None:
    """[shares of the data, length] int64 on the first rank, None on others; every rank calls it.

    One tensor rank of the last stage gathers along the data axis; the first data rank passes the rows on to the first
    stage. `row` is None on ranks without the model's end, and the same on ranks that share sequences.
    """
    if mesh.rank(TENSOR) != 0:
        return None
    rows = torch.empty(mesh.size(DATA), length, dtype=torch.int64, device=mesh.device)
    if row is not None:
        group, is_first = mesh.group(DATA), mesh.rank(DATA) == 0
        if mesh.size(DATA) == 1:
            rows[0] = row
        else:
            dist.gather(row, list(rows) if is_first else None, group=group, group_dst=0)
    if mesh.rank(DATA) != 0:
        return None
    if mesh.size(PIPELINE) > 1:
        dist.broadcast(rows, group=mesh.group(PIPELINE), group_src=mesh.size(PIPELINE) - 1)
    return rows[:: mesh.size(CONTEXT)] if mesh.rank(PIPELINE) == 0 else None


def sum_on_first(values: Tensor) -> Tensor | None:
    """The sum over all ranks on the first one, None on others; every rank calls it."""
    if dist.get_world_size() > 1:
        dist.reduce(values, 0)
    return values if dist.get_rank() == 0 else None
