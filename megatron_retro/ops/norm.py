"""Normalization over the last dimension: LayerNorm, LayerNorm with its weight stored as 1 + w, RMSNorm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def layer_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, epsilon: float, weight_plus_one: bool = False
) -> Tensor:
    """LayerNorm."""
    scale = weight + 1 if weight_plus_one else weight
    return functional.layer_norm(hidden, hidden.shape[-1:], scale, bias, epsilon)


def rms_norm(hidden: Tensor, weight: Tensor, *, epsilon: float, weight_plus_one: bool = False) -> Tensor:
    """RMSNorm."""
    scale = weight + 1 if weight_plus_one else weight
    return functional.rms_norm(hidden, hidden.shape[-1:], scale, epsilon)
