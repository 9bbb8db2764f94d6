"""Presets have the published parameter counts; counted FLOPs are those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import build_settings
from megatron_retro.config.toml_files import preset_path, read_recipe
from megatron_retro.model.costs import ADDED, EVERYTHING, Trained, model_costs
from megatron_retro.model.retro import Retro, count_parameters
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.optim.groups import part_of
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

# in millions: REFERENCE's rebuilt totals to their digits
FAMILY = {
    "gpt-823m": "823.2",
    "retro-878m": "877.5",
    "gpt-2.25b": "2254",
    "retro-2.5b": "2471",
    "gpt-8.5b": "8523",
    "retro-9.5b": "9529",
    "gpt-22b": "21270",
    "retro-24b": "23980",
    "gpt-43b": "42830",
    "retro-48b": "48460",
}
# in billions, embeddings left out
DEEPMIND = {"retro-172m": 0.172, "retro-425m": 0.425, "retro-1.5b": 1.5, "retro-7.5b": 7.5}
DECODERS = {"retro-172m": 132, "retro-425m": 368, "retro-1.5b": 1309, "retro-7.5b": 6982}


def preset(name: str) -> tuple[ModelConfig, RetroConfig]:
    settings = build_settings(ALL_SECTIONS, read_recipe(preset_path(name), ALL_SECTIONS, ALL_SECTIONS), {})
    model = settings[ModelConfig]
    return replace(model, vocab_size=model.vocab_size or 256), settings[RetroConfig]


def parameters(model: ModelConfig, retro: RetroConfig) -> dict[str, int]:
    """Name -> number, from the model itself on the meta device; the padding of the vocabulary left out."""
    with torch.device("meta"):
        built = Retro(replace(model, make_vocab_size_divisible_by=1), retro)
    return {name: parameter.numel() for name, parameter in built.named_parameters()}


@pytest.mark.parametrize("name", FAMILY)
def test_the_published_family_to_its_digits(name: str) -> None:
    millions = sum(parameters(*preset(name)).values()) / 1e6
    expected = FAMILY[name]
    digits = 4
    assert f"{millions:.{digits}g}" == f"{float(expected):.{digits}g}"


@pytest.mark.parametrize("name", DEEPMIND)
def test_deepminds_sizes_within_the_rounding_of_their_totals(name: str) -> None:
    model, retro = preset(name)
    counted = parameters(model, retro)
    total = sum(count for part, count in counted.items() if "embedding" not in part)
    decoder = sum(count for part, count in parameters(model, RetroConfig()).items() if "embedding" not in part)
    unit = 0.001 if DEEPMIND[name] < 1 else 0.1
    assert abs(total / 1e9 - DEEPMIND[name]) <= unit
    assert abs(decoder / 1e6 / DECODERS[name] - 1) < 0.002


def test_adaptive_retro_is_near_its_card() -> None:
    counted = sum(parameters(*preset("adaptive-retro-1b")).values())
    assert 0 < counted / 1_172_146_179 - 1 < 0.0045


def test_padding_of_the_vocabulary_does_not_count() -> None:
    model, retro = preset("retro-878m")
    odd = replace(model, vocab_size=255_990)
    assert odd.padded_vocab_size() == model.vocab_size
    assert count_parameters(model, retro) - count_parameters(odd, retro) == 2 * 10 * model.hidden_size


@pytest.mark.parametrize("kind", ["gpt", "retro", "own encoder", "one neighbor"])
def test_counted_flops_are_those_that_torch_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")  # torch counts its own operators only
    length, chunk = 256, 8
    model = tiny_model(hidden_size=32, ffn_hidden_size=64, max_position_embeddings=length)
    own = {"retro_encoder_hidden_size": 16, "retro_encoder_own_embedding": True}
    variants = {"gpt": RetroConfig(), "own encoder": tiny_retro(retro_chunk_length=chunk, **own)}
    retro = variants.get(kind, tiny_retro(retro_chunk_length=chunk))
    if kind == "one neighbor":
        retro = tiny_retro(retro_chunk_length=chunk, retro_num_neighbors=1)
    built = random_model(model, retro)
    neighbors = None
    if retro.retro_add_retriever:
        neighbors = random_neighbors(1, length // chunk, retro.retro_num_neighbors, 2 * chunk)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(random_tokens(1, length), neighbors)
    costs = model_costs(model, retro, length)
    other_half = 2 * model.num_layers * model.hidden_size * length * length  # torch counts the whole square
    expected = costs.forward_flops * length + other_half
    assert abs(counter.get_total_flops() / expected - 1) < 0.02


@pytest.mark.parametrize("trained", ["all", "added", "beside"])
def test_training_flops_count_what_freezing_leaves(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's counter; a frozen part passes gradients on, and only behind what is trained."""
    monkeypatch.setenv(VARIABLE, "reference")
    length, chunk = 128, 16
    model = tiny_model(num_layers=8, hidden_size=32, ffn_hidden_size=128, max_position_embeddings=length)
    retro = tiny_retro(retro_chunk_length=chunk, retro_layers=(3, 6))
    built = random_model(model, retro).train()
    for name, parameter in built.named_parameters():
        trains = {"all": True, "added": part_of(name) != "decoder", "beside": name.endswith("norm.weight")}
        parameter.requires_grad_(trains[trained])
    neighbors = random_neighbors(1, length // chunk, retro.retro_num_neighbors, 2 * chunk)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(random_tokens(1, length), neighbors).sum().backward()
    costs = model_costs(model, retro, length)
    parts = {"all": EVERYTHING, "added": ADDED, "beside": Trained(weights=False)}
    flops = costs.training_flops(parts[trained])
    square = 2 * model.hidden_size * length * length  # torch counts the whole square of a layer's scores
    layers_behind = model.num_layers - 3 if trained == "added" else model.num_layers
    expected = flops * length + square * (model.num_layers + 2 * layers_behind)
    assert abs(counter.get_total_flops() / expected - 1) < 0.03
