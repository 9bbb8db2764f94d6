"""Data parallelism and mixed precision by torch's FSDP2, one unit per layer and one for the rest of a stage.

    none       parameters, gradients and optimizer whole on every data rank; gradients summed once per step
    optimizer  the optimizer's state sharded: parameters whole from the first use in a step to its end; gradients
               reduce-scattered once, with the last microbatch
    gradients  the same, with gradients reduce-scattered after every microbatch, so whole ones are never kept
    full       parameters gathered for each use and freed after it

Sums over data ranks are sums, not means: the loss is already divided by the tokens of the global batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_retro.model.retro import Retro


def fsdp_units(model: Retro) -> Iterator[nn.Module]:
    """The modules that are gathered and reduced together, each by itself, before the rest of the stage."""
    if model.encoder is not None:
        yield from model.encoder.layers.values()
    yield from model.layers.values()


def mixed_precision(compute: torch.dtype, reduce: torch.dtype) -> MixedPrecisionPolicy:
    """Float32 parameters used in `compute`, gradients summed in `reduce`.

    Inputs are left as they are: the stream has the type of the embedding's rows, and rotations stay float32.
    """
    if compute == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)


def shard_unit(module: nn.Module, mesh: DeviceMesh, sharding: str, policy: MixedPrecisionPolicy) -> None:
    """Hand one module (and what of it is not in a unit yet) to FSDP2; its parameters may be real or on meta."""
    if sharding == "none":
        replicate(module, mesh=mesh, mp_policy=policy)
    else:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=sharding == "full")
    assert isinstance(module, FSDPModule)
    # layers hand encoded neighbours on as they are: a view, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(root: nn.Module, sharding: str, *, last: bool) -> None:
    """What the backward of a microbatch communicates; without a pipeline (a schedule decides that itself)."""
    if not isinstance(root, FSDPModule):
        return
    every = sharding in ("gradients", "full")
    root.set_requires_gradient_sync(every or last)
    root.set_is_last_backward(last)
    root.set_reshard_after_backward(sharding == "full" or last)


def reduce_in_backward(root: FSDPModule) -> None:
    """Let the backward that follows, the last of a step, reduce each unit's gradients; nothing waits for them yet."""
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    root.set_is_last_backward(False)


def reduce_what_is_left(root: FSDPModule) -> None:
    """Reduce gradients that came outside of a backward, or of units whose end autograd did not meet."""
    for module in cast(nn.Module, root).modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module):
                group.post_backward()


def wait_for_reductions(root: nn.Module) -> None:
    """Let what follows see the reduced gradients."""
    if isinstance(root, FSDPModule):
        root.set_is_last_backward(True)
        cast(Any, root._get_fsdp_state())._root_post_backward_final_callback()


def gather_ahead(units: Sequence[nn.Module]) -> None:
    """Begin to gather each unit's parameters before the one in front of it computes; the units in their order."""
    for unit, following in pairwise(units):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])


def reduce_without_stalls(stage: nn.Module, units: int) -> None:
    """Let so many units' gradients be on their way at once, where torch can (2.13).

    With one, the default, the backward of a layer waits for the reduction of the layer before it. A buffer takes the
    place of the sums that are copied into it, so nothing is added where gradients of microbatches are summed.
    """
    allow = getattr(stage, "set_reduce_scatter_max_input_buffers", None)
    if callable(allow):
        allow(units)


def accumulate_in_reduce_dtype(root: nn.Module) -> None:
    """Move gradients that arose outside of a unit's own backward to its sums, which are in the type of reductions.

    FSDP2 does so at the end of each unit's backward; a deferred weight gradient comes after that.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module):
                for parameter in group.fsdp_params:
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()


def parameter_groups(module: FSDPModule) -> Sequence[Any]:
    """What FSDP2 gathers and reduces together, of one unit."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return tuple(state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)  # torch 2.11
