"""Weight gradients of linear layers, added in float32 where they are made, into the sums that FSDP2 reduces.

FSDP2 keeps, for each parameter, the sum of the gradients of a step's microbatches in the type of reductions, and adds
each microbatch's to it in a pass of its own. Here the product that makes a gradient adds it to that sum; FSDP2 finds
nothing left to add, and reduces the sum as it would its own. Where gradients are reduced after every microbatch there
is nothing to sum, and FSDP2 goes on alone.

A sum is lent to its leaf for the time of a layer's call, under a version counter of its own: further microbatches,
which add to the same sum before this one's backward, are none of autograd's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatron_retro.model.leaves import Linear
from megatron_retro.ops.linear import linear
from megatron_retro.ops.local_tensors import local
from megatron_retro.ops.weight_gradients import adding_linear
from megatron_retro.parallel.data_parallel import parameter_groups
from megatron_retro.parallel.layer_transforms import DeferredWeightGradients, parts_of, replace_part
from megatron_retro.parallel.region_products import RegionProduct


class GradientSums:
    """The sums of one stage. Nothing is added while `sums_microbatches` is not set."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.sums_microbatches = False
        self._dtype = dtype

    def attach(self, stage: nn.Module, layers: Sequence[nn.Module], deferred: DeferredWeightGradients | None) -> None:
        """Let the linear layers inside of `layers` add where they can; FSDP2 has `stage` already."""
        held = {(param._module_info.module, param._module_info.param_name): param for param in _held_by_fsdp(stage)}
        for layer in layers:
            leaves = []
            for leaf in layer.modules():
                if not (isinstance(leaf, Linear) and leaf.weight.requires_grad):
                    continue
                adds = _adding(leaf, deferred)
                if adds is not None:
                    leaves.append(_LeafSum(leaf, held[leaf, "weight"], adds))
            for name, part in parts_of(layer) if leaves else ():
                replace_part(layer, name, self._lending(part, leaves))

    def _lending(self, part: Callable[..., Any], leaves: Sequence[_LeafSum]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if not (self.sums_microbatches and torch.is_grad_enabled()):
                return part(*arguments, **keywords)
            for leaf in leaves:
                leaf.lend(self._dtype)
            try:
                return part(*arguments, **keywords)
            finally:
                for leaf in leaves:
                    leaf.take_back()

        return run


class _LeafSum:
    """The sum of one leaf's weight gradient, which FSDP2 holds from a step's first use to its reduction."""

    def __init__(self, leaf: Linear, held: Any, adds: Callable[..., Tensor]) -> None:
        self._leaf, self._held, self._plain, self._adds = leaf, held, leaf.multiply, adds
        self._sums: Tensor | None = None
        self._used = False
        leaf.multiply = self.multiply

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The leaf's product."""
        if self._sums is None:
            return self._plain(hidden, weight, bias)
        self._used = True
        return self._adds(hidden, weight, bias, self._sums)

    def lend(self, dtype: torch.dtype) -> None:
        """For the call that follows; zeros where there is no sum yet."""
        held = self._held.unsharded_accumulated_grad
        if held is None:
            weight = local(self._leaf.weight)
            sums = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        else:
            sums = local(held)
        self._sums, self._used = sums.data.flatten(0, -2), False

    def take_back(self) -> None:
        """Give it to FSDP2, if it was used."""
        if self._used and self._held.unsharded_accumulated_grad is None:
            assert self._sums is not None
            self._held.unsharded_accumulated_grad = _like(self._leaf.weight, self._sums)
        self._sums = None


def _like(weight: Tensor, sums_YX: Tensor) -> Tensor:
    part = sums_YX.view(local(weight.detach()).shape)
    if not isinstance(weight, DTensor):
        return part
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def _held_by_fsdp(stage: nn.Module) -> Iterator[Any]:
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module):
                yield from group.fsdp_params


def _adding(leaf: Linear, deferred: DeferredWeightGradients | None) -> Callable[..., Tensor] | None:
    """A leaf's product, as it adds to sums; None where there is no such one: FP8 multiplies its own way."""
    if isinstance(leaf.multiply, RegionProduct):
        return leaf.multiply
    if deferred is not None:
        return deferred.multiply if leaf.multiply == deferred.multiply else None
    return adding_linear if leaf.multiply == linear else None
