"""Counts of parameters and work: against the built model, the published totals and the published arithmetic."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import build_settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.model.costs import ADDED, EVERYTHING, model_costs
from megatron_retro.model.retro import Retro
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.peft.attach import attach, connect, initialize
from megatron_retro.peft.prompts import virtual_token_ids
from megatron_retro.planning.plan import estimate_build
from megatron_retro.planning.shards import build_shards
from megatron_retro.planning.workload import Layout, Workload, layout_of, workload_of
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

FAMILY = {"swiglu": True, "disable_bias_linear": True, "untie_embeddings_and_output_weights": True}
PUBLISHED = [  # layers, width, heads, feed-forward, GPT and Retro parameters in billions
    (24, 1024, 16, 2688, 0.8232, 0.8775),
    (24, 2048, 32, 5440, 2.254, 2.471),
    (32, 4096, 32, 10880, 8.523, 9.529),
    (40, 6144, 48, 16384, 21.27, 23.98),
    (48, 8192, 64, 21824, 42.83, 48.46),
]
SMALL = ModelConfig(num_layers=8, hidden_size=128, num_attention_heads=8, vocab_size=1000)
MODELS: list[dict[str, Any]] = [
    {},
    FAMILY,
    {"normalization": "RMSNorm", "group_query_attention": True, "num_query_groups": 2},
    {"qk_layernorm": True, "add_qkv_bias": True, "disable_bias_linear": True},
    {"position_embedding_type": "learned_absolute"},
    {"position_embedding_type": "relative"},
    {"kv_channels": 32, "ffn_hidden_size": 300},
]
RETRIEVERS: list[dict[str, Any]] = [
    {},
    {"retro_add_retriever": True},
    {"retro_add_retriever": True, "retro_encoder_hidden_size": 64, "retro_encoder_own_embedding": True},
    {"retro_add_retriever": True, "retro_gate_type": "scalar"},
    {"retro_add_retriever": True, "retro_gate_type": "adaptive", "retro_encoder_layers": 3},
    {"retro_add_retriever": True, "retro_neighbor_positions": "relative"},
    {"retro_add_retriever": True, "retro_gate_type": "heads", "retro_encoder_final_norm": True},
]


def unit_of(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return "head" if parts[0] in ("final_norm", "output") else parts[0]


@pytest.mark.parametrize(("model", "retro"), list(itertools.product(MODELS, RETRIEVERS)))
def test_every_part_holds_what_the_built_model_holds(model: dict[str, Any], retro: dict[str, Any]) -> None:
    config, retriever = replace(SMALL, **model), RetroConfig(**retro)
    with torch.device("meta"):
        built = Retro(config, retriever)
    held: Counter[str] = Counter()
    for name, parameter in built.named_parameters():
        held[unit_of(name)] += parameter.numel()
    costs = model_costs(config, retriever, 64, vocabulary=config.padded_vocab_size())
    assert held == Counter({unit.name: unit.parameters for unit in costs.units if unit.parameters})


def family(row: tuple[Any, ...]) -> ModelConfig:
    layers, width, heads, *_ = row
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        vocab_size=256_000,
        apply_layernorm_1p=True,
        rotary_percent=0.5,
        **FAMILY,
    )


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[-2]}B")
def test_the_ten_published_totals(row: tuple[Any, ...]) -> None:
    model, (feed_forward, gpt, retro) = family(row), row[3:]
    assert model.ffn_width() == feed_forward
    assert model_costs(model, RetroConfig(), 4096).parameters / 1e9 == pytest.approx(gpt, rel=3e-4)
    with_retriever = model_costs(model, RetroConfig(retro_add_retriever=True), 4096)
    assert with_retriever.parameters / 1e9 == pytest.approx(retro, rel=3e-4)


def test_the_published_arithmetic_of_the_48b() -> None:
    """In units of h^2 multiply-adds per token: GPT 631, encoder 106, cross-attentions 141, so +39 %."""
    model, square = family(PUBLISHED[-1]), 8192**2
    gpt = model_costs(model, RetroConfig(), 4096)
    retro = model_costs(model, RetroConfig(retro_add_retriever=True), 4096)
    encoder = retro.named("encoder").multiply_adds
    assert gpt.forward_flops / 2 / square == pytest.approx(631, abs=0.5)
    assert encoder / square == pytest.approx(106, abs=0.5)
    assert (retro.forward_flops / 2 - gpt.forward_flops / 2 - encoder) / square == pytest.approx(141, abs=0.5)
    assert retro.forward_flops / gpt.forward_flops == pytest.approx(1.39, abs=0.005)


def test_behind_a_shut_gate_nothing_works() -> None:
    shut = RetroConfig(retro_add_retriever=True, retro_attention_gate=0.0)
    assert model_costs(SMALL, shut, 64).forward_flops == model_costs(SMALL, RetroConfig(), 64).forward_flops


@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "p-tuning"])
@pytest.mark.parametrize("parts", [("decoder",), ("encoder",), ("cross-attention",), ("decoder", "encoder")])
def test_a_plan_of_tuning_counts_what_torch_counts(
    method: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights cost no gradient of their own, and nothing comes back below what is tuned."""
    if method in ("adapter", "p-tuning") and parts != ("decoder",):
        return  # adapters stand at no cross-attention, virtual tokens stand before the decoder
    monkeypatch.setenv(VARIABLE, "reference")  # torch counts its own operators only
    length, chunk = 128, 16
    model = tiny_model(num_layers=8, hidden_size=32, ffn_hidden_size=128, max_position_embeddings=length)
    retro = tiny_retro(retro_chunk_length=chunk, retro_layers=(3, 6))
    small = {
        "lora_rank": 1,
        "lora_targets": ("attention.query_key_value", "query"),
        "adapter_size": 1,
        "num_virtual_tokens": 2,
        "prompt_encoder_hidden_size": 1,
    }
    values = {**vars(model), **vars(retro), **small, "peft_method": method, "peft_parts": parts, "seq_length": length}
    settings = build_settings(ALL_SECTIONS, {name: value for name, value in values.items() if value is not None}, {})
    built, tokens = random_model(model, retro).train(), random_tokens(1, length)
    attach(built, settings[PeftConfig])
    connect(built)
    initialize(built, 0)
    if method == "p-tuning":
        tokens[:, :2] = torch.tensor(virtual_token_ids(2))
    neighbors = random_neighbors(1, length // chunk, retro.retro_num_neighbors, 2 * chunk)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(tokens, neighbors).sum().backward()
    work = workload_of(settings)
    square = 2 * model.hidden_size * length * length  # torch counts the whole square of a layer's scores
    behind = model.num_layers if "decoder" in parts else model.num_layers - 3
    expected = work.training_flops * length + square * (model.num_layers + 2 * behind)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.06)
    assert 1.3 * work.training_flops < work.costs.training_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_method": "lora", "lora_targets": ("attention.query_key_value", "mlp.up", "mlp.down", "output")},
        {"peft_method": "lora", "peft_parts": ("encoder", "cross-attention"), "lora_targets": ("query", "key_value")},
        {"peft_method": "adapter", "peft_parts": ("decoder", "encoder")},
        {"peft_method": "ia3"},
        {"peft_method": "p-tuning", "prompt_encoder_hidden_size": 8},
        {"freeze_decoder": True},
        {"freeze_decoder": True, "freeze_encoder": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [{}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}], ids=str)
def test_planned_ranks_hold_and_train_what_built_ones_do(changes: dict[str, Any], cut: dict[str, int]) -> None:
    """Building refuses a plan whose parameters, held or trained, are not those of the trainer's own shards."""
    values = {**vars(tiny_model(num_layers=8)), **vars(tiny_retro(retro_layers=(3, 6))), **changes, **cut}
    values |= {"seq_length": 32, "global_batch_size": 4, "plan_gpus_per_node": 4}
    settings = build_settings(ALL_SECTIONS, {name: value for name, value in values.items() if value is not None}, {})
    plan = estimate_build(workload_of(settings), layout_of(settings), accelerator("A100"), prove=False)
    shards = build_shards(settings, plan)
    assert len(shards) == settings[ParallelConfig].pipeline_model_parallel_size
    assert 0 < sum(shard.trained_parameters for shard in shards) < sum(shard.parameters for shard in shards)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_plan_counts_no_gradient_of_what_is_frozen(pipeline: int) -> None:
    """By hand: nothing comes back below the first retrieval layer; above it frozen weights get no gradient."""
    retro = RetroConfig(retro_add_retriever=True, retro_layers=(4, 7))
    work = Workload(SMALL, retro, 128, 8, 64, 4)
    plans = [
        estimate_build(replace(work, trained=trained), Layout(pipeline, pipeline=pipeline), accelerator("A100"))
        for trained in (EVERYTHING, ADDED)
    ]
    whole, frozen = (plan.work.training_flops for plan in plans)
    width, layers = SMALL.hidden_size, SMALL.num_layers
    attention, scores, mlp = 4 * width**2, width * 128, 8 * width**2
    vocabulary = width * plans[0].work.model.padded_vocab_size()
    # Of the layers 1 to 3 all three passes become one; the fourth has its attention before what is trained.
    saved = 3 * 2 * (attention + scores + mlp) + 2 * (attention + scores) + mlp
    saved += (layers - 4) * (attention + mlp) + vocabulary
    assert whole - frozen == pytest.approx(2 * saved)
    for plan in plans:
        counted = sum(rank.multiply_adds + rank.backward_multiply_adds for rank in plan.ranks)
        assert 2 * counted == pytest.approx(plan.work.training_flops)
    assert plans[1].time.compute < plans[0].time.compute
