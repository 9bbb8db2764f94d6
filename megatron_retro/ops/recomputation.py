"""Cheap tensors that a backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Packed = Tensor | Callable[[], Tensor]


def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """In this block, whoever saves `tensor` for the backward pass saves the recipe `compute` instead.

    `compute` must give the same values from tensors that are kept anyway. Where saved tensors are already taken care
    of (a checkpointed region computes all of them again), nothing is added; nor while a formula is compiled: a compiler
    chooses what it keeps.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    foreign_hooks = hooks is not None and not isinstance(hooks[0], _Pack)
    if foreign_hooks or not tensor.requires_grad or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(_Pack(tensor, compute), _unpack)


class _Pack:
    """Gives the recipe for one tensor and every other tensor as it is. Blocks nest: the inner one's tensor counts."""

    def __init__(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        self.place, self.count, self.compute = _place(tensor), tensor.numel(), compute

    def __call__(self, saved: Tensor) -> _Packed:
        if _place(saved) != self.place or saved.numel() != self.count:
            return saved
        return partial(_again, self.compute, saved.shape)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Which memory a tensor begins in; one without memory has an address of zero, like all others."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _unpack(packed: _Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _again(compute: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return compute().view(shape)
