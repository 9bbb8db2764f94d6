"""The formulas of docs/parallelism.md are what the cut model sends, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.planning.plan import Plan, make_plan
from megatron_retro.planning.workload import workload_of
from tests.planning.recipes import recipe

RETRO: dict[str, Any] = {"retro_layers": (2, 4), "retro_chunk_length": 16}
GPT: dict[str, Any] = {"retro_add_retriever": False, "retro_layers": None}


def small(**changes: Any) -> Settings:
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "swiglu": False, "disable_bias_linear": False}
    return recipe(**{**shape, "vocab_size": 100, "seq_length": 128, **RETRO, "global_batch_size": 8, **changes})


def plan(settings: Settings) -> Plan:
    return make_plan(settings, accelerator("H100"))


def hidden_and_encoded(settings: Settings, micro_batch: int, value_bytes: int) -> tuple[float, float, int]:
    """X and E of the document, in bytes, and T."""
    model, retro, tokens = settings[ModelConfig], settings[RetroConfig], micro_batch * workload_of(settings).seq_length
    neighbors = tokens // retro.retro_chunk_length * retro.retro_num_neighbors * retro.retrieved_length()
    encoded = neighbors * retro.encoder_model(model).hidden_size * value_bytes if retro.reads_neighbors() else 0
    return tokens * model.hidden_size * value_bytes, encoded, tokens


def tensor_formula(settings: Settings, size: int, micro_batch: int, value_bytes: int) -> float:
    """The document's: r (X (s (2L + R) + 4 + 2) + E (s (2e + 1) + 4) + 24 T), s = 4, or 5 with sequence parallelism."""
    model, retro = settings[ModelConfig], settings[RetroConfig]
    hidden, encoded, tokens = hidden_and_encoded(settings, micro_batch, value_bytes)
    reading = len(retro.retrieval_layers(model.num_layers)) if encoded else 0
    each = 5 if settings[ParallelConfig].sequence_parallel else 4
    sent = hidden * (each * (2 * model.num_layers + reading) + 4 + (2 if encoded else 0))
    sent += encoded * (each * (2 * retro.retro_encoder_layers + 1) + 4)
    return (size - 1) / size * (sent + 24 * tokens)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("size", "micro_batch", "changes"),
    [
        (2, 1, {"bf16": False}),
        (8, 2, {}),
        (4, 1, GPT),
        (4, 1, {"retro_encoder_layers": 3}),
        (4, 1, {"retro_attention_gate": 0.0}),
    ],
)
def test_tensor_axis(size: int, micro_batch: int, changes: dict[str, Any], sequence_parallel: bool) -> None:
    cut = {"tensor_model_parallel_size": size, "sequence_parallel": sequence_parallel, "plan_gpus_per_node": size}
    settings = small(**cut, micro_batch_size=micro_batch, **changes)
    (rank,) = plan(settings).ranks
    formula = tensor_formula(settings, size, micro_batch, 4 if "bf16" in changes else 2)
    assert rank.total.sent_bytes == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_later_stage_that_reads_neighbours_gathers_them_once_more(sequence_parallel: bool) -> None:
    cut = {"tensor_model_parallel_size": 4, "sequence_parallel": sequence_parallel, "plan_gpus_per_node": 8}
    settings = small(**cut, pipeline_model_parallel_size=2, pipeline_layout="2,2")
    ranks = plan(settings).ranks
    _, encoded, _ = hidden_and_encoded(settings, 1, 2)
    formula = tensor_formula(settings, 4, 1, 2) + 3 / 4 * 2 * encoded
    assert sum(rank.total.sent_bytes for rank in ranks) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, GPT, {"group_query_attention": True, "num_query_groups": 4}])
@pytest.mark.parametrize("size", [2, 4])
def test_context_axis(size: int, changes: dict[str, Any]) -> None:
    """r (2 L A + 4 C M), and on the tensor axis a rank's part of what a whole sequence would send."""
    cut = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "plan_gpus_per_node": 2 * size}
    settings = small(**cut, context_parallel_size=size, micro_batch_size=2, **changes)
    found = plan(settings)
    model, retro, tokens = settings[ModelConfig], settings[RetroConfig], 2 * workload_of(settings).seq_length
    keys_values = 2 * tokens * model.num_key_value_heads() // 2 * model.head_size() * 2
    neighbors = 2 * retro.retro_num_neighbors * retro.retrieved_length() if retro.reads_neighbors() else 0
    formula = (size - 1) / size * (2 * model.num_layers * keys_values + 4 * size * neighbors * model.hidden_size * 2)
    assert found.ranks[0].total.context_bytes == pytest.approx(formula, rel=1e-12)
    assert found.volume[0].context == pytest.approx(formula * 4, rel=1e-12), "8 samples are 4 microbatches of one share"
    alone = plan(small(**{**cut, "plan_gpus_per_node": 2}, micro_batch_size=2, **changes))
    assert found.ranks[0].total.sent_bytes * size == pytest.approx(alone.ranks[0].total.sent_bytes, rel=1e-12)
    assert alone.ranks[0].total.context_bytes == alone.volume[0].context == 0
    if changes == GPT:  # a Retro makes keys and values of the chunk before each span twice
        shared, whole = found.ranks[0].total, alone.ranks[0].total
        assert shared.forward_flops * size == pytest.approx(whole.forward_flops, rel=1e-12)
        assert shared.backward_flops * size == pytest.approx(whole.backward_flops, rel=1e-12)


def test_borders() -> None:
    """Per border and microbatch 2 (X + E) / (tensor ranks, if sequence parallel), both ranks' sending together."""
    cut = {"tensor_model_parallel_size": 4, "plan_gpus_per_node": 8, "pipeline_model_parallel_size": 2}
    for sequence_parallel, shared in ((False, 1), (True, 4)):
        settings = small(**cut, sequence_parallel=sequence_parallel, pipeline_layout="2,2")
        found = plan(settings)
        hidden, encoded, _ = hidden_and_encoded(settings, 1, 2)
        assert [rank.border_bytes for rank in found.ranks] == [(hidden + encoded) / shared] * 2
        assert [each.pipeline for each in found.volume] == [8 * (hidden + encoded) / shared] * 2
    behind = small(**cut, retro_layers=(1, 2), pipeline_layout="2,2")  # nobody reads neighbours behind the border
    hidden, _, _ = hidden_and_encoded(behind, 1, 2)
    assert [rank.border_bytes for rank in plan(behind).ranks] == [hidden] * 2


@pytest.mark.parametrize(
    ("sharding", "per_parameter"), [("none", 8), ("optimizer", 4 + 2), ("gradients", 4 * 3 + 2), ("full", (4 + 4) * 3)]
)
def test_data_axis(sharding: str, per_parameter: int) -> None:
    """Of 4 replicas with 3 microbatches each."""
    settings = small(**GPT, data_parallel_sharding=sharding, plan_gpus_per_node=4, global_batch_size=12)
    found = plan(settings)
    assert found.volume[0].data == pytest.approx(3 / 4 * found.ranks[0].total.parameters * per_parameter)


def test_a_pipeline_reduces_gradients_once_a_step() -> None:
    cut = {"pipeline_model_parallel_size": 2, "data_parallel_sharding": "gradients", "plan_gpus_per_node": 4}
    found = plan(small(**GPT, **cut))
    for rank, volume in zip(found.ranks, found.volume, strict=True):
        assert volume.data == pytest.approx(1 / 2 * rank.total.parameters * (4 + 2))
