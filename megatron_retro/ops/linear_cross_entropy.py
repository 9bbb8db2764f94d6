"""The output projection and the loss of every token in one step, without keeping all logits.

A label below zero marks a position that does not count: its loss is exactly zero and no work is done for it where
positions can be left out.

Two ways, both in blocks:
- On the CPU a block of positions at a time, and its gradients at once while its logits are there (three products, as
  without blocks). That needs each position's weight in the final loss before it is known; it is taken as equal for
  all that count, which the backward pass checks. Where it was not, the vocabulary's gradient is computed again.
- On a GPU a block of the vocabulary at a time, its logits computed again in the backward pass (four products):
  products stay large, nothing waits for the device, and every row of the vocabulary's gradient is rounded once.

Products are torch's; between them is a pass over the logits, by our kernel or by torch's operators. Where the
vocabulary is cut, a rank gets the statistics of its own rows; who cuts it reduces them (`parallel.tensor_parallel`), so
nothing here speaks to other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_retro.ops.backends import uses_native
from megatron_retro.ops.cpu_products import product, product_into

_ROWS = 1024
BLOCK_BYTES = 1 << 27
_FEWEST_LINES = 16


def linear_cross_entropy(hidden_BSH: Tensor, weight_VH: Tensor, labels_BS: Tensor) -> Tensor:
    """[B, S] float32: -log softmax(hidden @ weight.T)[label]."""
    hidden_TH, labels_T = hidden_BSH.flatten(0, -2), labels_BS.flatten()
    on_cpu = hidden_BSH.device.type == "cpu"
    if hidden_BSH.dtype == torch.float64 or (
        on_cpu and not uses_native("linear_cross_entropy", "cpu", hidden_BSH.dtype)
    ):
        return _reference(hidden_TH, weight_VH, labels_T).view(labels_BS.shape)
    way = _PositionBlocks if on_cpu else _VocabularyBlocks
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
            logits = product(hidden[rows], weight_VH.T)
            found = statistics_of(logits, labels[rows])
            normalizers[rows] = found.log_normalizer()
            losses[rows] = normalizers[rows] - found.label_logit_T
            if not (wants_hidden or wants_weight):
                continue
            logits_to_gradients_(logits, labels[rows], normalizers[rows], ones[rows])
            if hidden_grad is not None:
                product_into(logits, weight_VH, hidden_grad[rows])
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
        first = product(grad_TV.T, hidden_TH)
        return first if last else first.float()
    if grad_TV.dtype == torch.float32:
        return total_VH.addmm_(grad_TV.T, hidden_TH)
    total_VH += product(grad_TV.T, hidden_TH)
    return total_VH.to(grad_TV.dtype) if last else total_VH


@dataclass(frozen=True)
class Statistics:
    """Of each position's logits, float32: the largest, the sum of exp(logit - largest), the label's logit."""

    largest_T: Tensor
    sum_T: Tensor
    label_logit_T: Tensor

    def log_normalizer(self) -> Tensor:
        """[T] log of the sum of exp(logit)."""
        return self.largest_T + self.sum_T.log()


def statistics(hidden_TH: Tensor, rows_VH: Tensor, labels_T: Tensor, first_label: int = 0) -> Statistics:
    """Over these rows of the vocabulary; a label that is not among them contributes a logit of zero."""
    whole = _new_statistics(hidden_TH)
    for columns in blocks(rows_VH.shape[0], hidden_TH.shape[0] * hidden_TH.element_size()):
        logits = product(hidden_TH, rows_VH[columns].T)
        part = statistics_of(logits, labels_T, first_label + columns.start)
        whole = _merged(whole, part)
    return whole


def gradients(
    hidden_TH: Tensor,
    rows_VH: Tensor,
    labels_T: Tensor,
    log_normalizer_T: Tensor,
    scale_T: Tensor,
    first_label: int = 0,
    *,
    wanted: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Of the hidden state (these rows' part of it) and of these rows, where `wanted`; logits are computed once more.

    `scale` is the gradient of each position's loss.
    """
    exact = hidden_TH.dtype == torch.float32
    hidden_grad = torch.zeros_like(hidden_TH, dtype=torch.float32) if wanted[0] else None
    rows_grad = torch.empty_like(rows_VH) if wanted[1] else None
    for columns in blocks(rows_VH.shape[0], hidden_TH.shape[0] * hidden_TH.element_size()):
        logits = product(hidden_TH, rows_VH[columns].T)
        logits_to_gradients_(logits, labels_T, log_normalizer_T, scale_T, first_label + columns.start)
        if hidden_grad is not None and exact:
            hidden_grad.addmm_(logits, rows_VH[columns])
        elif hidden_grad is not None:
            hidden_grad += product(logits, rows_VH[columns])
        if rows_grad is not None:
            product_into(logits.T, hidden_TH, rows_grad[columns])
    return None if hidden_grad is None else hidden_grad.to(hidden_TH.dtype), rows_grad


def statistics_of(logits_TV: Tensor, labels_T: Tensor, first_label: int = 0) -> Statistics:
    """Of logits that are there."""
    if not _native(logits_TV):
        return _reference_statistics(logits_TV, labels_T, first_label)
    whole = _new_statistics(logits_TV)
    torch.ops.megatron_retro.vocabulary_statistics(
        logits_TV, labels_T, first_label, whole.largest_T, whole.sum_T, whole.label_logit_T
    )
    return whole


def logits_to_gradients_(
    logits_TV: Tensor, labels_T: Tensor, log_normalizer_T: Tensor, scale_T: Tensor, first_label: int = 0
) -> None:
    """Overwrite logits with the gradient of the loss by them: scale * (softmax - [is label])."""
    if _native(logits_TV):
        torch.ops.megatron_retro.vocabulary_gradient_(logits_TV, labels_T, first_label, log_normalizer_T, scale_T)
        return
    scale = scale_T[:, None]
    local, held = _local(labels_T, logits_TV.shape[1], first_label)
    chances = (logits_TV - log_normalizer_T[:, None]).exp_()  # float32, written once; rounded when it is scaled
    of_label = chances.gather(1, local[:, None]) * scale - torch.where(held[:, None], scale, 0.0)
    torch.mul(chances, scale, out=logits_TV).scatter_(1, local[:, None], of_label.to(logits_TV.dtype))


def blocks(length: int, bytes_each: int) -> Iterator[slice]:
    """Cuts `length` lines of `bytes_each` into blocks of about BLOCK_BYTES, of equal size but for the last."""
    step = max(_FEWEST_LINES, BLOCK_BYTES // max(1, bytes_each) // _FEWEST_LINES * _FEWEST_LINES)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _native(logits_TV: Tensor) -> bool:
    return logits_TV.dtype != torch.float64 and uses_native(
        "linear_cross_entropy", logits_TV.device.type, logits_TV.dtype
    )


def _new_statistics(like_TX: Tensor) -> Statistics:
    largest = like_TX.new_full((like_TX.shape[0],), float("-inf"), dtype=torch.float32)
    return Statistics(largest, torch.zeros_like(largest), torch.zeros_like(largest))


def _merged(left: Statistics, right: Statistics) -> Statistics:
    largest = torch.maximum(left.largest_T, right.largest_T)
    total = left.sum_T * (left.largest_T - largest).exp() + right.sum_T * (right.largest_T - largest).exp()
    return Statistics(largest, total, left.label_logit_T + right.label_logit_T)


def _reference_statistics(logits_TV: Tensor, labels_T: Tensor, first_label: int) -> Statistics:
    local, held = _local(labels_T, logits_TV.shape[1], first_label)
    largest = logits_TV.amax(1).float()
    label_logit = logits_TV.gather(1, local[:, None])[:, 0].float()
    total = (logits_TV - largest[:, None]).exp_().sum(1).float()
    return Statistics(largest, total, label_logit.where(held, 0.0))


def _local(labels_T: Tensor, width: int, first_label: int) -> tuple[Tensor, Tensor]:
    local = labels_T - first_label
    held = (local >= 0) & (local < width)
    return local.where(held, 0), held
