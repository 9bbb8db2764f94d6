"""Cheap tensors that a backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Packed = Tensor | Callable[[], Tensor]
_Recipe = tuple[Tensor, Callable[[], Tensor]]
_NOTHING: AbstractContextManager[Any] = nullcontext()
_offer: ContextVar[_Recipe | None] = ContextVar("offer", default=None)


def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """In this block, whoever saves `tensor` for the backward pass saves the recipe `compute` instead.

    `compute` must give the same values from tensors that are kept anyway. Where saved tensors are already taken care
    of (a checkpointed region computes all of them again), nothing is added; nor while a formula is compiled: a compiler
    chooses what it keeps.
    """
    if torch.compiler.is_compiling():
        return _NOTHING
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    foreign_hooks = hooks is not None and not isinstance(hooks[0], _Pack)
    if foreign_hooks or not tensor.requires_grad or not torch.is_grad_enabled():
        return _NOTHING
    return saved_tensors_hooks(_Pack(tensor, compute), _unpack)


def offered(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """The same for the linear layers of a block alone: what else is saved there is not looked at, which takes time."""
    return _NOTHING if torch.compiler.is_compiling() else _Offer(tensor, compute)


def as_offered(hidden: Tensor) -> AbstractContextManager[Any]:
    """For a product that reads `hidden`: `recomputed`, where that is the tensor of the block around it."""
    recipe = None if torch.compiler.is_compiling() else _offer.get()
    return _NOTHING if recipe is None or _place(recipe[0]) != _place(hidden) else recomputed(*recipe)


class _Offer:
    def __init__(self, *recipe: Any) -> None:
        self._recipe = recipe

    def __enter__(self) -> None:
        self._token = _offer.set(self._recipe)

    def __exit__(self, *_: object) -> None:
        _offer.reset(self._token)


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
