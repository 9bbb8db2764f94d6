"""Counts of parameters and work: against the built model, the published totals and the published arithmetic."""

from __future__ import annotations

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
from megatron_retro.model.retro import count_parameters
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.peft.attach import attach, connect, initialize
from megatron_retro.peft.prompts import virtual_token_ids
from megatron_retro.planning.plan import PlanIsWrong, build_shards, make_plan
from megatron_retro.planning.workload import workload_of
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro
from tests.planning.recipes import recipe

FAMILY = {"swiglu": True, "disable_bias_linear": True, "untie_embeddings_and_output_weights": True}
PUBLISHED = [  # layers, width, heads, feed-forward, GPT and Retro parameters in billions
    (24, 1024, 16, 2688, 0.8232, 0.8775),
    (24, 2048, 32, 5440, 2.254, 2.471),
    (32, 4096, 32, 10880, 8.523, 9.529),
    (40, 6144, 48, 16384, 21.27, 23.98),
    (48, 8192, 64, 21824, 42.83, 48.46),
]
SMALL = ModelConfig(num_layers=8, hidden_size=128, num_attention_heads=8, vocab_size=1000)


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
    assert count_parameters(model, RetroConfig()) / 1e9 == pytest.approx(gpt, rel=3e-4)
    assert count_parameters(model, RetroConfig(retro_add_retriever=True)) / 1e9 == pytest.approx(retro, rel=3e-4)


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
    plan = make_plan(settings, accelerator("A100"))
    assert build_shards(plan) == settings[ParallelConfig].pipeline_model_parallel_size
    totals = [rank.total for rank in plan.ranks]
    assert 0 < sum(each.trained_parameters for each in totals) < sum(each.parameters for each in totals)


def test_a_plan_that_is_not_what_the_trainer_builds_is_a_fault() -> None:
    plan = make_plan(recipe(plan_gpus_per_node=1), accelerator("A100"))
    (rank,) = plan.ranks
    wrong = replace(plan, ranks=(replace(rank, total=replace(rank.total, parameters=rank.total.parameters + 1)),))
    with pytest.raises(PlanIsWrong, match="pipeline rank 0 holds"):
        build_shards(wrong)


def test_counted_operations_have_no_gradient_of_what_is_frozen() -> None:
    """By hand: nothing comes back below the first retrieval layer; above it frozen weights get no gradient."""
    costs = model_costs(SMALL, RetroConfig(retro_add_retriever=True, retro_layers=(4, 7)), 128)
    width, layers = SMALL.hidden_size, SMALL.num_layers
    attention, scores, mlp = 4 * width**2, width * 128, 8 * width**2
    # Of the layers 1 to 3 all three passes become one; the fourth has its attention before what is trained.
    saved = 3 * 2 * (attention + scores + mlp) + 2 * (attention + scores) + mlp
    saved += (layers - 4) * (attention + mlp) + width * 1000
    assert costs.training_flops(EVERYTHING) - costs.training_flops(ADDED) == pytest.approx(2 * saved)


def test_a_window_is_counted_as_far_as_it_reaches() -> None:
    """Half of the square less half of what lies before the windows; a window that sees everything changes nothing."""
    window, length = 32, 128
    plain, wide, narrow = (
        model_costs(replace(SMALL, sliding_window=size), RetroConfig(), length).forward_flops / 2
        for size in (None, length, window)
    )
    unseen = (length - window) ** 2 / 2 / length
    assert plain == wide
    assert plain - narrow == pytest.approx(SMALL.num_layers * 2 * SMALL.hidden_size * unseen)
    some = replace(SMALL, sliding_window=window, full_attention_layers=(1, 2))
    partly = model_costs(some, RetroConfig(), length).forward_flops / 2
    assert plain - partly == pytest.approx((SMALL.num_layers - 2) * 2 * SMALL.hidden_size * unseen)


@pytest.mark.parametrize(
    "changes",
    [{}, {"retro_add_retriever": False, "retro_layers": None}, {"retro_attention_gate": 0.0}, {"freeze_decoder": True}],
    ids=str,
)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_what_a_plan_executes_is_what_is_counted(changes: dict[str, Any], pipeline: int) -> None:
    """Two independent counts: operations of the traced model, the arithmetic of the paper. A little is executed beside:
    the loss's logits and a kernel's scores once more; behind a border a frozen decoder passes gradients on."""
    settings = recipe(
        **{"seq_length": 256, "pipeline_model_parallel_size": pipeline, "global_batch_size": 8, **changes}
    )
    plan = make_plan(settings.replace(plan_gpus_per_node=pipeline), accelerator("A100"))
    executed = sum(rank.total.forward_flops + rank.total.backward_flops for rank in plan.ranks) / 256
    assert plan.work.training_flops * 0.999 < executed < plan.work.training_flops * 1.3
    forward = sum(rank.total.forward_flops for rank in plan.ranks) / 256
    assert forward == pytest.approx(plan.work.costs.forward_flops, rel=0.01)


def test_a_frozen_decoder_is_planned_to_take_less() -> None:
    whole, frozen = (
        make_plan(recipe(plan_gpus_per_node=1, freeze_decoder=freeze), accelerator("A100")) for freeze in (False, True)
    )
    assert frozen.time.compute < whole.time.compute
    assert frozen.ranks[0].stages[0].saved_bytes < whole.ranks[0].stages[0].saved_bytes
    assert frozen.memory[0].gradients < whole.memory[0].gradients
