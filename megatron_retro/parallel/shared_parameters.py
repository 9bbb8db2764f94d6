"""Parameters that several pipeline stages hold: the token embedding, for a tied output and for the encoder.

All copies start equal and get the sum of all copies' gradients, so they stay equal, bit for bit. Copies on one rank
(several stages there) are one for the optimizer; the others are synchronized with it. The copy of the first stage
counts in norms, totals and checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_retro.errors import DistributedError
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.mesh import DATA, PIPELINE, TENSOR, ParallelMesh
from megatron_retro.parallel.partition import StagePart
from megatron_retro.runtime.process_group import new_group

SHARED = "embedding.word.weight"
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class SharedEmbedding:
    """This rank's copies, and the group of ranks that hold copies (None when there is no other)."""

    copies: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give all copies the sum of their gradients; every rank of the group calls it."""
        gradients = [local(copy.grad) for copy in self.copies if copy.grad is not None]
        if not self.copies or not self.copies[0].requires_grad:
            return
        if gradients:
            total = torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]
        else:
            total = torch.zeros_like(local(self.copies[0]))
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        first = self.copies[0]
        if first.grad is None:
            first.grad = torch.zeros_like(first)
        local(first.grad).copy_(total)
        for copy in self.copies[1:]:
            copy.grad = None

    @torch.no_grad()
    def sync_copies(self) -> None:
        """Bring further copies of this rank to the optimizer's one, before a step or an evaluation."""
        for copy in self.copies[1:]:
            local(copy).copy_(local(self.copies[0]))


def share_embedding(
    mesh: ParallelMesh, parts: Sequence[StagePart], stages: Sequence[tuple[StagePart, nn.Module]]
) -> SharedEmbedding | None:
    """The copies of this rank's stages; every rank of the world calls it, since it makes groups."""
    holders = sorted({part.index % mesh.size(PIPELINE) for part in parts if part.embedding})
    group = _group_of_stages(mesh, holders) if len(holders) > 1 else None
    if sum(part.embedding for part in parts) < 2:
        return None
    copies = tuple(dict(module.named_parameters())[SHARED] for part, module in stages if part.embedding)
    for copy in copies:
        vars(copy)["counted_elsewhere"] = mesh.rank(PIPELINE) != holders[0]
    return SharedEmbedding(copies, group)


def _group_of_stages(mesh: ParallelMesh, holders: Sequence[int]) -> dist.ProcessGroup | None:
    """Ranks at the same place on the other axes, on the given stages; None for a rank that is not among them."""
    ranks = mesh.devices.mesh
    mine = None
    for data in range(mesh.size(DATA)):
        for tensor in range(mesh.size(TENSOR)):
            group = new_group([int(ranks[stage, data, tensor]) for stage in holders], timeout=mesh.timeout)
            here = (mesh.rank(DATA), mesh.rank(TENSOR)) == (data, tensor)
            mine = group if here and mesh.rank(PIPELINE) in holders else mine
    return mine


@torch.no_grad()
def require_equal(names_and_tensors: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup, what: str) -> None:
    """Refuse to go on when ranks of a group hold different bits of what should be the same; all of them call it."""
    sums = torch.stack([_fingerprint(tensor) for _, tensor in names_and_tensors])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    wrong = [name for (name, _), low, high in zip(names_and_tensors, lowest, highest, strict=True) if low != high]
    if wrong:
        raise DistributedError(
            f"{len(wrong)} replicated parameters differ between {what} ranks",
            got=", ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else ""),
            expected="the same bits on every rank",
            fix="load the last checkpoint; if it happens again, look for a faulty device or a random operator",
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """A sum over the bits, weighted by place, that two different tensors share by accident only.

    A block at a time: each byte becomes two numbers of eight.
    """
    octets = local(tensor).contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=octets.device)
    for start in range(0, octets.numel(), _BLOCK_BYTES):
        bits = octets[start : start + _BLOCK_BYTES].long()
        places = torch.arange(start + 1, start + 1 + bits.numel(), device=bits.device)
        total += bits.mul_(places.mul_(2654435761).remainder_(2147483647)).sum()
    return total
