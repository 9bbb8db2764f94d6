"""The example studies are studies: every recipe is legal, has a script, and varies what its name says."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_retro.ablation.program import build_study
from megatron_retro.ablation.runs import cell_settings
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.evaluation import AblationConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS, STUDY_SECTIONS
from megatron_retro.config.training import PeftConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    "retriever_training": ("retrofit", 4, {"database_path", "neighbor_path", "valid_neighbor_path"}),
    "retriever_kinds": (
        "perplexity",
        6,
        {"database_path", "valid_neighbor_path", "neighbor_random_share", "neighbor_absent_share"},
    ),
    "composition": ("perplexity", 9, {"database_corpus_fractions", "neighbor_absent_share"}),
    "leakage_gain": ("perplexity", 5, {"load"}),
    "saturation": ("pretrain", 6, {"retro_attention_gate", "hidden_size", "num_attention_heads", "init_method_std"}),
    "prose": ("retrofit", 2, {"retro_attention_gate"}),
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


@pytest.mark.parametrize("name", STUDIES)
def test_example(name: str) -> None:
    verb, configurations, fields = STUDIES[name]
    words = ["--config", str(EXAMPLES / f"studies/{name}.toml")]
    settings, _ = parse_settings("x", STUDY_SECTIONS, words, all_sections=ALL_SECTIONS)
    assert settings[AblationConfig].study_verb == verb
    study = build_study(settings)
    assert len({cell.configuration for cell in study.cells}) == configurations
    seeds = {"": set(), "1": {"seed"}}[min(cell.seed for cell in study.cells)]
    assert {cell.seed for cell in study.cells} in ({"1", "2", "3"}, {"1", "2"}, {""})
    assert {field for cell in study.cells for field in cell.changes} == fields | seeds
    every = [cell_settings(study.settings, cell, study.sections) for cell in study.cells]
    if verb != "perplexity":
        assert all(one[RetroConfig].retro_attention_gate in (0.0, 1.0) for one in every)
    if verb in ("pretrain", "retrofit"):
        assert all(one[RetroConfig].retro_chunk_length == 32 for one in every), "that of the quickstart's database"
    methods = {one[PeftConfig].peft_method for one in every} if verb == "finetune" else {"none"}
    assert len(methods) == {"peft_study": 5, "peft_study_published": 3}.get(name, 1)


def test_every_study_is_here() -> None:
    assert {path.stem for path in (EXAMPLES / "studies").glob("*.toml")} - {"shared"} == set(STUDIES)


FAKE_PYTHON = """#!/usr/bin/env bash
echo "${*:3}" >>"$SEEN"
"""


def start(name: str, directory: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a script starts: each start of the program is a line of its words."""
    seen = directory / "seen"
    (directory / "bin").mkdir()
    fake = directory / "bin" / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    (directory / "bin" / "megatron-retro").symlink_to(fake)
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DATA": str(directory), "SEEN": str(seen), **variables}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "slurm/study.sh"), name, "--study-output", "elsewhere"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done, seen.read_text().splitlines() if seen.exists() else []


def words_after(line: str, flag: str) -> list[str]:
    rest = line.split()[line.split().index(flag) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"prose", "encoder_ablation", "peft_study"}))
def test_a_script_makes_what_its_study_reads(name: str, tmp_path: Path) -> None:
    """The quickstart's own tables apart, every table that a recipe names is one that its script asks for."""
    (tmp_path / "corpus").mkdir()
    lines = [{"id": f"{kind}one", "text": "text"} for kind in ("topic ", "encodings/", "")]
    (tmp_path / "corpus/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, started = start(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert started[-1] == f"ablate --config {EXAMPLES}/studies/{name}.toml --study-output elsewhere"
    made = set()
    for line in started[:-1]:
        if line.startswith("build-retrieval"):
            (project,) = words_after(line, "--retro-project-dir")
            made |= {
                f"{project}/neighbors/{query.split('=')[0]}" for query in words_after(line, "--retro-query-corpus")
            }
    recipe = (EXAMPLES / f"studies/{name}.toml").read_text()
    read = set(re.findall(r"retrieval[\w-]*/neighbors/[\w-]+", recipe))
    unread = {
        f"retrieval-small-{kind}/neighbors/train{order}" for kind in ("hashed", "minilm") for order in ("", "-bm25")
    }
    read |= unread if name == "retriever_kinds" else set()  # it shares its tables with the study that trains
    assert {table for table in read if not table.startswith("retrieval/")} == made


def test_sources_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    names = ("topic a", "encodings/b.py", "c.py", "d/topic e", "topic f")
    lines = [json.dumps({"id": name, "text": name}) for name in names]
    (tmp_path / "corpus/train.jsonl").write_text("\n".join(lines) + "\n")
    done, _ = start("composition", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        source: [json.loads(line)["id"] for line in (tmp_path / f"corpus/{source}.jsonl").read_text().splitlines()]
        for source in ("reference", "codecs", "library")
    }
    assert found == {
        "reference": ["topic a", "topic f"],
        "codecs": ["encodings/b.py"],
        "library": ["c.py", "d/topic e"],
    }


def test_prose_takes_any_text_and_holds_out_a_part(tmp_path: Path) -> None:
    text = tmp_path / "some.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(1, 41)))
    done, started = start("prose", tmp_path, TEXT=str(text))
    assert done.returncode == 0, done.stderr
    verbs = ["train-tokenizer", "preprocess", "preprocess", "build-retrieval", "pretrain", "ablate"]
    assert [line.split()[0] for line in started] == verbs
    parts = [(tmp_path / f"corpus/{part}.jsonl").read_text().splitlines() for part in ("train", "held_out")]
    assert sorted(parts[0] + parts[1]) == sorted(text.read_text().splitlines()) and len(parts[1]) == 2


def test_studies_of_tuning_ask_for_conversations(tmp_path: Path) -> None:
    done, started = start("peft_study", tmp_path, CONVERSATIONS="none.jsonl", HELD_OUT="none.jsonl")
    assert done.returncode == 2 and "there is no none.jsonl" in done.stderr and not started
