"""The output projection and the loss of every token in one step, without keeping all logits.

A label below zero marks a position that does not count: its loss is exactly zero and no work is done for it where
positions can be left out.

Two ways, both in blocks:
- On the CPU a block of positions at a time, and its gradients at once while its logits are there (three products, as
  without blocks). That needs each position's weight in the final loss before it is known; it is taken as equal for
  all that count, which the backward pass checks. Where it was not, the vocabulary's gradient is computed again.
- On a GPU a block of the vocabulary at a time, its logits computed again in the backward pass (four products):
  products stay large, nothing waits for the device, and every row of the vocabulary's gradient is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_retro.ops.backends import uses_native
from megatron_retro.ops.vocabulary_blocks import blocks, gradients, logits_to_gradients_, statistics, statistics_of

_ROWS = 1024


def linear_cross_entropy(hidden_BSH: Tensor, weight_VH: Tensor, labels_BS: Tensor) -> Tensor:
    """[B, S] float32: -log softmax(hidden @ weight.T)[label]."""
    hidden_TH, labels_T = hidden_BSH.flatten(0, -2), labels_BS.flatten()
    kind = hidden_BSH.device.type, hidden_BSH.dtype
    if not uses_native("linear_cross_entropy", *kind) or hidden_BSH.dtype == torch.float64:
        return _reference(hidden_TH, weight_VH, labels_T).view(labels_BS.shape)
    way = _PositionBlocks if hidden_BSH.device.type == "cpu" else _VocabularyBlocks
    losses: Tensor = way.apply(hidden_TH, weight_VH, labels_T)  # type: ignore[no-untyped-call]
    return losses.view(labels_BS.shape)


def _reference(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    blocks_of_rows = zip(torch.split(hidden_TH, _ROWS), torch.split(labels_T, _ROWS), strict=True)
    losses = [
        checkpoint(_block_losses, rows, weight_VH, targets, use_reentrant=False, preserve_rng_state=False)
        for rows, targets in blocks_of_rows
    ]
    return torch.cat(losses)


def _block_losses(hidden: Tensor, weight_VH: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight_VH).float()
    return functional.cross_entropy(logits, labels.clamp_min(-1), ignore_index=-1, reduction="none")


class _VocabularyBlocks(torch.autograd.Function):
    """A block of the vocabulary at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        found = statistics(hidden_TH, weight_VH, labels_T)
        log_normalizer = found.log_normalizer()
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, log_normalizer)
        return (log_normalizer - found.label_logit_T).where(labels_T >= 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, log_normalizer = ctx.saved_tensors
        scale = ((labels_T >= 0).to(torch.float32) * grad_T).contiguous()
        wanted = ctx.needs_input_grad[:2]
        return *gradients(hidden_TH, weight_VH, labels_T, log_normalizer, scale, wanted=wanted), None


class _PositionBlocks(torch.autograd.Function):
    """A block of positions at a time, gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        counting = torch.nonzero(labels_T >= 0)[:, 0]
        hidden, labels = hidden_TH[counting], labels_T[counting]
        losses = hidden.new_empty(len(counting), dtype=torch.float32)
        normalizers, ones = torch.empty_like(losses), torch.ones_like(losses)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad: Tensor | None = None
        for rows in blocks(len(counting), weight_VH.shape[0] * weight_VH.element_size()):
            logits = hidden[rows] @ weight_VH.T
            found = statistics_of(logits, labels[rows])
            normalizers[rows] = found.log_normalizer()
            losses[rows] = normalizers[rows] - found.label_logit_T
            if not (wants_hidden or wants_weight):
                continue
            logits_to_gradients_(logits, labels[rows], normalizers[rows], ones[rows])
            if hidden_grad is not None:
                torch.mm(logits, weight_VH, out=hidden_grad[rows])
            if wants_weight:
                weight_grad = _with_product(weight_grad, logits, hidden[rows], last=rows.stop == len(counting))
        if wants_weight and not len(counting):
            weight_grad = torch.zeros_like(weight_VH)
        ctx.save_for_backward(hidden, weight_VH, labels, counting, normalizers, hidden_grad, weight_grad)
        return losses.new_zeros(len(labels_T)).index_copy_(0, counting, losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_VH, labels, counting, normalizers, hidden_grad, weight_grad = ctx.saved_tensors
        grads = grad_T[counting]
        if hidden_grad is not None:
            scaled = (hidden_grad * grads[:, None]).to(hidden.dtype)
            hidden_grad = hidden_grad.new_zeros(len(grad_T), hidden.shape[1]).index_copy_(0, counting, scaled)
        if weight_grad is not None and len(grads):
            if bool((grads == grads[0]).all()):
                weight_grad = weight_grad * grads[0]
            else:
                scale = grads.to(torch.float32)
                weight_grad = gradients(hidden, weight_VH, labels, normalizers, scale, wanted=(False, True))[1]
        return hidden_grad, weight_grad, None


def _with_product(total_VH: Tensor | None, grad_TV: Tensor, hidden_TH: Tensor, last: bool) -> Tensor:
    """`total` (in float32 between blocks) plus grad.T @ hidden, in the dtype of `hidden` after the last block."""
    if total_VH is None:
        product = grad_TV.T @ hidden_TH
        return product if last else product.float()
    if grad_TV.dtype == torch.float32:
        return total_VH.addmm_(grad_TV.T, hidden_TH)
    total_VH += grad_TV.T @ hidden_TH
    return total_VH.to(grad_TV.dtype) if last else total_VH
