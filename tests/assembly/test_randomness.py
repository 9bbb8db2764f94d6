"""Dropout draws the same on every data and pipeline layout, and draws what it should on tensor ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.testing.layouts import random_batches, run_layout, tiny_settings, worst_differences
from megatron_retro.testing.processes import run_ranks

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "retro_encoder_hidden_dropout": 0.2, "global_batch_size": 4}


@pytest.mark.parametrize(
    "layout",
    [
        {"data_parallel_sharding": "full", "recompute_granularity": "full"},
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble", "recompute_granularity": "full"},
    ],
    ids=["data", "pipeline"],
)
def test_data_and_pipeline_layouts_drop_the_same(layout: dict[str, Any]) -> None:
    settings = tiny_settings(**DROPOUT)
    batches = random_batches(settings)
    reference = run_layout(settings, 1, batches)[0]
    without = run_layout(settings.replace(hidden_dropout=0.0), 1, batches)[0]
    assert abs(reference.loss - without.loss) > 1e-4
    worst = worst_differences(reference, run_layout(settings.replace(**layout), 2, batches))
    assert {name: error for name, error in worst.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_stay_together_where_they_must(sequence_parallel: bool) -> None:
    """The loss is the same on both ranks, the same again at the same step, and another one at the next."""
    settings = tiny_settings(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, **DROPOUT)
    batches = random_batches(settings)

    def losses() -> tuple[list[float], list[torch.Tensor]]:
        mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
        model = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))
        seen: list[torch.Tensor] = []
        for layer in model.stages[0].model.layers.values():
            layer.register_forward_hook(lambda module, arguments, output: seen.append(output[0].detach()))
        return [model.train_step(batches, step=step).loss for step in (0, 0, 1)], seen

    (first, first_states), (second, second_states) = run_ranks(losses, 2)
    assert first == second
    assert first[0] == first[1] != first[2]
    same = [torch.equal(left, right) for left, right in zip(first_states, second_states, strict=True)]
    assert not any(same) if sequence_parallel else all(same)


def test_tensor_ranks_draw_different_numbers_for_their_heads() -> None:
    settings = tiny_settings(tensor_model_parallel_size=2, **DROPOUT)
    batches = random_batches(settings)

    def draws() -> list[float]:
        mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
        model = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))
        seen: list[float] = []
        inner = model.stages[0].model.layers["0"].get_submodule("attention.query_key_value")
        inner.register_forward_hook(lambda *_: seen.append(torch.initial_seed()))
        model.train_step(batches)
        return seen

    first, second = run_ranks(draws, 2)
    assert all(left != right for left, right in zip(first, second, strict=True))
