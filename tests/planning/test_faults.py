"""Planted mistakes in the 48B recipe are found by name, all at once; without them it fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_retro.cli.main import main
from megatron_retro.config.toml_files import render_toml
from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/recipes/retrofit.toml"


def plan(
    capsys: pytest.CaptureFixture[str], *words: str, recipe: Path = RECIPE, preset: str | None = "retro-48b"
) -> tuple[int, str]:
    size = ["--preset", preset] if preset else []
    code = main(["plan", "--plan-for", "retrofit", *size, "--config", str(recipe), "--no-plan-shards", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_48b_recipe_prints_its_plan_for_1024_gpus() -> None:
    """As an operator calls it, every distinct shard built at the real world size."""
    words = ["bash", str(ROOT / "examples/retrofit_48b.sh"), "--dry-run", "--plan-price-per-gpu-hour", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment())
    assert done.returncode == 0, done.stderr
    for part in (
        "retrofit on 128 x 8 H100",
        "parameters   48.5B; 2 distinct shards built on the meta device at world size 1024, as counted",
        "+39% over the GPT",
        "the slowest pipeline rank is busy",
        "bubble",
        "price",
        "table         1.6B queries x 20 neighbours",
        "fits: ",
    ):
        assert part in done.stdout, done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_every_broken_rule_is_listed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(capsys, "--tensor-model-parallel-size", "6", "--seq-length", "4000")
    assert code == 2
    for name in ("--num-attention-heads = 64", "--ffn-hidden-size = 21824", "--seq-length = 4000"):
        assert name in text
    assert "a multiple of --retro-chunk-length 64" in text
    assert "as 3968 or 4032" in text


def test_memory_over_is_named_with_a_change_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipelined = ("num_layers_per_virtual", "pipeline_layout", "pipeline_schedule", "pipeline_model")
    lines = [line for line in RECIPE.read_text().splitlines() if not line.startswith(pipelined)]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("\n".join(lines))
    code, text = plan(capsys, "--plan-nodes", "16", "--data-parallel-sharding", "none", recipe=recipe)
    assert code == 2
    assert "--plan-hardware = 'H100, " in text
    assert "needed on pipeline rank 0" in text
    assert " fits (" in text


def small_recipe(directory: Path, corpus: TinyCorpus, **changes: object) -> Path:
    """The tiny corpus's own settings with a vocabulary, as a file."""
    recipe = directory / "small.toml"
    recipe.write_text(render_toml(corpus.settings(vocab_size=257, **changes)))
    return recipe


def test_a_table_of_another_corpus_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine, other = write_tiny_corpus(tmp_path / "mine"), write_tiny_corpus(tmp_path / "other", seed=1)
    small = ["--plan-gpus-per-node", "1"]
    code, text = plan(capsys, *small, recipe=small_recipe(tmp_path, mine), preset=None)
    assert code == 0, text
    code, text = plan(
        capsys, *small, "--neighbor-path", str(other.table), recipe=small_recipe(tmp_path, mine), preset=None
    )
    assert code == 2
    assert str(other.table) in text
    assert "1 problem(s)" in text


def test_files_that_are_not_there_yet_are_a_note(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, write_tiny_corpus(tmp_path / "mine"))
    code, text = plan(
        capsys, "--plan-gpus-per-node", "1", "--neighbor-path", str(tmp_path / "later"), recipe=recipe, preset=None
    )
    assert code == 0
    assert f"note: {tmp_path / 'later'} is not there yet" in text


def test_unknown_hardware_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(capsys, "--plan-hardware", "H1000")
    assert code == 2
    assert "no 'H1000' (did you mean H100?)" in text


def test_no_layout_that_fits_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(capsys, "--suggest", "--plan-nodes", "1", "--plan-gpus-per-node", "1")
    assert code == 2 and "error: no layout of this model fits 1 x H100" in text


@pytest.mark.parametrize("stage", ["pretrain", "retrofit", "instruct"])
def test_the_tiny_recipes_have_a_plan_too(stage: str) -> None:
    words = ["bash", str(ROOT / "examples/slurm/stage.sh"), stage, "tiny", "--dry-run", "--no-plan-shards"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment())
    assert done.returncode == 0, done.stderr
