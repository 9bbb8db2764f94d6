"""The norm of the whole gradient, over every axis along which the model is cut.

A gradient that is a DTensor counts its own shard and is summed over the mesh axes that cut it; axes that replicate it
add nothing. Sums are made in float32 per tensor and in float64 across tensors, in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

CutAxes = tuple[dist.ProcessGroup, ...]


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The plain local tensors of all gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def squared_norm(parameters: Iterable[Tensor], extra_axes: Sequence[dist.ProcessGroup] = ()) -> Tensor:
    """Sum of squares of all gradients, the same on every rank; float64, on the gradients' device.

    Every rank of the groups concerned must call it. `extra_axes` are groups whose ranks hold different parameters
    (pipeline stages); parameters marked `counted_elsewhere` (a tied copy on another stage) add nothing, unless what
    they have is not finite, which must not go unnoticed.
    """
    sums: dict[CutAxes, list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        if parameter.grad is not None:
            local, axes = _local_square(parameter.grad)
            counts = not getattr(parameter, "counted_elsewhere", False)
            sums.setdefault(axes, []).append(local if counts else 0.0 * local)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for axes, squares in sums.items():
        part = torch.stack([square.double() for square in squares]).sum()
        for group in axes:
            dist.all_reduce(part, group=group)
        total += part
    for group in extra_axes:
        dist.all_reduce(total, group=group)
    return total


def _local_square(gradient: Tensor) -> tuple[Tensor, CutAxes]:
    if not isinstance(gradient, DTensor):
        return _square(gradient), ()
    # a shard of a shard is none of `is_shard`'s, so what is neither whole nor a part of a sum is cut
    whole = [placement.is_replicate() or placement.is_partial() for placement in gradient.placements]
    cut = [axis for axis, is_whole in enumerate(whole) if not is_whole]
    partial = [placement for placement in gradient.placements if placement.is_partial()]
    if partial:
        gradient = gradient.redistribute(placements=_without_partial(gradient))
    groups = tuple(gradient.device_mesh.get_group(axis) for axis in cut)
    return _square(gradient.to_local()), groups


def _without_partial(gradient: DTensor) -> list[Placement]:
    return [Replicate() if placement.is_partial() else placement for placement in gradient.placements]


def _square(local: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(local, dtype=torch.float32)
    return norm.square()


def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply all gradients in place."""
    gradients = local_gradients(parameters)
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: float, largest: float) -> float:
    """What gradients of this norm are multiplied with; 1 without a limit."""
    if largest <= 0.0 or norm <= largest:
        return 1.0
    return largest / (norm + 1e-6)
