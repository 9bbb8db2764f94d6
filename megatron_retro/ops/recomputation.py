"""Cheap tensors that a backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Packed = Tensor | Callable[[], Tensor]


def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """In this block, whoever saves `tensor` for the backward pass saves the recipe `compute` instead.

    `compute` must give the same values from tensors that are kept anyway. Where saved tensors are already taken care
    of (a checkpointed region computes all of them again), nothing is added.
    """
    hooks_are_set = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if hooks_are_set or not tensor.requires_grad or not torch.is_grad_enabled():
        return nullcontext()
    place, count = tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> _Packed:
        if saved.data_ptr() != place or saved.numel() != count:
            return saved
        shape = saved.shape
        return lambda: _again(compute, shape)

    def unpack(packed: _Packed) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return saved_tensors_hooks(pack, unpack)


def _again(compute: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return compute().view(shape)
