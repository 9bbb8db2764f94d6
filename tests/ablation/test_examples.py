"""The example studies are studies: every recipe is legal, has a script, and varies what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_retro.ablation.directories import cell_settings
from megatron_retro.ablation.program import build_study
from megatron_retro.cli import ablate, evaluate, finetune, retrofit
from megatron_retro.config.ablation import AblationConfig
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.peft import PeftConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS

EXAMPLES = Path(__file__).parents[2] / "examples"
SECTIONS = {"retrofit": retrofit.SECTIONS, "finetune": finetune.SECTIONS, "perplexity": evaluate.SECTIONS}
STUDIES = {
    "ablate_database_size": ("retrofit", 4, {"database_keep_fraction"}),
    "ablate_cross_attention": ("retrofit", 2, {"retro_attention_gate"}),
    "frozen_vs_unfrozen": ("retrofit", 4, {"freeze_decoder", "lr"}),
    "adaptive_gate": ("retrofit", 5, {"retro_gate_type", "retro_gate_target_rate"}),
    "findings": (
        "retrofit",
        8,
        {
            *("retro_attention_gate", "train_iters", "freeze_decoder", "retro_neighbor_positions", "retro_gate_type"),
            *("retro_gate_target_rate", "neighbor_absent_share", "neighbor_random_share"),
        },
    ),
    "retriever_quality": (
        "perplexity",
        11,
        {
            *("database_keep_fraction", "database_keep_by", "database_path", "valid_neighbor_path"),
            *("neighbor_random_share", "neighbor_absent_share"),
        },
    ),
    "encoder_ablation": ("finetune", 4, {"retro_attention_gate", "context_place"}),
    "peft_study": (
        "finetune",
        16,
        {"load", "lr", "peft_method", "lora_rank", "lora_alpha", "adapter_size", "num_virtual_tokens"},
    ),
    "peft_study_published": (
        "finetune",
        10 * 3 * 6,
        {
            *("load", "context_place", "peft_parts", "tensor_model_parallel_size", "instruction_data"),
            *("instruction_valid_data", "peft_method", "lora_rank", "adapter_size", "adapter_parallel"),
            *("num_virtual_tokens", "prompt_encoder_hidden_size"),
        },
    ),
}


def quickstart_chunk_length() -> int:
    words = ["--config", str(EXAMPLES / "quickstart.toml")]
    settings, _ = parse_settings("x", retrofit.SECTIONS, words, all_sections=ALL_SECTIONS)
    return settings[RetroConfig].retro_chunk_length


@pytest.mark.parametrize("name", STUDIES)
def test_example(name: str) -> None:
    verb, configurations, fields = STUDIES[name]
    words = ["--config", str(EXAMPLES / f"{name}.toml")]
    settings, _ = parse_settings("x", ablate.SECTIONS, words, all_sections=ALL_SECTIONS)
    assert settings[AblationConfig].study_verb == verb
    study, _ = build_study(settings, SECTIONS[verb])
    assert len({cell.configuration for cell in study.cells}) == configurations
    seeds = {"": set(), "1": {"seed"}}[min(cell.seed for cell in study.cells)]
    assert {cell.seed for cell in study.cells} in ({"1", "2", "3"}, {"1", "2"}, {""})
    assert {field for cell in study.cells for field in cell.changes} == fields | seeds
    every = [cell_settings(study.settings, cell, study.sections) for cell in study.cells]
    if verb != "perplexity":
        assert all(one[RetroConfig].retro_attention_gate in (0.0, 1.0) for one in every)
    if verb == "retrofit":  # the database that the quickstart made
        assert all(one[RetroConfig].retro_chunk_length == quickstart_chunk_length() for one in every)
    methods = {one[PeftConfig].peft_method for one in every} if verb == "finetune" else {"none"}
    assert len(methods) == {"peft_study": 5, "peft_study_published": 3}.get(name, 1)
    script = (EXAMPLES / f"{name}.sh").read_text()
    assert f'"$here/slurm/launch.sh" ablate --config "$here/{name}.toml"' in script
