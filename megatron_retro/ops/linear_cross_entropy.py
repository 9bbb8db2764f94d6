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
from megatron_retro.ops.vocabulary_blocks import (
    Slopes,
    blocks,
    gradients,
    logits_to_slopes,
    statistics,
    statistics_of,
)

_ROWS = 1024


def linear_cross_entropy(
    hidden_BSH: Tensor, weight_VH: Tensor, labels_BS: Tensor, *, z_loss_weight: float = 0.0
) -> Tensor:
    """[B, S] float32: -log softmax(hidden @ weight.T)[label], plus the weighted square of the log normalizer."""
    hidden_TH, labels_T = hidden_BSH.flatten(0, -2), labels_BS.flatten()
    if not uses_native("linear_cross_entropy", hidden_BSH.device.type) or hidden_BSH.dtype == torch.float64:
        return _reference(hidden_TH, weight_VH, labels_T, z_loss_weight).view(labels_BS.shape)
    way = _PositionBlocks if hidden_BSH.device.type == "cpu" else _VocabularyBlocks
    losses: Tensor = way.apply(hidden_TH, weight_VH, labels_T, z_loss_weight)  # type: ignore[no-untyped-call]
    return losses.view(labels_BS.shape)


def _reference(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, z_loss_weight: float) -> Tensor:
    blocks_of_rows = zip(torch.split(hidden_TH, _ROWS), torch.split(labels_T, _ROWS), strict=True)
    pieces = [
        checkpoint(
            _block_losses, rows, weight_VH, targets, z_loss_weight, use_reentrant=False, preserve_rng_state=False
        )
        for rows, targets in blocks_of_rows
    ]
    return torch.cat(pieces)


def _block_losses(hidden: Tensor, weight_VH: Tensor, labels: Tensor, z_loss_weight: float) -> Tensor:
    logits = functional.linear(hidden, weight_VH).float()
    losses = functional.cross_entropy(logits, labels.clamp_min(-1), ignore_index=-1, reduction="none")
    if z_loss_weight:
        losses = losses + z_loss_weight * logits.logsumexp(-1).square().where(labels >= 0, 0.0)
    return losses


def _losses_and_slopes(
    log_normalizer_T: Tensor, label_logit_T: Tensor, counts_T: Tensor, z_loss_weight: float
) -> tuple[Tensor, Slopes]:
    losses = log_normalizer_T - label_logit_T + z_loss_weight * log_normalizer_T.square()
    label_scale = counts_T.to(torch.float32)
    probability_scale = label_scale * (1 + 2 * z_loss_weight * log_normalizer_T)
    return losses.where(counts_T, 0.0), Slopes(log_normalizer_T, probability_scale, label_scale)


class _VocabularyBlocks(torch.autograd.Function):
    """A block of the vocabulary at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, z_loss_weight: float) -> Tensor:
        found = statistics(hidden_TH, weight_VH, labels_T)
        losses, slopes = _losses_and_slopes(found.log_normalizer(), found.label_logit_T, labels_T >= 0, z_loss_weight)
        scales = slopes.log_normalizer_T, slopes.probability_scale_T, slopes.label_scale_T
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, *scales)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, log_normalizer, *scales = ctx.saved_tensors
        slopes = Slopes(log_normalizer, *((scale * grad_T).contiguous() for scale in scales))
        wanted = ctx.needs_input_grad[:2]
        return *gradients(hidden_TH, weight_VH, labels_T, slopes, wanted=wanted), None, None


class _PositionBlocks(torch.autograd.Function):
    """A block of positions at a time, gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, z_loss_weight: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        counting = torch.nonzero(labels_T >= 0)[:, 0]
        hidden, labels = hidden_TH[counting], labels_T[counting]
        losses = hidden.new_empty(len(counting), dtype=torch.float32)
        normalizers = torch.empty_like(losses)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad: Tensor | None = None
        for rows in blocks(len(counting), weight_VH.shape[0] * weight_VH.element_size()):
            logits = hidden[rows] @ weight_VH.T
            found = statistics_of(logits, labels[rows])
            normalizers[rows] = found.log_normalizer()
            losses[rows], slopes = _losses_and_slopes(
                normalizers[rows], found.label_logit_T, labels[rows] >= 0, z_loss_weight
            )
            if not (wants_hidden or wants_weight):
                continue
            logits_to_slopes(logits, labels[rows], slopes)
            if hidden_grad is not None:
                torch.mm(logits, weight_VH, out=hidden_grad[rows])
            if wants_weight:
                weight_grad = _with_product(weight_grad, logits, hidden[rows], last=rows.stop == len(counting))
        if wants_weight and not len(counting):
            weight_grad = torch.zeros_like(weight_VH)
        ctx.z_loss_weight = z_loss_weight
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
                _, slopes = _losses_and_slopes(normalizers, normalizers, labels >= 0, ctx.z_loss_weight)
                weighted = Slopes(normalizers, slopes.probability_scale_T * grads, slopes.label_scale_T * grads)
                weight_grad = gradients(hidden, weight_VH, labels, weighted, wanted=(False, True))[1]
        return hidden_grad, weight_grad, None, None


def _with_product(total_VH: Tensor | None, slope_TV: Tensor, hidden_TH: Tensor, last: bool) -> Tensor:
    """`total` (in float32 between blocks) plus slope.T @ hidden, in the dtype of `hidden` after the last block."""
    if total_VH is None:
        product = slope_TV.T @ hidden_TH
        return product if last else product.float()
    if slope_TV.dtype == torch.float32:
        return total_VH.addmm_(slope_TV.T, hidden_TH)
    total_VH += slope_TV.T @ hidden_TH
    return total_VH.to(slope_TV.dtype) if last else total_VH
