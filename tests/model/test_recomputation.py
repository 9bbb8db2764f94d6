"""What is computed again in the backward pass changes no gradient, and is not kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megatron_retro.model.layers
import megatron_retro.model.leaves
from megatron_retro.ops.recomputation import recomputed
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro


def gradients(**changes: Any) -> dict[str, Tensor]:
    model = random_model(tiny_model(**changes), tiny_retro(retro_gate_type="adaptive")).train()
    model(random_tokens(2, 14), random_neighbors(2, 3)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"swiglu": True, "normalization": "RMSNorm"}, {"squared_relu": True}])
def test_gradients_are_the_same_bits(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    again = gradients(**changes)
    for module, name in ((megatron_retro.model.leaves, "offered"), (megatron_retro.model.layers, "recomputed")):
        monkeypatch.setattr(module, name, lambda tensor, compute: nullcontext())
    kept = gradients(**changes)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_recipe_is_kept_instead_of_the_tensor() -> None:
    source = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return source.detach() * 2

    doubled = source * 2
    with recomputed(doubled, compute):
        product = torch.nn.functional.linear(doubled, weight)
    assert not calls
    product.sum().backward()
    assert len(calls) == 1
    assert weight.grad is not None
    assert torch.allclose(weight.grad, (source.detach() * 2).sum(0).expand(4, 3))


def test_a_checkpointed_region_takes_care_of_itself() -> None:
    calls = []

    def region(source: Tensor, weight: Tensor) -> Tensor:
        doubled = source * 2
        with recomputed(doubled, lambda: calls.append(1) or source.detach() * 2):
            return torch.nn.functional.linear(doubled, weight)

    source, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    checkpoint(region, source, weight, use_reentrant=False).sum().backward()
    assert not calls
    assert weight.grad is not None
    assert torch.allclose(weight.grad, (source.detach() * 2).sum(0).expand(4, 3))
