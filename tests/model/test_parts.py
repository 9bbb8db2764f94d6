"""Pieces of the model: stages, losses, padding of the vocabulary, first values, gradients, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.config.model import RetroConfig
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

TOKENS, NEIGHBORS = random_tokens(2, 14), random_neighbors(2, 3)


def test_stages_in_a_row_are_the_model() -> None:
    """Cut after every layer: each stage keeps its own part only and passes on what the next one needs."""
    whole = random_model(tiny_model(), tiny_retro())
    hidden, encoded = None, None
    for index in range(6):
        stage = Retro(tiny_model(), tiny_retro()).eval()
        reads = index == 1  # the encoder shares the embedding, so its stage keeps one too
        stage.keep_part([index], embedding=index == 0 or reads or index == 5, encoder=reads, head=index == 5)
        names = {name: value for name, value in whole.state_dict().items() if name in stage.state_dict()}
        stage.load_state_dict(names)
        context = stage.prepare(2, 14, TOKENS.device, neighbors=NEIGHBORS)
        hidden = stage.embed(TOKENS, context) if hidden is None else hidden
        hidden, encoded = stage.run_layers(hidden, encoded, context)
        assert (encoded is None) == (index == 0)
    assert hidden is not None
    assert torch.equal(stage.head(hidden), whole(TOKENS, NEIGHBORS))


@pytest.mark.parametrize("untied", [False, True])
def test_losses_are_those_of_the_logits(untied: bool) -> None:
    model = random_model(tiny_model(untie_embeddings_and_output_weights=untied), tiny_retro())
    labels = random_tokens(2, 14, seed=9)
    logits = model(TOKENS, NEIGHBORS)
    expected = -torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    losses = model(TOKENS, NEIGHBORS, labels_BS=labels)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, expected, atol=1e-5)


def test_padding_of_the_vocabulary_takes_no_part() -> None:
    """61 words padded to 64: three rows that never win, never count and get no gradient."""
    model = random_model(tiny_model(), tiny_retro())
    assert model.embedding is not None
    table = model.embedding.word.weight
    assert table.shape[0] == 64
    assert model(TOKENS).shape[-1] == 61
    before = model(TOKENS, labels_BS=TOKENS)
    before.sum().backward()
    assert table.grad is not None and torch.equal(table.grad[61:], torch.zeros(3, 16))
    with torch.no_grad():
        table[61:] = 100.0
    assert torch.equal(model(TOKENS, labels_BS=TOKENS), before)


def test_gradients_are_those_of_finite_differences() -> None:
    model = random_model(tiny_model(num_layers=2, swiglu=True), tiny_retro(retro_layers=(1, 2)), dtype=torch.float64)
    tokens, neighbors = random_tokens(1, 9), random_neighbors(1, 2)

    def value() -> Tensor:
        return model(tokens, neighbors).tanh().mean()

    model.zero_grad()
    value().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = value().item()
            parameter.add_(direction, alpha=-2e-6)
            below = value().item()
            parameter.add_(direction, alpha=1e-6)
        assert math.isclose((above - below) / 2e-6, slope, rel_tol=1e-4, abs_tol=1e-8), name


def test_first_values_depend_on_seed_and_name_alone() -> None:
    model, retro = tiny_model(), tiny_retro()
    first, second, other, deeper = (Retro(model, retro) for _ in range(4))
    initialize(first, model, retro, seed=5)
    deeper.keep_part([3, 1], embedding=False, encoder=True, head=False)
    initialize(deeper, model, retro, seed=5)
    initialize(second, model, retro, seed=5)
    initialize(other, model, retro, seed=6)
    mine = dict(first.named_parameters())
    assert all(torch.equal(value, mine[name]) for name, value in second.named_parameters())
    assert all(torch.equal(value, mine[name]) for name, value in deeper.named_parameters())
    weight = "layers.0.mlp.up.weight"
    assert not torch.equal(mine[weight], dict(other.named_parameters())[weight])
    assert mine[weight].std().item() == pytest.approx(0.02, rel=0.2)
    assert mine["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.2)


def test_dropout_acts_in_training_only() -> None:
    dropping = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
    retro = tiny_retro(retro_encoder_hidden_dropout=0.5, retro_encoder_attention_dropout=0.5)
    model = random_model(tiny_model(**dropping), retro)
    assert torch.equal(model(TOKENS, NEIGHBORS), model(TOKENS, NEIGHBORS))
    model.train()
    assert not torch.equal(model(TOKENS, NEIGHBORS), model(TOKENS, NEIGHBORS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_of_low_precision_stay_near(dtype: torch.dtype) -> None:
    exact = random_model(tiny_model(), tiny_retro(), dtype=torch.float64)
    logits = exact(TOKENS, NEIGHBORS)
    error = (random_model(tiny_model(), tiny_retro(), dtype=dtype)(TOKENS, NEIGHBORS).double() - logits).abs().mean()
    assert error < logits.abs().mean() * (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("model", "retro", "field"),
    [
        ({"vocab_size": None}, {}, "vocab-size"),
        ({"swiglu": True, "squared_relu": True}, {}, "squared-relu"),
        ({"swiglu": True, "geglu": True}, {}, "geglu"),
        ({"qk_norm_scope": "projection"}, {}, "qk-norm-scope"),
        ({"full_attention_layers": (2,)}, {}, "full-attention-layers"),
        ({"sliding_window": 4, "full_attention_layers": (7,)}, {}, "full-attention-layers"),
        ({"rotary_base_local": 50.0}, {}, "rotary-base-local"),
        ({"num_attention_heads": 3}, {}, "num-attention-heads"),
        ({"group_query_attention": True, "num_query_groups": 3}, {}, "num-query-groups"),
        ({}, {"retro_layers": (2, 7)}, "retro-layers"),
        ({}, {"retro_layers": (5, 2)}, "retro-layers"),
        ({}, {"retro_layers": ()}, "retro-layers"),
        ({}, {"retro_encoder_hidden_size": 8}, "retro-encoder-own-embedding"),
        ({}, {"retro_encoder_num_attention_heads": 5}, "retro-encoder-num-attention-heads"),
        ({}, {"retro_gate_target_rate": 1.0}, "retro-gate-target-rate"),
    ],
)
def test_what_cannot_be_built_is_named(model: dict[str, Any], retro: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"--{field}"):
        Retro(tiny_model(**model), tiny_retro(**retro))


def test_neighbors_need_a_mask_of_their_shape() -> None:
    with pytest.raises(ValueError, match="bool mask"):
        random_model(tiny_model(), tiny_retro())(
            random_tokens(1, 8), Neighbors(torch.zeros(1, 2, 2, 8), torch.ones(1, 2, 2, 8))
        )


def test_a_text_beyond_the_learned_positions_is_named() -> None:
    """Whole or in pieces; padding takes no position, so a longer row whose text fits is served."""
    model = random_model(
        tiny_model(position_embedding_type="learned_absolute", max_position_embeddings=8), RetroConfig()
    )
    tokens = torch.arange(1, 10)[None]
    with pytest.raises(DataError, match="model's positions"):
        model(tokens)
    cache = model.new_cache(1, 16)
    model(tokens[:, :6], cache=cache)
    with pytest.raises(DataError, match="position 8"):
        model(tokens[:, 6:], cache=cache)
    real = torch.arange(9)[None] > 1
    assert torch.isfinite(model(tokens, padding_mask_BS=real)).all()
