"""Collectives that gradients pass through. The group is an argument; every rank of it must call.

On the tensor axis a tensor in the RESIDUAL form is the same on all ranks, or under sequence parallelism sharded along
its sequence dimension (the last but one; neighbours along their chunks, where these divide). Inside attention,
cross-attention, MLP, encoder and output a tensor is GATHERED: whole, and its gradient is this rank's part of a sum.
`gather` and `reduce` cross that border, and each is the other's transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE_DIM = -2
# torch 2.13 has new names for these two, and warns at the old ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A new tensor: the sum over the group."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def all_gather(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The group's parts joined along `dim`, in rank order; contiguous, or each reader would make and keep its copy."""
    size = dist.get_world_size(group)
    part = tensor.movedim(dim, 0).contiguous()
    joined = part.new_empty((part.shape[0] * size, *part.shape[1:]))
    _all_gather(joined, part, group=group)
    return joined.movedim(0, dim).contiguous()


def reduce_scatter(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along `dim`, of the sum over the group."""
    size = dist.get_world_size(group)
    whole = tensor.movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
    _reduce_scatter(part, whole, group=group)
    return part.movedim(0, dim)


def begin_all_gather(place: Tensor, part: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """The group's parts joined along the first dimension into `place`; all contiguous. Wait before it is read."""
    work: dist.Work = _all_gather(place, part, group=group, async_op=True)
    return work


def begin_reduce_scatter(place: Tensor, whole: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """This rank's part, along the first dimension, of the sum into `place`. Wait before it is read."""
    work: dist.Work = _reduce_scatter(place, whole, group=group, async_op=True)
    return work


def begin_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """The sum over the group in the place of each rank's tensor. Wait before it is read."""
    work: dist.Work = dist.all_reduce(tensor, group=group, async_op=True)
    return work


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, context.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        context.group, context.dim = group, dim
        return all_gather(tensor, dim, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(gradient, context.dim, context.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        context.group, context.dim = group, dim
        return reduce_scatter(tensor, dim, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(gradient, context.dim, context.group), None, None


class _CountOnce(torch.autograd.Function):
    """Gathered -> residual for a tensor that is already the same on all ranks: its gradient counts on one of them."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.first = dist.get_rank(group) == 0
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient if context.first else torch.zeros_like(gradient), None


def _applied(function: type[torch.autograd.Function], tensor: Tensor, *more: Any) -> Tensor:
    result: Tensor = function.apply(tensor, *more)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def gathered(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The group's parts joined along `dim`; each gets the sum of the gradients that its part has on all ranks."""
    return _applied(_Gather, part, group, dim)


@dataclass
class StreamCut:
    """Along which dimension a residual tensor is cut under sequence parallelism."""

    dim: int = SEQUENCE_DIM


@dataclass(frozen=True)
class Axis:
    """Ranks that share something, and this one's place among them."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)


@dataclass(frozen=True)
class TensorAxis(Axis):
    """The tensor ranks, and whether the residual stream is cut along its sequence between them."""

    sequence_parallel: bool

    def gather(self, residual: Tensor, dim: int = SEQUENCE_DIM) -> Tensor:
        """Residual -> gathered (all-gather / reduce-scatter, or identity / all-reduce)."""
        if self.sequence_parallel:
            return gathered(residual, self.group, dim)
        return _applied(_Copy, residual, self.group)

    def reduce(self, partial: Tensor, dim: int = SEQUENCE_DIM) -> Tensor:
        """Parts of a row-parallel product -> residual (reduce-scatter / all-gather, or all-reduce / identity)."""
        if self.sequence_parallel:
            return _applied(_Scatter, partial, self.group, dim)
        return _applied(_Reduce, partial, self.group)

    def total(self, partial: Tensor) -> Tensor:
        """Gathered parts of a sum -> that sum, gathered (all-reduce / all-reduce)."""
        return self.gather(self.reduce(partial))

    def split(self, gathered: Tensor) -> Tensor:
        """A gathered tensor, the same on all ranks -> residual, without communication."""
        if not self.sequence_parallel:
            return _applied(_CountOnce, gathered, self.group)
        length = gathered.shape[SEQUENCE_DIM] // self.size
        return gathered.narrow(SEQUENCE_DIM, self.rank * length, length)

    def local_length(self, length: int) -> int:
        """How many positions of a sequence the residual form holds on a rank."""
        return length // self.size if self.sequence_parallel else length
