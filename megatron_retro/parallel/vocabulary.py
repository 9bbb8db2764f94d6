"""Embedding and output over a vocabulary cut by rows. Logits are never gathered for the loss.

Rank i holds rows [i*L, (i+1)*L) of the padded table. Rows at or beyond the true vocabulary take no part anywhere; a
rank may hold such rows only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_retro.parallel.collectives import all_gather

TOKENS_AT_ONCE = 1024


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
    return all_gather(functional.linear(hidden_BSH, rows_LH), -1, group)[..., :vocab_size]


def parallel_losses(
    hidden_BSH: Tensor, rows_LH: Tensor, labels_BS: Tensor, first_row: int, group: dist.ProcessGroup
) -> Tensor:
    """[B, S] float32: -log softmax over all ranks' rows; two small collectives for all tokens together.

    `hidden` is entered (its gradient is this rank's part); every rank of the group must call.
    """
    arguments = (hidden_BSH.flatten(0, -2), rows_LH, labels_BS.flatten(), first_row, group)
    losses: Tensor = _ParallelLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses.view(labels_BS.shape)


class _ParallelLosses(torch.autograd.Function):
    """Logits exist for a block of tokens at a time, in the forward and again in the backward."""

    @staticmethod
    def forward(
        context: Any, hidden_TH: Tensor, rows_LH: Tensor, labels_T: Tensor, first_row: int, group: dist.ProcessGroup
    ) -> Tensor:
        local_labels, held = _local_labels(labels_T, rows_LH.shape[0], first_row)
        top = hidden_TH.new_full(labels_T.shape, float("-inf"), dtype=torch.float32)
        sums = top.new_zeros(2, *labels_T.shape)
        for block in _blocks(labels_T.numel()):
            if rows_LH.shape[0]:
                logits = functional.linear(hidden_TH[block], rows_LH).float()
                top[block] = logits.amax(-1)
                sums[0, block] = (logits - top[block, None]).exp_().sum(-1)
                sums[1, block] = logits.gather(-1, local_labels[block, None])[:, 0] * held[block]
        whole_top = top.clone()
        dist.all_reduce(whole_top, dist.ReduceOp.MAX, group=group)
        sums[0] *= (top - whole_top).exp()
        dist.all_reduce(sums, group=group)
        context.save_for_backward(hidden_TH, rows_LH, local_labels, held, whole_top, sums[0])
        return sums[0].log() + (whole_top - sums[1])

    @staticmethod
    def backward(context: Any, gradient_T: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_TH, rows_LH, local_labels, held, top, sums = context.saved_tensors
        hidden_gradient = torch.zeros_like(hidden_TH)
        rows_gradient = torch.zeros_like(rows_LH, dtype=torch.float32)
        for block in _blocks(len(local_labels)):
            if rows_LH.shape[0]:
                logits = functional.linear(hidden_TH[block], rows_LH).float()
                slope = (logits - top[block, None]).exp_() / sums[block, None]
                slope.scatter_add_(-1, local_labels[block, None], -held[block, None].to(slope.dtype))
                slope = (slope * gradient_T[block, None]).to(rows_LH.dtype)
                hidden_gradient[block] = slope @ rows_LH
                rows_gradient += slope.T @ hidden_TH[block]
        return hidden_gradient, rows_gradient.to(rows_LH.dtype), None, None, None


def _local_labels(labels_T: Tensor, num_rows: int, first_row: int) -> tuple[Tensor, Tensor]:
    local = labels_T - first_row
    held = (local >= 0) & (local < num_rows)
    return local.where(held, 0), held


def _blocks(num_tokens: int) -> list[slice]:
    return [slice(start, start + TOKENS_AT_ONCE) for start in range(0, num_tokens, TOKENS_AT_ONCE)]
