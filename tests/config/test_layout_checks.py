"""Impossible layouts are refused all at once, each with what would be legal; possible ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_retro.config.parallel import parse_layout
from megatron_retro.config.sections import RULES, require_legal, violations
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.testing.layout_grid import context_meshes, meshes
from megatron_retro.testing.layouts import tiny_settings

WRONG: list[tuple[str, int, dict[str, Any], str]] = [
    ("world_size_fits", 6, {"tensor_model_parallel_size": 4}, "tensor_model_parallel_size"),
    ("heads_divide", 3, {"tensor_model_parallel_size": 3, "ffn_hidden_size": 66}, "num_attention_heads"),
    (
        "heads_divide",
        4,
        {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 2},
        "num_query_groups",
    ),
    ("widths_divide", 4, {"tensor_model_parallel_size": 4, "ffn_hidden_size": 66}, "ffn_hidden_size"),
    (
        "encoder_divides",
        4,
        {"tensor_model_parallel_size": 4, "retro_encoder_num_attention_heads": 2},
        "retro_encoder_num_attention_heads",
    ),
    (  # its MLP is four times as wide: 132, which nobody wrote down
        "encoder_divides",
        8,
        {
            "tensor_model_parallel_size": 8,
            "num_attention_heads": 8,
            "vocab_size": 1024,
            "retro_encoder_hidden_size": 33,
            "retro_encoder_kv_channels": 8,
            "retro_encoder_own_embedding": True,
        },
        "retro_encoder_ffn_hidden_size",
    ),
    (
        "sequence_divides",
        4,
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "seq_length": 30},
        "seq_length",
    ),
    (
        "sequence_divides",
        4,
        {
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "retro_chunk_length": 5,
            "retro_num_retrieved_chunks": 1,
        },
        "retro_chunk_length",
    ),
    ("stages_have_layers", 8, {"pipeline_model_parallel_size": 8}, "pipeline_model_parallel_size"),
    (
        "stages_have_layers",
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 3,
            "pipeline_schedule": "interleaved",
        },
        "num_layers_per_virtual_pipeline_stage",
    ),
    (
        "schedule_has_its_stages",
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved"},
        "pipeline_schedule",
    ),
    (
        "schedule_has_its_stages",
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        "pipeline_schedule",
    ),
    (
        "schedule_has_its_stages",
        1,
        {"num_layers_per_virtual_pipeline_stage": 1},
        "num_layers_per_virtual_pipeline_stage",
    ),
    ("layout_fits", 2, {"pipeline_model_parallel_size": 2, "pipeline_layout": "1,2"}, "pipeline_layout"),
    ("layout_fits", 2, {"pipeline_model_parallel_size": 2, "pipeline_layout": "4,x"}, "pipeline_layout"),
    ("layout_fits", 2, {"pipeline_model_parallel_size": 2, "pipeline_layout": "4,0"}, "pipeline_layout"),
    ("batch_divides", 3, {}, "global_batch_size"),
    ("batch_divides", 2, {"rampup_batch_size": (1, 2, 100)}, "rampup_batch_size"),
    (
        "microbatches_fill_the_pipeline",
        4,
        {"pipeline_model_parallel_size": 4, "pipeline_schedule": "zero-bubble", "global_batch_size": 9},
        "global_batch_size",
    ),
    ("sequences_are_shared_evenly", 2, {"context_parallel_size": 2, "seq_length": 40}, "seq_length"),
    (
        "sequences_are_shared_evenly",
        2,
        {"context_parallel_size": 2, "retro_add_retriever": False, "seq_length": 34},
        "seq_length",
    ),
    (
        "sequences_are_shared_evenly",
        12,
        {
            "context_parallel_size": 4,
            "tensor_model_parallel_size": 3,
            "sequence_parallel": True,
            "seq_length": 64,
        },
        "seq_length",
    ),
    *(
        ("model_can_share_sequences", 2, {"context_parallel_size": 2, **changes}, next(iter(changes)))
        for changes in (
            {"position_embedding_type": "relative"},
            {"retro_gate_type": "adaptive"},
            {"retro_core_checkpoint": True},
            {"retro_legacy_checkpoint": True},
        )
    ),
    ("schedule_fits", 1, {"train_iters": 3, "train_samples": 24}, "train_iters"),
    ("model_is_possible", 1, {"retro_add_retriever": True, "retro_layers": (0,)}, "retro_layers"),
    (
        "validation_has_neighbors",
        1,
        {"retro_add_retriever": True, "neighbor_path": ("table",), "valid_data_path": ("corpus",)},
        "valid_neighbor_path",
    ),
    ("one_thing_is_frozen", 1, {"retro_add_retriever": False, "freeze_decoder": True}, "freeze_decoder"),
    ("one_thing_is_frozen", 1, {"retro_add_retriever": False, "freeze_encoder": True}, "freeze_encoder"),
    (
        "degraded_shares_fit",
        1,
        {"neighbor_random_share": 0.7, "neighbor_absent_share": 0.4},
        "neighbor_random_share",
    ),
    (
        "fp8_gradients_are_not_deferred",
        2,
        {"fp8_format": "hybrid", "pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"},
        "pipeline_schedule",
    ),
    *(
        ("layers_can_be_compiled", 2, {"compile": True, **changes}, next(reversed(changes)))
        for changes in (
            {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"},
            {"hidden_dropout": 0.1},
            {"retro_encoder_attention_dropout": 0.1},
            {"peft_method": "lora", "lora_dropout": 0.1},
            {"retro_gate_type": "adaptive"},
        )
    ),
    (
        "positions_stay_with_their_readers",
        2,
        {
            "pipeline_model_parallel_size": 2,
            "retro_core_checkpoint": True,
            "position_embedding_type": "learned_absolute",
        },
        "pipeline_model_parallel_size",
    ),
]


@pytest.mark.parametrize(("rule", "world_size", "changes", "field"), WRONG)
def test_each_rule_names_its_field_and_what_would_be_legal(
    rule: str, world_size: int, changes: dict[str, Any], field: str
) -> None:
    (only,) = (check for check in RULES if check.__name__ == rule)
    found = list(only(tiny_settings(**changes), world_size))
    assert [violation.field for violation in found] == [field]
    assert found[0].expected and found[0].fix


def test_every_rule_of_parallelism_is_tested() -> None:
    tested = {rule for rule, *_ in WRONG}
    homes = ("megatron_retro.config.parallel", "megatron_retro.config.context_rules")
    own = {rule.__name__ for rule in RULES if rule.__module__ in homes}
    assert own - tested == set()


def test_all_broken_rules_are_reported_at_once() -> None:
    settings = tiny_settings(
        tensor_model_parallel_size=3, pipeline_model_parallel_size=8, context_parallel_size=3, global_batch_size=7
    )
    with pytest.raises(ConfigError) as caught:
        require_legal(settings, 5)
    message = str(caught.value)
    for flag in (
        "--tensor-model-parallel-size",
        "--num-attention-heads",
        "--ffn-hidden-size",
        "--seq-length",
    ):
        assert flag in message
    assert "the configuration has 5 problems" in message


def test_every_layout_of_the_grid_is_legal() -> None:
    for world_size, mesh in (*meshes(), *context_meshes()):
        require_legal(tiny_settings(global_batch_size=8, **mesh), world_size)


def test_rules_skip_sections_that_are_not_there() -> None:
    assert violations(Settings([]), 7) == []


@pytest.mark.parametrize(("text", "counts"), [("3,4", (3, 4)), ("3", (3,)), ("", ()), ("3,,4", ()), ("a", ())])
def test_layouts_by_hand(text: str, counts: tuple[int, ...]) -> None:
    assert parse_layout(text) == counts
