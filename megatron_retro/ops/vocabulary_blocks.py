"""Softmax over a vocabulary whose logits exist for one block at a time: statistics first, gradients after.

A rank that holds some rows of the vocabulary gets its own statistics here; who cuts the vocabulary reduces them
(`parallel.vocabulary`), so nothing here speaks to other ranks. Products are torch's; what is ours is the pass over the
logits between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.ops.backends import uses_native

BLOCK_BYTES = 1 << 27
_MINIMUM = 16


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
        logits = hidden_TH @ rows_VH[columns].T
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
        logits = hidden_TH @ rows_VH[columns].T
        logits_to_gradients_(logits, labels_T, log_normalizer_T, scale_T, first_label + columns.start)
        if hidden_grad is not None and exact:
            hidden_grad.addmm_(logits, rows_VH[columns])
        elif hidden_grad is not None:
            hidden_grad += logits @ rows_VH[columns]
        if rows_grad is not None:
            torch.mm(logits.T, hidden_TH, out=rows_grad[columns])
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
    gradient = (logits_TV.float() - log_normalizer_T[:, None]).exp_().mul_(scale)
    gradient.scatter_add_(1, local[:, None], torch.where(held[:, None], -scale, 0.0))
    logits_TV.copy_(gradient)


def blocks(length: int, bytes_each: int) -> Iterator[slice]:
    """Cuts `length` lines of `bytes_each` into blocks of about BLOCK_BYTES, of equal size but for the last."""
    step = max(_MINIMUM, BLOCK_BYTES // max(1, bytes_each) // _MINIMUM * _MINIMUM)
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
    logits = logits_TV.float()
    local, held = _local(labels_T, logits.shape[1], first_label)
    largest = logits.amax(1)
    label_logit = logits.gather(1, local[:, None])[:, 0]
    return Statistics(largest, (logits - largest[:, None]).exp_().sum(1), label_logit.where(held, 0.0))


def _local(labels_T: Tensor, width: int, first_label: int) -> tuple[Tensor, Tensor]:
    local = labels_T - first_label
    held = (local >= 0) & (local < width)
    return local.where(held, 0), held
