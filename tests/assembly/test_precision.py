"""bf16 layouts are as exact as bf16 is; recomputation keeps less; what a pipeline cannot run is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_retro.assembly.pipeline_runs import _joined
from megatron_retro.errors import DataError
from megatron_retro.testing.layouts import (
    random_batches,
    reference_outcome,
    run_layout,
    tiny_settings,
    worst_differences,
)
from megatron_retro.testing.single_process import one_process


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"data_parallel_sharding": "optimizer"}),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=["data", "pipeline", "tensor"],
)
def test_bf16_errs_no_more_than_twice_as_much_as_one_process(world_size: int, layout: dict[str, Any]) -> None:
    """Both measured against float32; gradients are summed in float32, deferred ones too."""
    exact_settings = tiny_settings(global_batch_size=4)
    batches = random_batches(exact_settings)
    exact = reference_outcome(exact_settings, batches)
    settings = exact_settings.replace(bf16=True)
    alone = worst_differences(exact, [reference_outcome(settings, batches)])
    cut = worst_differences(exact, run_layout(settings.replace(**layout), world_size, batches))
    floor = 0.02  # of a parameter's largest gradient: five roundings of bf16, where one process was lucky
    worse = {name: (error, alone[name]) for name, error in cut.items() if error > max(2 * alone[name], floor)}
    assert worse == {}
    assert max(cut.values()) > 1e-4  # it did compute in bf16


def _saved_bytes(granularity: str) -> int:
    """What autograd keeps of one microbatch."""
    settings = tiny_settings(recompute_granularity=granularity, swiglu=True, global_batch_size=1)
    model = one_process(settings, torch.device("cpu"))
    seen: dict[int, int] = {}
    held = []
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            seen[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model._losses(random_batches(settings)[0])
    return sum(seen.values())


def test_recomputation_keeps_less() -> None:
    everything, full = _saved_bytes("none"), _saved_bytes("full")
    assert full < 0.25 * everything


@pytest.mark.parametrize(("granularity", "calls"), [("none", 1), ("full", 2)])
def test_recomputation_covers_decoder_encoder_and_cross_attention(granularity: str, calls: int) -> None:
    settings = tiny_settings(recompute_granularity=granularity, global_batch_size=1)
    model = one_process(settings, torch.device("cpu"))
    first_of_part = ("attention.query_key_value", "cross_attention.query", "mlp.up")
    counts = {name: 0 for name, _ in model.module.named_modules() if name.endswith(first_of_part)}

    def count(name: str) -> None:
        counts[name] += 1

    for name in counts:
        model.module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name))
    model.train_step(random_batches(settings))
    assert len(counts) == (4 + 2) * 2 + 2 + 1, "attention and MLP of 4 + 2 layers; cross-attention of 2 and of 1"
    assert set(counts.values()) == {calls}, counts


@pytest.mark.parametrize("chance", [0.0, 0.1])
def test_states_of_random_numbers_are_kept_where_something_is_dropped(
    chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, state = [], torch.get_rng_state
    settings = tiny_settings(recompute_granularity="full", global_batch_size=1, hidden_dropout=chance)
    model = one_process(settings, torch.device("cpu"))
    monkeypatch.setattr(torch, "get_rng_state", lambda: kept.append(state()) or kept[-1])
    model.train_step(random_batches(settings))
    assert bool(kept) == (chance > 0.0)


@pytest.mark.parametrize("missing", ["neighbours", "length"])
def test_microbatches_of_a_pipeline_are_alike(missing: str) -> None:
    first, second = random_batches(tiny_settings(global_batch_size=2))
    if missing == "neighbours":
        second = replace(second, neighbors=None)
    else:
        second = replace(second, tokens_BS=second.tokens_BS[:, :-8])
    with pytest.raises(
        DataError, match="neighbor_tokens_BCKR differ" if missing == "neighbours" else "tokens_BS differ"
    ):
        _joined([first, second])
