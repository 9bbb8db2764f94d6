"""The recipes: the published hyperparameters, the shapes of the presets, legal layouts, and one form of script."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.toml_files import PRESETS, parse_toml, read_recipe
from megatron_retro.errors import ConfigError
from megatron_retro.planning.faults import structural_faults
from megatron_retro.planning.inference import inference_report
from megatron_retro.planning.workload import workload_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {"878m": "823m", "2.5b": "2.25b", "9.5b": "8.5b", "24b": "22b", "48b": "43b"}
RETRO_FITTING = {  # rate, lowest rate, batch, steps
    "878m": (2e-5, 2e-6, 128, 195_200),
    "2.5b": (2e-5, 2e-6, 256, 97_600),
    "9.5b": (1e-5, 1e-6, 512, 48_800),
    "24b": (1e-5, 1e-6, 512, 48_800),
    "48b": (9e-6, 9e-7, 768, 32_500),
}
KINDS = ("pretrain_gpt", "retrofit", "instruct", "evaluate", "build_retrieval", "adaptive_retro", "tiny")
RECIPES = sorted(path for path in EXAMPLES.glob("*.toml") if path.stem.startswith(KINDS))
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.sh") if path.stem.startswith(KINDS))


def document(path: Path) -> dict[str, Any]:
    return parse_toml(path.read_text(), str(path))


def settings(path: Path) -> Settings:
    return build_settings(ALL_SECTIONS, read_recipe(path, ALL_SECTIONS, ALL_SECTIONS), {})


@pytest.mark.parametrize("size", RETRO_FITTING)
def test_retro_fitting_is_as_published(size: str) -> None:
    recipe = document(EXAMPLES / f"retrofit_{size}.toml")
    optimizer, training = recipe["optimizer"], recipe["training"]
    found = (optimizer["lr"], optimizer["min_lr"], training["global_batch_size"], training["train_iters"])
    assert found == RETRO_FITTING[size]
    wanted = {"lr_warmup_samples": 16_667, "lr_decay_samples": 23_750_000, "weight_decay": 0.1, "clip_grad": 1.0}
    wanted |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "lr_decay_style": "cosine"}
    assert {key: optimizer[key] for key in wanted} == wanted
    assert workload_of(settings(EXAMPLES / f"retrofit_{size}.toml")).num_tokens == pytest.approx(102e9, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_instruction_tuning_is_as_published(size: str) -> None:
    recipe = document(EXAMPLES / f"instruct_{size}.toml")
    optimizer = recipe["optimizer"]
    found = {key: optimizer[key] for key in ("lr", "weight_decay", "adam_beta1", "adam_beta2")}
    assert found == {"lr": 5e-6, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.98}
    assert recipe["training"]["global_batch_size"] * recipe["training"]["train_iters"] == 128_000
    assert recipe["retro"]["retro_attention_gate"] == 0.0


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_those_of_the_presets(size: str) -> None:
    preset = document(PRESETS / f"retro-{size}.toml")
    for name in (f"retrofit_{size}", f"instruct_{size}", f"pretrain_gpt_{SIZES[size]}"):
        recipe = document(EXAMPLES / f"{name}.toml")
        assert recipe["model"] == preset["model"]
        if "retro" in recipe:
            assert recipe["retro"] | preset["retro"] == recipe["retro"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_breaks_no_rule(path: Path) -> None:
    found = settings(path)
    if "parallel" in document(path):
        from_elsewhere = path.stem == "retrofit_hf"  # its vocabulary comes from a model
        with_vocabulary = found.replace(vocab_size=256) if from_elsewhere else found
        assert structural_faults(with_vocabulary) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_hold_choices_and_name_no_launcher(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(srun|torchrun|mpirun)\b", text)
    for header in ("#SBATCH --job-name=", "--requeue", "#SBATCH --signal=USR1@300", "#SBATCH --mail-type=END,FAIL"):
        assert header in text
    assert "set -euo pipefail" in text
    for name in re.findall(r"\$here/([\w.]+\.toml)", text):
        assert (EXAMPLES / name).is_file()
    for stage, size in re.findall(r"/stage\.sh (\w+) (\S+)", text):
        assert path.stem == f"{stage}_{size}" and (EXAMPLES / f"{stage}_{size}.toml").is_file()


@pytest.mark.parametrize("size", SIZES)
def test_each_stage_reads_what_the_one_before_it_writes(size: str, tmp_path: Path) -> None:
    """The words of the recipes, as a launcher that starts nothing hears them."""
    (tmp_path / "slurm").mkdir()
    for path in (*EXAMPLES.glob("*.sh"), EXAMPLES / "slurm/stage.sh"):
        shutil.copy(path, tmp_path / path.relative_to(EXAMPLES))
    launcher = tmp_path / "slurm/launch.sh"
    launcher.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)

    @functools.cache
    def words(name: str) -> list[str]:
        command = ["bash", str(tmp_path / f"{name}.sh"), "--seed", "7"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert found[-2:] == ["--seed", "7"], "overrides come last"
        return found

    def value(name: str, flag: str) -> str:
        found = words(name)
        return found[found.index(flag) + 1]

    chain = [f"pretrain_gpt_{SIZES[size]}", f"retrofit_{size}", f"instruct_{size}", f"evaluate_{size}"]
    assert [words(name)[0] for name in chain] == ["pretrain", "retrofit", "finetune", "evaluate"]
    for before, after in itertools.pairwise(chain):
        assert value(after, "--load") == value(before, "--save")
    assert "nq=data/evaluation/nq.json" in words(chain[-1])
    assert value(chain[1], "--neighbor-path") == "data/retro/neighbors/corpus"


def test_the_evaluation_of_the_largest_is_cut_until_it_fits() -> None:
    assert "4 replicas of 2 each" in inference_report(settings(EXAMPLES / "evaluate_48b.toml"))
    whole = settings(EXAMPLES / "evaluate_48b.toml").replace(tensor_model_parallel_size=1)
    with pytest.raises(ConfigError, match="does not fit"):
        inference_report(whole)
    with pytest.raises(ConfigError, match="no whole replicas"):
        inference_report(settings(EXAMPLES / "evaluate_48b.toml").replace(tensor_model_parallel_size=16))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_headers_ask_for_the_nodes_that_the_plan_is_for(path: Path) -> None:
    recipe = EXAMPLES / f"{path.stem}.toml"
    nodes = re.search(r"#SBATCH --nodes=(\d+)", path.read_text())
    assert nodes is not None
    if recipe.exists() and "plan_nodes" in document(recipe)["planning"]:
        assert int(nodes[1]) == document(recipe)["planning"]["plan_nodes"]


def test_a_recipe_prints_its_settings_with_overrides() -> None:
    script = EXAMPLES / "retrofit_48b.sh"
    done = subprocess.run(
        ["bash", str(script), "--print-config", "--lr", "0.25"], capture_output=True, text=True, check=True
    )
    assert re.search(r"lr = 0\.25 +# flag", done.stdout)
    assert re.search(r"global_batch_size = 768 +# .*retrofit_48b\.toml", done.stdout)
