"""Embedding and loss over a cut vocabulary equal torch's over the whole one, for any true size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_retro.parallel.tensor_parallel import gathered_logits, parallel_losses, partial_embedding, true_rows
from megatron_retro.testing.processes import run_ranks

HIDDEN = 6


def _inputs(vocab_size: int, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(2, 5, HIDDEN, generator=draw) * 3
    table = torch.randn(padded, HIDDEN, generator=draw) * 3
    labels = torch.randint(vocab_size, (2, 5), generator=draw)
    labels[0, 1] = -1
    weights = torch.rand(2, 5, generator=draw)
    return hidden, table, labels, weights


@pytest.mark.parametrize(("vocab_size", "padded", "ranks"), [(9, 12, 2), (12, 12, 4), (3, 12, 4), (7, 8, 2)])
def test_losses_and_gradients(vocab_size: int, padded: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With (3, 12, 4) three ranks hold padding only; small blocks make several of them."""
    monkeypatch.setattr("megatron_retro.ops.linear_cross_entropy.BLOCK_BYTES", 40)
    monkeypatch.setattr("megatron_retro.ops.linear_cross_entropy._FEWEST_LINES", 1)
    hidden, table, labels, weights = _inputs(vocab_size, padded)
    hidden.requires_grad_()
    rows = table[:vocab_size].clone().requires_grad_()
    expected = functional.cross_entropy(
        (hidden @ rows.T).flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 5)
    (expected * weights).sum().backward()

    def losses() -> tuple[torch.Tensor, ...]:
        length = padded // ranks
        first_row = dist.get_rank() * length
        own_hidden = hidden.detach().clone().requires_grad_()
        own = table[first_row : first_row + length].clone().requires_grad_()
        group = dist.group.WORLD
        assert group is not None
        got = parallel_losses(own_hidden, true_rows(own, first_row, vocab_size), labels, first_row, group)
        (got * weights).sum().backward()
        assert own_hidden.grad is not None
        logits = gathered_logits(own_hidden.detach(), own.detach(), vocab_size, group)
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        return got.detach(), own_hidden.grad, gradient, logits

    results = run_ranks(losses, ranks)
    for got, _, _, logits in results:
        torch.testing.assert_close(got, expected.detach())
        torch.testing.assert_close(logits, (hidden @ rows.T).detach())
    assert hidden.grad is not None and rows.grad is not None
    torch.testing.assert_close(sum(gradient for _, gradient, _, _ in results), hidden.grad)
    table_gradient = torch.cat([gradient for _, _, gradient, _ in results])
    torch.testing.assert_close(table_gradient[:vocab_size], rows.grad)
    assert table_gradient[vocab_size:].abs().max() == 0 if padded > vocab_size else True


def test_extreme_logits_stay_finite() -> None:
    def losses() -> torch.Tensor:
        hidden = torch.full((1, 2, 1), 1000.0)
        rows = torch.tensor([[1.0], [-1.0]]) * (1 - 2 * dist.get_rank())
        group = dist.group.WORLD
        assert group is not None
        return parallel_losses(hidden, rows, torch.tensor([[0, 3]]), 2 * dist.get_rank(), group)

    for got in run_ranks(losses, 2):
        torch.testing.assert_close(got, torch.full((1, 2), 0.6931472))


def test_embedding_parts_sum_to_the_embedding() -> None:
    table = torch.randn(8, HIDDEN)
    ids = torch.tensor([[0, 7, 3, 4]])
    parts = [partial_embedding(ids, table[first : first + 2], first) for first in range(0, 8, 2)]
    assert torch.equal(torch.stack(parts).sum(0), table[ids])
