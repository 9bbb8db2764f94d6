"""Planned against measured memory of real training steps."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import build_settings
from megatron_retro.planning.fake_device import CPU
from megatron_retro.planning.plan import make_plan
from megatron_retro.testing.memory_runs import measure_steps

SHAPE: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 24_000,
    "retro_add_retriever": True,
    "retro_layers": (3, 5, 7),
    "seq_length": 512,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "train_iters": 10,
}
WIDE = {"hidden_size": 768}
MORE_TEXT = {"micro_batch_size": 4, "global_batch_size": 4}
FOUR_MICROBATCHES = {"global_batch_size": 8}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "bf16": (1, {"bf16": True}),
    "full recomputation": (1, {"recompute_granularity": "full", "micro_batch_size": 4, "global_batch_size": 4}),
    "data 2": (2, {**FOUR_MICROBATCHES, "use_distributed_optimizer": True}),
    "tensor 2": (2, {**WIDE, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "frozen decoder": (1, {**WIDE, "num_layers": 12, "freeze_decoder": True, **MORE_TEXT}),
    "lora": (1, {**WIDE, "num_layers": 12, "peft_method": "lora", **MORE_TEXT}),
    "lora of cross-attention": (
        1,
        {
            **WIDE,
            "num_layers": 12,
            "peft_method": "lora",
            "peft_parts": ("cross-attention",),
            **MORE_TEXT,
            "lora_targets": ("query", "output"),
        },
    ),
    "pipeline 2": (2, {**WIDE, **FOUR_MICROBATCHES, "pipeline_model_parallel_size": 2}),
}


def planned_and_measured(changes: dict[str, Any], world_size: int) -> list[tuple[float, float]]:
    """One pair for each rank; tensor and data ranks are planned alike."""
    settings = build_settings(ALL_SECTIONS, {**SHAPE, **changes, "plan_gpus_per_node": world_size}, {})
    plan = make_plan(settings, accelerator("H100"), device=CPU)
    measured = measure_steps(settings, world_size)
    per_stage = world_size // plan.layout.pipeline
    return [(plan.memory[rank // per_stage].total, each.peak) for rank, each in enumerate(measured)]


def test_states_and_loss_of_a_large_vocabulary() -> None:
    changes = {"vocab_size": 100_000, "num_layers": 3, "retro_layers": (2,), "seq_length": 128, "micro_batch_size": 1}
    for planned, measured in planned_and_measured({**changes, "global_batch_size": 1}, 1):
        assert measured > 1e9
        assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layout(case: str) -> None:
    world_size, changes = CASES[case]
    for planned, measured in planned_and_measured(changes, world_size):
        assert measured > 1e9
        assert planned == pytest.approx(measured, rel=0.1)
