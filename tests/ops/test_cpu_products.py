"""Products of bfloat16 on a CPU without instructions for it: as exact as PyTorch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_retro.ops import cpu_products
from megatron_retro.ops.attention import AttentionPattern, attention
from megatron_retro.ops.cpu_products import linear_product, product, product_into
from megatron_retro.ops.linear_cross_entropy import linear_cross_entropy
from megatron_retro.ops.precision import comparisons


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_has_instructions", lambda: False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().requires_grad_()


@pytest.mark.usefixtures("without_instructions")
def test_a_linear_layer_errs_no_more_than_torchs() -> None:
    inputs = [random(3, 5, 64), random(48, 64, seed=1), random(48, seed=2)]
    assert all(each.excess <= 0 for each in comparisons(linear_product, functional.linear, inputs))
    assert linear_product(*inputs).dtype == torch.bfloat16


@pytest.mark.usefixtures("without_instructions")
@torch.no_grad()
def test_products_round_once() -> None:
    left, right = random(16, 64), random(64, 24, seed=1)
    exact = (left.double() @ right.double()).bfloat16()
    out = torch.empty_like(exact)
    product_into(left, right, out)
    assert torch.equal(product(left, right), out)
    assert ((out - exact).abs() <= exact.abs() * 2**-7).all()


@pytest.mark.usefixtures("without_instructions")
def test_attention_errs_no_more_than_torchs() -> None:
    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, AttentionPattern(causal=True))

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        turned = (each.transpose(1, 2) for each in (query, key, value))
        return functional.scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)

    inputs = [random(2, 9, 4, 16, seed=seed) for seed in range(3)]
    assert all(each.excess <= 0 for each in comparisons(ours, plain, inputs))


@pytest.mark.usefixtures("without_instructions")
def test_the_loss_errs_no_more_than_the_formula() -> None:
    labels = torch.tensor([[0, 5, -1], [30, 2, 7]])

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none")
        return losses.view(labels.shape)

    inputs = [random(2, 3, 32), random(31, 32, seed=1)]
    ours = comparisons(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), plain, inputs)
    assert all(each.excess <= 0 for each in ours)


def test_other_types_and_processors_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_has_instructions", lambda: True)
    assert not cpu_products.is_slow(random(2, 2))
    monkeypatch.setattr(cpu_products, "_has_instructions", lambda: False)
    assert cpu_products.is_slow(random(2, 2)) and not cpu_products.is_slow(torch.zeros(2, 2))
    assert not cpu_products.is_slow(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
