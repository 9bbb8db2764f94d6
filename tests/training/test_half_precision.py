"""Runs in float16 and FP8: the loss scale finds its place on all ranks and after a restart; FP8 trains or refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.assembly.parallel_model import ParallelModel, StepResult
from megatron_retro.config.sections import violations
from megatron_retro.config.settings import Settings
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops.backends import NONE, VARIABLE, choice
from megatron_retro.ops.local_tensors import local
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.processes import exit_code_of, run_ranks
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, losses
from megatron_retro.training.program import pretrain

WINDOW = 5
HALF: dict[str, Any] = {"fp16": True, "initial_loss_scale": 2.0**21, "loss_scale_window": WINDOW, "eval_iters": 0}
LAYOUTS: list[dict[str, Any]] = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]


def scales_and_verdicts(run: Path) -> list[tuple[float, bool]]:
    return [(step.loss_scale, step.applied) for step in read_run_log(run).steps]


def follows_the_rule(steps: list[tuple[float, bool]]) -> bool:
    """Half after an overflow, double after a window of good steps, else as it was."""
    good = 0
    for (scale, applied), (following, _) in itertools.pairwise(steps):
        good = good + 1 if applied else 0
        expected = scale * 2 if good == WINDOW else scale if applied else scale / 2
        good %= WINDOW
        if following != expected:
            return False
    return True


def test_a_scale_that_is_too_large_comes_down_and_training_follows_float32(corpus: TinyCorpus, tmp_path: Path) -> None:
    pretrain(corpus.settings(save=str(tmp_path / "single"), train_iters=12, eval_iters=0))
    pretrain(corpus.settings(save=str(tmp_path / "half"), train_iters=20, **HALF))
    steps = scales_and_verdicts(tmp_path / "half")
    skipped = [applied for _, applied in steps].index(True)
    assert 1 <= skipped <= 8, "this scale overflows at first"
    assert follows_the_rule(steps) and max(scale for scale, _ in steps[skipped:]) > steps[skipped][0]
    assert not [event for event in read_run_log(tmp_path / "half").incidents if event["event"] == "bad step"]
    # other samples after the skipped ones, but the same text statistics
    assert losses(tmp_path / "half")[skipped + 11] == pytest.approx(losses(tmp_path / "single")[-1], rel=0.03)


def test_the_scale_goes_on_after_a_restart(corpus: TinyCorpus, tmp_path: Path) -> None:
    pretrain(corpus.settings(save=str(tmp_path / "whole"), train_iters=12, **HALF))
    broken = corpus.settings(save=str(tmp_path / "broken"), train_iters=12, exit_interval=8, **HALF)
    assert exit_code_of(lambda: pretrain(broken)) == 75
    pretrain(broken.replace(exit_interval=None))
    assert scales_and_verdicts(tmp_path / "broken") == scales_and_verdicts(tmp_path / "whole")
    assert differences(tmp_path / "whole", tmp_path / "broken") == []


def overflowing(settings: Settings, rank: int, at: int) -> None:
    """Train; one gradient of one rank overflows at one step."""
    train_step, calls = ParallelModel.train_step, [0]

    def step(self: ParallelModel, microbatches: Any, **more: Any) -> StepResult:
        result = train_step(self, microbatches, **more)
        calls[0] += 1
        if calls[0] == at and torch.distributed.get_rank() == rank:
            gradient = next(parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
            local(gradient).reshape(-1)[0] = float("inf")
        return result

    ParallelModel.train_step = step  # type: ignore[method-assign]
    pretrain(settings)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_overflow_on_one_rank_halves_the_scale_of_all(
    corpus: TinyCorpus, tmp_path: Path, layout: dict[str, Any]
) -> None:
    more = {**HALF, "initial_loss_scale": 1024.0, **layout}
    settings = corpus.settings(save=str(tmp_path), train_iters=5, global_batch_size=8, check_replicas=True, **more)
    run_ranks(lambda: overflowing(settings, rank=1, at=3), 2, initialize=False, timeout=100)
    steps = scales_and_verdicts(tmp_path)
    assert [applied for _, applied in steps] == [True, True, False, True, True]
    assert follows_the_rule(steps) and steps[3][0] == 512.0


EIGHT: dict[str, Any] = {
    "bf16": True,
    "fp8_format": "hybrid",
    "num_attention_heads": 2,
    "train_iters": 6,
    "eval_iters": 0,
    "global_batch_size": 8,
}


@pytest.fixture(scope="module")
def wide(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the same run in bf16."""
    run = tmp_path_factory.mktemp("bf16")
    pretrain(corpus.settings(save=str(run), **{**EIGHT, "fp8_format": "none"}))
    return losses(run)


@pytest.mark.skipif(choice("fp8_linear", "cpu").backend == NONE, reason=choice("fp8_linear", "cpu").reason)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layers_in_fp8_train_as_in_bf16(
    corpus: TinyCorpus, tmp_path: Path, layout: dict[str, Any], wide: list[float]
) -> None:
    """Not the same losses, so it did compute in FP8; close ones, so it learned."""
    settings = corpus.settings(save=str(tmp_path / "fp8"), **EIGHT, **layout)
    run_ranks(lambda: pretrain(settings), 2, initialize=False, timeout=100)
    narrow = losses(tmp_path / "fp8")
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.02)


def test_fp8_that_cannot_be_is_refused(corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = corpus.settings(**EIGHT, pipeline_model_parallel_size=2, pipeline_schedule="zero-bubble")
    assert [found.field for found in violations(cut, 2)] == ["pipeline_schedule"]
    monkeypatch.setenv(VARIABLE, "fp8_linear=transformer_engine")
    with pytest.raises(EnvironmentProblem, match=r"transformer_engine is not installed.*not on cpu"):
        pretrain(corpus.settings(**EIGHT))
