"""Every way of parameter-efficient tuning gives the one-process numbers on every kind of layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.config.training import LORA_TARGETS, PARTS
from megatron_retro.microbatch import Microbatch
from megatron_retro.peft.attach import is_added
from megatron_retro.peft.prompts import virtual_token_ids
from megatron_retro.testing.layouts import (
    random_batches,
    reference_outcome,
    run_layout,
    tiny_settings,
    worst_differences,
)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_method": "lora", "peft_parts": PARTS, "lora_targets": LORA_TARGETS, "lora_rank": 4},
    "series adapter": {"peft_method": "adapter", "peft_parts": PARTS, "adapter_size": 6},
    "parallel adapter": {"peft_method": "adapter", "peft_parts": PARTS, "adapter_size": 6, "adapter_parallel": True},
    "ia3": {"peft_method": "ia3", "peft_parts": PARTS},
    "p-tuning": {"peft_method": "p-tuning", "num_virtual_tokens": 3, "prompt_encoder_hidden_size": 12},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {"data_parallel_sharding": "full"},
}


def with_virtual_tokens(batch: Microbatch[Tensor]) -> Microbatch[Tensor]:
    tokens = batch.tokens_BS.clone()
    tokens[:, 2:5] = torch.tensor(virtual_token_ids(3))
    return dataclasses.replace(batch, tokens_BS=tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_tuning_equals_one_process(method: str, layout: str) -> None:
    assert_equal_to_one_process(method, LAYOUTS[layout])


@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=pytest.mark.full) for name in [*METHODS][1:])])
def test_tuning_equals_one_process_where_sequences_are_shared(method: str) -> None:
    assert_equal_to_one_process(method, {"context_parallel_size": 2})


def assert_equal_to_one_process(method: str, layout: dict[str, Any]) -> None:
    settings = tiny_settings(swiglu=True, global_batch_size=4, **METHODS[method], **layout)
    batches = random_batches(settings)
    if method == "p-tuning":
        batches = [with_virtual_tokens(batch) for batch in batches]
    reference = reference_outcome(settings, batches, steps=3)
    assert set(reference.gradients) == {name for name in reference.parameters if is_added(name)}
    found = worst_differences(reference, run_layout(settings, 2, batches, steps=3))
    assert max(found.values()) < 2e-4, {name: error for name, error in found.items() if error >= 2e-4}


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize("part", ["encoder", "cross-attention"])
def test_a_stage_may_hold_nothing_of_what_is_tuned(part: str, schedule: str) -> None:
    """Retrieval in the first half of the layers, or in the second: the other stage only passes on."""
    layers = {"encoder": (1, 2), "cross-attention": (3, 4)}[part]
    method = {"peft_method": "ia3", "peft_parts": (part,)}
    settings = tiny_settings(retro_layers=layers, global_batch_size=4, **method)
    batches = random_batches(settings)
    reference = reference_outcome(settings, batches, steps=2)
    cut = settings.replace(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
    found = worst_differences(reference, run_layout(cut, 2, batches, steps=2))
    assert max(found.values()) < 2e-4, {name: error for name, error in found.items() if error >= 2e-4}


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("tensor", "full"), ("sequence", "full"), ("pipeline", "none"), ("pipeline", "full"), ("data", "none")],
)
def test_dropout_of_lora_drops_the_same_on_every_layout(layout: str, recompute: str) -> None:
    dropping = {**METHODS["lora"], "lora_dropout": 0.3}
    settings = tiny_settings(swiglu=True, global_batch_size=4, **dropping)
    batches = random_batches(settings)
    reference = run_layout(settings, 1, batches, steps=3)[0]
    assert abs(reference.loss - run_layout(settings.replace(lora_dropout=0.0), 1, batches, steps=3)[0].loss) > 1e-6
    cut = settings.replace(**LAYOUTS[layout], recompute_granularity=recompute)
    found = worst_differences(reference, run_layout(cut, 2, batches, steps=3))
    assert max(found.values()) < 2e-4, {name: error for name, error in found.items() if error >= 2e-4}
