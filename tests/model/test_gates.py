"""Gates: identity at the start, scaling by what they say, a budget that cannot die silently."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_retro.model.gates import AdaptiveGate, attach_auxiliary_loss, rate_divergence
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

TOKENS, NEIGHBORS = random_tokens(2, 14), random_neighbors(2, 3)


def gates_of(model: Retro) -> list[AdaptiveGate]:
    return [part for part in model.modules() if isinstance(part, AdaptiveGate)]


@pytest.mark.parametrize(("kind", "parameter"), [("scalar", "value"), ("heads", "heads")])
def test_a_fresh_learned_gate_is_the_gpt(kind: str, parameter: str) -> None:
    model, retro = tiny_model(), tiny_retro(retro_gate_type=kind)
    built = Retro(model, retro)
    initialize(built, model, retro, seed=3)
    assert torch.equal(built(TOKENS, NEIGHBORS), built(TOKENS))
    built(TOKENS, NEIGHBORS).square().sum().backward()
    gate = built.get_parameter(f"layers.1.cross_attention.gate.{parameter}")
    assert gate.grad is not None and (gate.grad != 0).all(), "it can open"


def test_zero_output_projections_are_the_gpt() -> None:
    model, retro = tiny_model(), tiny_retro(retro_zero_init_output=True)
    built = Retro(model, retro)
    initialize(built, model, retro, seed=3)
    assert torch.equal(built(TOKENS, NEIGHBORS), built(TOKENS))
    published = tiny_retro()
    initialize(built, model, published, seed=3)
    assert not torch.equal(built(TOKENS, NEIGHBORS), built(TOKENS))


@pytest.mark.parametrize("gate", [1.0, 0.25])
def test_a_fixed_gate_scales_what_is_added(gate: float) -> None:
    """In the last layer alone, so that what is added reaches the hidden state unchanged."""
    added = {}
    for value in (gate, 1.0):
        model = random_model(tiny_model(), tiny_retro(retro_layers=(6,), retro_attention_gate=value))
        layer = model.layers["5"].cross_attention
        layer.register_forward_hook(lambda module, arguments, output, value=value: added.update({value: output}))
        model(TOKENS, NEIGHBORS)
    assert torch.allclose(added[gate], gate * added[1.0], atol=1e-6)
    assert added[1.0].abs().max() > 0


def test_a_shut_or_open_adaptive_gate() -> None:
    model = random_model(tiny_model(), tiny_retro(retro_gate_type="adaptive"))
    fixed = random_model(tiny_model(), tiny_retro())
    fixed.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for gate in gates_of(model):
            gate.weight.zero_()
            gate.bias.fill_(-200.0)
        assert torch.equal(model(TOKENS, NEIGHBORS), model(TOKENS))
        for gate in gates_of(model):
            gate.bias.fill_(200.0)
        assert torch.allclose(model(TOKENS, NEIGHBORS), fixed(TOKENS, NEIGHBORS), atol=1e-6)


def test_rates_are_reported_per_chunk() -> None:
    model = random_model(tiny_model(), tiny_retro(retro_gate_type="adaptive"))
    model(TOKENS, NEIGHBORS)
    for gate in gates_of(model):
        assert gate.last_rates is not None and gate.last_rates.shape == (2, 3)
        assert ((gate.last_rates > 0) & (gate.last_rates < 1)).all()


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_the_budget_is_the_divergence_of_the_mean_rate(target: float) -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    mean = torch.sigmoid(scores).mean().item()
    expected = target * math.log(target / mean) + (1 - target) * math.log((1 - target) / (1 - mean))
    assert rate_divergence(scores, target).item() == pytest.approx(expected, rel=1e-4)
    at_target = torch.full((4,), math.log(target / (1 - target)))
    assert rate_divergence(at_target, target).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("score", [-10.0, -40.0, -200.0])
def test_a_collapsed_gate_still_feels_its_budget(score: float) -> None:
    """The card's gate stood at 1.7e-6; a squared or linear charge has no slope there, ours has the target's."""
    scores = torch.full((6,), score, requires_grad=True)
    rate_divergence(scores, 0.5).backward()
    assert scores.grad is not None
    assert scores.grad.sum().item() == pytest.approx(-0.5, rel=1e-3)


def test_the_attached_loss_adds_its_gradient_and_nothing_else() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    charged: list[torch.Tensor] = []
    passed = attach_auxiliary_loss(value * 3, value.square().sum(), charged.append)
    assert torch.equal(passed, value * 3) and not charged
    passed.sum().backward()
    assert torch.equal(value.grad, torch.tensor([3.0 + 2.0, 3.0 + 4.0]))
    assert [float(loss) for loss in charged] == [5.0]


def test_only_training_charges_the_budget() -> None:
    model = random_model(tiny_model(), tiny_retro(retro_gate_type="adaptive", retro_gate_budget_weight=10.0))
    gradients = {}
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        model(TOKENS, NEIGHBORS).square().mean().backward()
        gradients[training] = gates_of(model)[0].bias.grad.clone()
    assert not torch.allclose(gradients[True], gradients[False])
