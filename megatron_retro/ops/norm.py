"""Normalization over the last dimension: LayerNorm, LayerNorm with its weight stored as 1 + w, RMSNorm.

`residual_norm` adds the residual in front and gives both the normed and the summed hidden state, in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backends import uses_native


def layer_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, epsilon: float, weight_plus_one: bool = False
) -> Tensor:
    """LayerNorm."""
    if uses_native("layer_norm", hidden.device.type):
        return _native(hidden, None, weight, bias, epsilon, True, weight_plus_one)[0]
    scale = weight + 1 if weight_plus_one else weight
    return functional.layer_norm(hidden, hidden.shape[-1:], scale, bias, epsilon)


def rms_norm(hidden: Tensor, weight: Tensor, *, epsilon: float, weight_plus_one: bool = False) -> Tensor:
    """RMSNorm."""
    if uses_native("rms_norm", hidden.device.type):
        return _native(hidden, None, weight, None, epsilon, False, weight_plus_one)[0]
    scale = weight + 1 if weight_plus_one else weight
    return functional.rms_norm(hidden, hidden.shape[-1:], scale, epsilon)


def residual_norm(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    epsilon: float,
    centered: bool,
    weight_plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm (LayerNorm when centered, RMSNorm otherwise) of hidden + residual, and that sum."""
    if uses_native("residual_norm", hidden.device.type):
        return _native(hidden, residual, weight, bias, epsilon, centered, weight_plus_one)
    summed = hidden + residual
    scale = weight + 1 if weight_plus_one else weight
    if centered:
        return functional.layer_norm(summed, summed.shape[-1:], scale, bias, epsilon), summed
    return functional.rms_norm(summed, summed.shape[-1:], scale, epsilon), summed


def _native(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centered: bool,
    weight_plus_one: bool,
) -> tuple[Tensor, Tensor]:
    normed, summed, _, _ = torch.ops.megatron_retro.residual_norm(
        hidden.contiguous(),
        None if residual is None else residual.contiguous(),
        weight,
        bias,
        epsilon,
        centered,
        1.0 if weight_plus_one else 0.0,
    )
    return normed, summed
