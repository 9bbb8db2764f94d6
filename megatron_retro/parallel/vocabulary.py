"""Embedding and output over a vocabulary cut by rows. Logits are never gathered for the loss.

Rank i holds rows [i*L, (i+1)*L) of the padded table. Rows at or beyond the true vocabulary take no part anywhere; a
rank may hold such rows only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_retro.ops.linear import linear
from megatron_retro.ops.linear_cross_entropy import gradients, statistics
from megatron_retro.parallel.collectives import all_gather


def partial_embedding(ids: Tensor, rows_LH: Tensor, first_row: int) -> Tensor:
    """[..., H]: this rank's rows for the ids that it holds, zero for others; the sum over ranks is the embedding."""
    local_ids = ids - first_row
    held = (local_ids >= 0) & (local_ids < rows_LH.shape[0])
    vectors = functional.embedding(local_ids.where(held, 0), rows_LH)
    return vectors * held[..., None].to(vectors.dtype)


def true_rows(rows_LH: Tensor, first_row: int, vocab_size: int) -> Tensor:
    """This rank's rows less the padding."""
    return rows_LH[: max(0, min(rows_LH.shape[0], vocab_size - first_row))]


def gathered_logits(hidden_BSH: Tensor, rows_LH: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """[B, S, V] of the true vocabulary on every rank; for evaluation, without gradients."""
    return all_gather(linear(hidden_BSH, rows_LH), -1, group)[..., :vocab_size]


def parallel_losses(
    hidden_BSH: Tensor, rows_LH: Tensor, labels_BS: Tensor, first_row: int, group: dist.ProcessGroup
) -> Tensor:
    """[B, S] float32: -log softmax over all ranks' rows; two small collectives for all tokens together.

    A label below zero marks a position that does not count. `hidden` is gathered (its gradient is this rank's part);
    every rank of the group must call.
    """
    arguments = (hidden_BSH.flatten(0, -2), rows_LH, labels_BS.flatten(), first_row, group)
    losses: Tensor = _ParallelLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses.view(labels_BS.shape)


class _ParallelLosses(torch.autograd.Function):
    """Logits exist for a block of the vocabulary at a time, in the forward and again in the backward."""

    @staticmethod
    def forward(
        context: Any, hidden_TH: Tensor, rows_LH: Tensor, labels_T: Tensor, first_row: int, group: dist.ProcessGroup
    ) -> Tensor:
        own = statistics(hidden_TH, rows_LH, labels_T, first_row)
        largest_T = own.largest_T.clone()
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group=group)
        sums_2T = torch.stack((own.sum_T * (own.largest_T - largest_T).exp(), own.label_logit_T))
        dist.all_reduce(sums_2T, group=group)
        context.first_row = first_row
        context.save_for_backward(hidden_TH, rows_LH, labels_T, largest_T + sums_2T[0].log())
        # in this order large logits cancel before the small logarithm is added
        losses_T = sums_2T[0].log() + (largest_T - sums_2T[1])
        return losses_T.where(labels_T >= 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, rows_LH, labels_T, log_normalizer_T = context.saved_tensors
        scale_T = gradient_T.float().where(labels_T >= 0, 0.0).contiguous()
        wanted = context.needs_input_grad[:2]
        found = gradients(hidden_TH, rows_LH, labels_T, log_normalizer_T, scale_T, context.first_row, wanted=wanted)
        return *found, None, None, None
