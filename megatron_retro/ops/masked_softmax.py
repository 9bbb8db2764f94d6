"""Softmax over the last dimension under a mask; a row that sees nothing is exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_retro.ops.backends import uses_native


def masked_softmax(scores: Tensor, mask: Tensor | None, *, scale: float = 1.0) -> Tensor:
    """softmax(scale * scores) over what `mask` (True = seen) shows; the mask's leading dimensions may be absent or 1.

    One mask row may serve several rows of scores in a row: [B, 1, S, T] is expanded over heads.
    """
    if uses_native("masked_softmax", scores.device.type):
        return _native(scores, mask, scale)
    if mask is None:
        return (scores * scale).softmax(-1)
    probabilities = (scores * scale).masked_fill(~mask, float("-inf")).softmax(-1)
    return probabilities.where(mask.any(-1, keepdim=True), 0.0)


def _native(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None:
        same_leading = mask.shape[:-1] == scores.shape[: mask.dim() - 1] and mask.shape[-1] == scores.shape[-1]
        mask = mask.contiguous() if same_leading and mask.dim() == scores.dim() else mask.expand_as(scores).contiguous()
    probabilities: Tensor = torch.ops.megatron_retro.masked_softmax(scores.contiguous(), mask, scale)
    return probabilities
