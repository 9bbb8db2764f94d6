"""The recipes: the published hyperparameters, deltas to the presets, legal layouts, stages that fit together."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.data import DataConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import preset_path, read_recipe
from megatron_retro.config.training import TrainingConfig
from megatron_retro.errors import ConfigError
from megatron_retro.planning.inference import inference_report
from megatron_retro.planning.suggestions import structural_faults
from megatron_retro.planning.workload import workload_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
SIZES = {"878m": "823m", "2.5b": "2.25b", "9.5b": "8.5b", "24b": "22b", "48b": "43b"}
STAGES = ("pretrain", "retrofit", "instruct", "evaluate")
RETRO_FITTING = {  # rate, lowest rate, batch, steps
    "878m": (2e-5, 2e-6, 128, 195_200),
    "2.5b": (2e-5, 2e-6, 256, 97_600),
    "9.5b": (1e-5, 1e-6, 512, 48_800),
    "24b": (1e-5, 1e-6, 512, 48_800),
    "48b": (9e-6, 9e-7, 768, 32_500),
}
SCRIPTS = (EXAMPLES / "retrofit_48b.sh", EXAMPLES / "slurm/stage.sh", EXAMPLES / "slurm/study.sh")


def preset_of(stage: str, size: str) -> str:
    return f"gpt-{SIZES[size]}" if stage == "pretrain" else f"retro-{size}"


def settings(stage: str, size: str) -> Settings:
    words = ["--preset", preset_of(stage, size), "--config", str(RECIPES / f"{stage}.toml")]
    return parse_settings("x", ALL_SECTIONS, words, all_sections=ALL_SECTIONS)[0]


def values(stage: str, size: str) -> dict[str, Any]:
    return {name: value for section in settings(stage, size).values().values() for name, value in section.items()}


@pytest.mark.parametrize("size", RETRO_FITTING)
def test_retro_fitting_is_as_published(size: str) -> None:
    found = values("retrofit", size)
    names = ("lr", "min_lr", "global_batch_size", "train_iters")
    assert tuple(found[name] for name in names) == RETRO_FITTING[size]
    wanted = {"lr_warmup_samples": 16_667, "lr_decay_samples": 23_750_000, "weight_decay": 0.1, "clip_grad": 1.0}
    wanted |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "lr_decay_style": "cosine", "seq_length": 4096}
    assert {key: found[key] for key in wanted} == wanted
    assert workload_of(settings("retrofit", size)).num_tokens == pytest.approx(102e9, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_pretraining_reads_the_published_tokens(size: str) -> None:
    found = settings("pretrain", size)
    assert found[TrainingConfig].train_iters is None
    tokens = (found[TrainingConfig].train_samples or 0) * found[DataConfig].seq_length
    assert tokens == pytest.approx(1.1e12, rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_instruction_tuning_is_as_published(size: str) -> None:
    found = values("instruct", size)
    wanted = {"lr": 5e-6, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.98, "retro_attention_gate": 0.0}
    assert {key: found[key] for key in wanted} == wanted
    assert found["global_batch_size"] * found["train_iters"] == 128_000


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [("adaptive_1b", "adaptive-retro-1b"), *((stage, preset_of(stage, size)) for stage in STAGES for size in SIZES)],
)
def test_a_recipe_says_only_what_its_presets_do_not(recipe: str, preset: str) -> None:
    shape = read_recipe(preset_path(preset), ALL_SECTIONS, ALL_SECTIONS)
    delta = read_recipe(RECIPES / f"{recipe}.toml", ALL_SECTIONS, ALL_SECTIONS, preset)
    assert not shape.keys() & delta.keys(), f"{recipe}.toml restates {preset}"


@pytest.mark.parametrize(("stage", "size"), itertools.product(("pretrain", "retrofit", "instruct"), SIZES))
def test_every_layout_breaks_no_rule(stage: str, size: str) -> None:
    assert structural_faults(settings(stage, size)) == []


@pytest.mark.parametrize(
    ("name", "preset", "vocabulary"),
    [
        ("tiny", None, None),
        ("adaptive_1b", "adaptive-retro-1b", None),
        ("retrofit_hf", None, 256),
        ("retrofit_smollm2_1.7b", None, None),
    ],
)
def test_the_other_recipes_break_no_rule(name: str, preset: str | None, vocabulary: int | None) -> None:
    words = ["--config", str(RECIPES / f"{name}.toml"), *(["--preset", preset] if preset else [])]
    found = parse_settings("x", ALL_SECTIONS, words, all_sections=ALL_SECTIONS)[0]
    assert structural_faults(found.replace(vocab_size=vocabulary) if vocabulary else found) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_hold_choices_and_name_no_launcher(path: Path) -> None:
    text = re.sub(r"(?m)(^|\s)#.*", "", path.read_text())
    assert not re.search(r"\b(srun|torchrun|mpirun|sbatch)\b", text)
    for name in re.findall(r"\$recipes/([\w.]+\.toml)", text):
        assert (RECIPES / name).is_file()


@pytest.fixture
def deaf(tmp_path: Path) -> Path:
    """The examples with a launcher that starts nothing and prints its words."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    launcher = tmp_path / "examples/slurm/launch.sh"
    launcher.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    return tmp_path / "examples"


@pytest.mark.parametrize("size", [*SIZES, "tiny"])
def test_each_stage_reads_what_the_one_before_it_writes(size: str, deaf: Path) -> None:
    @functools.cache
    def words(stage: str) -> list[str]:
        command = ["bash", str(deaf / "slurm/stage.sh"), stage, size, "--seed", "7"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert found[-2:] == ["--seed", "7"], "overrides come last"
        return found

    def value(stage: str, flag: str) -> str:
        return words(stage)[words(stage).index(flag) + 1]

    assert [words(stage)[0] for stage in STAGES] == ["pretrain", "retrofit", "finetune", "evaluate"]
    trained = STAGES if size != "tiny" else STAGES[:3]
    for before, after in itertools.pairwise(trained):
        assert value(after, "--load") == value(before, "--save")
    tokens = value("corpus", "--output-prefix") + "_text_document"
    assert value("index", "--retro-database-corpus") == value("pretrain", "--data-path") == tokens
    assert value("retrofit", "--database-path") == value("index", "--retro-project-dir") + "/database"
    assert value("retrofit", "--neighbor-path") == value("index", "--retro-project-dir") + "/neighbors/corpus"
    if size != "tiny":
        assert "nq=data/evaluation/nq.json" in words("evaluate")


@pytest.mark.parametrize("words", [["retrofit", "49b"], ["distil", "48b"], ["instruct", "adaptive-1b"]])
def test_what_is_no_stage_is_named(words: list[str], deaf: Path) -> None:
    done = subprocess.run(["bash", str(deaf / "slurm/stage.sh"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and f"there is no stage '{words[0]}' of size '{words[1]}'" in done.stderr


def test_the_evaluation_of_the_largest_is_cut_until_it_fits() -> None:
    assert "4 replicas of 2 each" in inference_report(settings("evaluate", "48b"))
    with pytest.raises(ConfigError, match="does not fit"):
        inference_report(settings("evaluate", "48b").replace(tensor_model_parallel_size=1))
    with pytest.raises(ConfigError, match="does not fit the model"):
        inference_report(settings("evaluate", "48b").replace(tensor_model_parallel_size=16))


def environment(directory: Path, **variables: str) -> dict[str, str]:
    """An operator's shell whose sbatch prints its words."""
    fake = directory / "sbatch"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$SEEN"\necho "7;cluster"\n')
    fake.chmod(0o755)
    path = f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SEEN": str(directory / "seen"), **variables}


def submitted(directory: Path, *words: str, **variables: str) -> list[str]:
    command = ["bash", str(EXAMPLES / "slurm/submit.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(directory, **variables))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7\n", "the job's number alone"
    return (directory / "seen").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["retrofit", "9.5b"], ["--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive", "--mem=0"]),
        (["pretrain", "48b"], ["--nodes=128", "--job-name=pretrain-48b"]),
        (["instruct", "tiny"], ["--nodes=2", "--ntasks-per-node=1"]),
        (["index", "48b"], ["--nodes=1", "--array=0-15", "--exclusive", "--mem=0"]),
        (["study", "peft_study_published"], ["--nodes=1", "--array=0-3", "--gpus-per-node=8"]),
    ],
)
def test_jobs_ask_for_the_nodes_that_the_plan_is_for(words: list[str], options: list[str], tmp_path: Path) -> None:
    seen = submitted(tmp_path, *words)
    assert set(options) <= set(seen)
    assert seen[-2] == "--wrap" and seen[-1].endswith(f" {words[1]} ")
    assert ("tiny" in words) == (not any(word.startswith("--gpus") for word in seen) and words[0] != "index")


def test_options_go_to_sbatch_and_flags_to_the_verb(tmp_path: Path) -> None:
    words = ["retrofit", "878m", "--nodes=2", "--partition", "long", "--", "--tensorboard-dir", "a folder"]
    seen = submitted(tmp_path, *words)
    assert seen.index("--nodes=2") > seen.index("--nodes=4"), "sbatch takes the last"
    assert seen[seen.index("--partition") + 1] == "long"
    assert seen[-1].endswith(" retrofit 878m --tensorboard-dir a\\ folder ")


def test_a_profile_of_the_cluster_reaches_every_job(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.env"
    profile.write_text("ACCOUNT=a\nPARTITION=p\nTIME=2-0\nMEMORY=64G\nCPUS_PER_TASK=4\nGPU_TYPE=h100\n")
    seen = submitted(tmp_path, "retrofit", "878m", CLUSTER=str(profile))
    wanted = {"--account=a", "--partition=p", "--time=2-0", "--cpus-per-task=4", "--gpus-per-node=h100:8"}
    assert wanted <= set(seen)
    assert seen.index("--mem=64G") > seen.index("--mem=0"), "sbatch takes the last"


def test_settings_that_cannot_be_are_refused_before_anything_is_queued(tmp_path: Path) -> None:
    command = ["bash", str(EXAMPLES / "slurm/submit.sh"), "retrofit", "48b", "--", "--num-layer", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 2 and "did you mean --num-layers?" in done.stderr
    assert not (tmp_path / "seen").exists()


def test_the_headers_of_the_48b_script_are_what_submit_asks_for(tmp_path: Path) -> None:
    headers = re.findall(r"(?m)^#SBATCH (.*)$", (EXAMPLES / "retrofit_48b.sh").read_text())
    seen = set(submitted(tmp_path, "retrofit", "48b"))
    asked = {word for word in seen if word.startswith("--")} - {"--parsable", "--wrap"}
    assert {word for line in headers for word in line.split()} == asked | {"--time=2-00:00:00"}


def test_a_recipe_prints_its_settings_with_overrides() -> None:
    command = ["bash", str(EXAMPLES / "retrofit_48b.sh"), "--print-config", "--lr", "0.25"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"lr = 0\.25 +# flag", done.stdout)
    assert re.search(r"global_batch_size = 768 +# .*retrofit\.toml", done.stdout)
    assert re.search(r"num_layers = 48 +# preset retro-48b", done.stdout)
