"""Bad batches, poisoned gradients, ranks that hang: each has its exact outcome."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_retro.assembly.parallel_model import ParallelModel, StepResult, build_parallel_model
from megatron_retro.assembly.run_parts import resolved_settings
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import render_toml
from megatron_retro.data.loader import Loader
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import DataError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.ops.local_tensors import local
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import process_group
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.processes import RankFailure, exit_code_of, run_ranks
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, losses
from megatron_retro.training.bad_steps import spike_reason
from megatron_retro.training.program import pretrain


def poisoned(settings: Settings, rank: int, sample: int, *, loss: float | None = None) -> None:
    """Train, but the step that begins with `sample` gets a NaN gradient on one rank, or another loss on all."""
    read, train_step = Loader.__next__, ParallelModel.train_step
    positions: list[int] = []

    def remembering(self: Loader) -> list[Microbatch[Array]]:
        positions.append(self.consumed_samples)
        return read(self)

    def step(self: ParallelModel, microbatches: Any, **more: Any) -> StepResult:
        result = train_step(self, microbatches, **more)
        if positions[-1] != sample:
            return result
        if loss is not None:
            return StepResult(loss * result.num_tokens, result.num_tokens, {})
        if int(os.environ.get("RANK", "0")) == rank:
            gradient = next(parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
            local(gradient).reshape(-1)[0] = float("nan")
        return result

    Loader.__next__, ParallelModel.train_step = remembering, step  # type: ignore[method-assign]
    pretrain(settings)


def test_a_nan_gradient_is_skipped_and_named(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = corpus.settings(save=str(tmp_path / "run"), train_iters=6, eval_iters=0, save_interval=2)
    assert exit_code_of(lambda: poisoned(settings, 0, sample=12)) == 0
    log = read_run_log(tmp_path / "run")
    bad = next(event for event in log.incidents if event["event"] == "bad step")
    assert bad["step"] == 4 and "norm is inf" in bad["reason"] and "12 to 15" in bad["samples"]
    assert len(log.steps) == 5 and all(np.isfinite(losses(tmp_path / "run")))
    facts = json.loads((tmp_path / "run/bad_batches/step-00000004-sample-12/rank-00000.json").read_text())
    assert facts["sample_ids"] == [12, 13, 14, 15]
    with np.load(tmp_path / "run/bad_batches/step-00000004-sample-12/rank-00000.npz", allow_pickle=False) as arrays:
        assert arrays["0.sample_ids_B"].tolist() == [12, 13] and arrays["1.tokens_BS"].shape == (2, 64)


def test_one_rank_of_two_has_a_nan_and_both_skip(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = corpus.settings(save=str(tmp_path / "run"), train_iters=5, global_batch_size=4, eval_iters=0)
    run_ranks(lambda: poisoned(settings, 1, sample=8), 2, initialize=False, timeout=100)
    log = read_run_log(tmp_path / "run")
    assert [event["step"] for event in log.incidents if event["event"] == "bad step"] == [3]
    assert sorted(path.name for path in (tmp_path / "run/bad_batches/step-00000003-sample-8").iterdir()) == [
        "rank-00000.json",
        "rank-00000.npz",
        "rank-00001.json",
        "rank-00001.npz",
    ]
    assert len(log.steps) == 4


def test_a_rollback_returns_and_passes_the_bad_step_over(corpus: TinyCorpus, tmp_path: Path) -> None:
    """The same weights as a run that skipped the same step."""
    more = {"train_iters": 8, "eval_iters": 0, "save_interval": 2}
    for policy in ("skip", "rollback"):
        settings = corpus.settings(save=str(tmp_path / policy), non_finite_policy=policy, **more)
        assert exit_code_of(lambda settings=settings: poisoned(settings, 0, sample=20)) == 0
    log = read_run_log(tmp_path / "rollback")
    assert [event["event"] for event in log.incidents] == ["bad step", "rollback"]
    assert log.saves == [2, 4, 6, 7]
    assert differences(tmp_path / "skip", tmp_path / "rollback") == []


@pytest.mark.parametrize("precision", [{}, {"fp16": True, "initial_loss_scale": 1024.0}])
def test_a_spike_is_bad_too(corpus: TinyCorpus, tmp_path: Path, precision: dict[str, Any]) -> None:
    """Also where a loss scale is at work: no scale makes a loss large."""
    facts = {"train_iters": 20, "eval_iters": 0, "loss_spike_factor": 3.0, **precision}
    settings = corpus.settings(save=str(tmp_path / "run"), **facts)
    assert exit_code_of(lambda: poisoned(settings, 0, sample=72, loss=50.0)) == 0
    bad = [event for event in read_run_log(tmp_path / "run").incidents if event["event"] == "bad step"]
    assert len(bad) == 1 and "over 3 times the recent median" in bad[0]["reason"]
    assert spike_reason(50.0, [1.0] * 15, 3.0) is None, "too few losses to tell"


def test_bad_steps_in_a_row_end_the_run(corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nan = StepResult(float("nan"), 1.0, {})
    monkeypatch.setattr(ParallelModel, "train_step", lambda self, batches, **more: nan)
    with pytest.raises(DataError, match=r"training stopped at step 1: the loss is nan"):
        pretrain(corpus.settings(train_iters=50, max_bad_steps=3, eval_iters=0))
    with pytest.raises(DataError, match="bad steps in a row: 1"):
        pretrain(corpus.settings(train_iters=50, non_finite_policy="stop", eval_iters=0))


def test_a_stopped_rank_ends_the_job_and_is_named(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = corpus.settings(
        save=str(tmp_path / "run"), train_iters=100_000, eval_iters=0, distributed_timeout_minutes=0.1
    )

    def stopped() -> None:
        if os.environ["RANK"] == "1":

            def stop_when_it_runs() -> None:
                events = tmp_path / "run/events.jsonl"
                while not (events.exists() and '"step"' in events.read_text()):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGSTOP)

            threading.Thread(target=stop_when_it_runs, daemon=True).start()
        pretrain(settings)

    with pytest.raises(RankFailure, match=r"rank 1 \(process \d+ on .*\) is dead or stopped since step \d+"):
        run_ranks(stopped, 2, initialize=False, timeout=60)
    assert "lost rank" in capfd.readouterr().err


LIMITED = """
import resource, sys
import megatron_retro.training.program
from megatron_retro.cli.main import main

pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)
sys.exit(main(["pretrain", "--config", sys.argv[1]]))
"""


def test_a_limit_of_memory_is_a_message(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Less than a thread's stack is left: no hang, no traceback. In a new process, as a fork has stacks to spare."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(render_toml(corpus.settings(save=str(tmp_path / "run"), train_iters=2, eval_iters=0)))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(recipe)], capture_output=True, text=True, timeout=120)
    said = done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said and said.count("error:") == 1 and "fix:" in said
    assert "memory ran out" in said or "no thread or process may start" in said


def test_gradients_are_means_over_all_tokens(corpus: TinyCorpus) -> None:
    """Microbatches with unequal masks: the gradient is that of one batch of all tokens."""
    settings = resolved_settings(corpus.settings(retro=False), ByteTokenizer())
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 256, (4, 64)), torch.randint(0, 256, (4, 64))
    mask = torch.rand(4, 64) < torch.tensor([[0.1], [0.9], [0.5], [1.0]])
    with process_group(find_launch({}), use_gpu=False) as device:
        model = build_parallel_model(settings, device)
        whole = model.train_step([Microbatch(tokens, labels, mask)])
        gradients = [p.grad.clone() for p in model.module.parameters() if p.grad is not None]
        model.module.zero_grad(set_to_none=True)
        parts = model.train_step([Microbatch(tokens[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.num_tokens == mask.sum()
    for one, other in zip(gradients, [p.grad for p in model.module.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
