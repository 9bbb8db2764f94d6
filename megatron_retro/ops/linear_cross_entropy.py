"""The output projection and the loss of every token in one step, without keeping all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_ROWS = 1024


def linear_cross_entropy(hidden_BSH: Tensor, weight_VH: Tensor, labels_BS: Tensor) -> Tensor:
    """[B, S] float32: -log softmax(hidden @ weight.T)[label]; the logits exist for a block of tokens at a time."""
    hidden = torch.split(hidden_BSH.flatten(0, 1), _ROWS)
    labels = torch.split(labels_BS.flatten(), _ROWS)
    blocks = [
        checkpoint(_block_losses, rows, weight_VH, targets, use_reentrant=False, preserve_rng_state=False)
        for rows, targets in zip(hidden, labels, strict=True)
    ]
    return torch.cat(blocks).view(labels_BS.shape)


def _block_losses(hidden: Tensor, weight_VH: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight_VH).float()
    return functional.cross_entropy(logits, labels, reduction="none")
