"""Pairing and intervals, against figures worked out elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_retro.ablation.grid import Cell, Choice, study_axes, study_cells
from megatron_retro.ablation.results import Result, configurations, difference, student_interval
from megatron_retro.ablation.runs import Outcome, cell_settings, lone_environment, render_recipe
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.evaluation import AblationConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS, FINETUNING_SECTIONS, STUDY_SECTIONS
from megatron_retro.config.settings import build_settings
from megatron_retro.runtime.run_records import EvaluationRecord, HeldOutSamples
from megatron_retro.runtime.statistics import Interval


def result(
    configuration: str, seed: int, losses: list[float], text: int = 7, code: int = 0, documents: list[int] | None = None
) -> Result:
    choices = {
        "num_layers": Choice(configuration, {"num_layers": configuration}),
        "seed": Choice(str(seed), {"seed": seed}),
    }
    tokens, texts = [10] * len(losses), [text + number for number in range(len(losses))]
    samples = HeldOutSamples([10 * loss for loss in losses], tokens, texts, documents or texts)
    record = EvaluationRecord(1, 0.0, float(np.mean(losses)), samples=samples)
    return Result(Cell(choices), Outcome(code, 1.0, 0.0), 1, 1.0, evaluations=(record,))


def test_students_interval_is_the_textbook_one() -> None:
    values = [2.1, 1.9, 2.4, 2.0]
    found = student_interval(values)
    half = 3.182 * float(np.std(values, ddof=1)) / math.sqrt(4)
    assert (found.mean, found.high - found.mean) == pytest.approx((2.1, half))


def test_a_difference_common_to_all_samples_has_no_width() -> None:
    """Samples differ much among themselves, models by the same amount on each: only pairing shows it."""
    base = [1.0, 5.0, 2.0, 9.0]
    results = [result("a", seed, base) for seed in (1, 2)]
    results += [result("b", seed, [loss - 0.5 for loss in base]) for seed in (1, 2)]
    first, second = configurations(results)
    found = difference(second, first)
    assert found is not None and found.mean == pytest.approx(-0.5) and found.clear
    assert found.by_seed == pytest.approx((-0.5, -0.5))
    assert isinstance(found.over_documents, Interval) and isinstance(found.over_seeds, Interval)
    assert found.over_documents.to_json() == pytest.approx([-0.5, -0.5, -0.5])
    assert found.over_seeds.to_json() == pytest.approx([-0.5, -0.5, -0.5])


def test_windows_of_one_document_are_one_observation() -> None:
    """Nine windows of one document say the same as one of it, under whatever number of seeds."""
    base, gains = [3.0] * 10, [-1.0] * 9 + [0.5]
    results = [result("a", seed, base, documents=[0] * 9 + [1]) for seed in (1, 2)]
    results += [result("b", 1, [b + g for b, g in zip(base, gains, strict=True)], documents=[0] * 9 + [1])]
    results += [result("b", 2, [b + g for b, g in zip(base, gains, strict=True)], documents=[0] * 9 + [1])]
    first, second = configurations(results)
    found = difference(second, first)
    assert found is not None and isinstance(found.over_documents, Interval)
    assert found.over_documents.to_json() == pytest.approx([-0.85, -1.0, 0.5]) and not found.clear


def test_noise_is_not_called_a_difference() -> None:
    base = [1.0, 5.0, 2.0, 9.0]
    results = [result("a", seed, base) for seed in (1, 2)]
    results += [result("b", 1, [0.9, 5.2, 2.1, 8.7]), result("b", 2, [1.2, 4.9, 2.3, 8.9])]
    first, second = configurations(results)
    found = difference(second, first)
    assert found is not None and not found.clear and found.words == "not clear over documents, not clear over seeds"


def test_only_seeds_that_both_finished_are_compared() -> None:
    results = [result("a", 1, [1.0]), result("a", 2, [5.0]), result("b", 1, [2.0]), result("b", 2, [0.0], code=1)]
    first, second = configurations(results)
    found = difference(second, first)
    assert found is not None and found.mean == pytest.approx(1.0) and found.over_seeds == "one seed"
    assert not found.clear and found.words == "not clear over documents, one seed", "one sample has no bounds"
    assert second.state == "1 of 2 finished; 2: failed (exit code 1)"


def test_runs_over_other_samples_are_not_paired() -> None:
    first, second = configurations([result("a", 1, [1.0], text=7), result("b", 1, [2.0], text=8)])
    found = difference(second, first)
    assert found is not None and found.over_documents == "other held-out samples" and not found.clear


def test_a_value_that_is_the_default_stays_in_the_recipe() -> None:
    """Fine-tuning inherits what is not set; a gate set to 1 must not be taken for one that nobody set."""
    settings = build_settings(STUDY_SECTIONS, {"study_grid": ["retro_attention_gate = [1.0, 0.0]"]}, {})
    cells = study_cells(study_axes(settings[AblationConfig], FINETUNING_SECTIONS))
    recipes = [render_recipe(cell_settings(settings, cell, FINETUNING_SECTIONS)) for cell in cells]
    assert recipes == [f"[retro]\nretro_attention_gate = {gate}\n" for gate in ("1.0", "0.0")]


def test_groups_make_axes_of_their_own() -> None:
    cases = ["size.small = {lora_rank = 2}", "a = {lr = 1e-3}", "size.large = {lora_rank = 4}", "b = {lr = 2e-3}"]
    settings = build_settings(STUDY_SECTIONS, {"study_cases": cases}, {})
    cells = study_cells(study_axes(settings[AblationConfig], FINETUNING_SECTIONS))
    assert [cell.name for cell in cells] == [f"size={size},case={case}" for size in ("small", "large") for case in "ab"]
    assert cells[-1].changes == {"lora_rank": 4, "lr": 2e-3}


def test_recipes_read_back_as_the_settings(tmp_path: Any) -> None:
    grid = ["retro_layers = [[1], [1, 2]]", "lr = [1e-3]", "seed = [1, 2]"]
    cases = ["'a b/c' = {freeze_decoder = true}", "d = {}"]
    settings = build_settings(STUDY_SECTIONS, {"study_grid": grid, "study_cases": cases}, {})
    cells = study_cells(study_axes(settings[AblationConfig], FINETUNING_SECTIONS))
    assert len({cell.name for cell in cells}) == len(cells) == 8
    assert [cell.seed for cell in cells[:2]] == ["1", "2"]
    for cell in cells:
        assert "/" not in cell.name and " " not in cell.name
        wanted = cell_settings(settings, cell, FINETUNING_SECTIONS)
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(render_recipe(wanted))
        found, _ = parse_settings("x", FINETUNING_SECTIONS, ["--config", str(recipe)], all_sections=ALL_SECTIONS)
        assert found.values() == wanted.values()
        assert found[RetroConfig].retro_layers in ((1,), (1, 2))


def test_a_run_does_not_take_the_place_of_its_worker() -> None:
    worker = {"PATH": "p", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "1", "SLURM_JOB_ID": "9"}
    assert lone_environment(worker) == {"PATH": "p", "SLURM_JOB_ID": "9"}
