"""A run that is stopped, preempted or killed anywhere ends bit for bit where the unbroken one ends."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_retro.config.settings import Settings
from megatron_retro.errors import ArtifactError, EnvironmentProblem, Requeue
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.processes import RankFailure, exit_code_of, fork, kill_until_done, run_ranks, wait
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, losses
from megatron_retro.training.program import pretrain

Count = Callable[[int, int], int]


def run(settings: Settings) -> None:
    assert exit_code_of(lambda: pretrain(settings)) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stopped_halfway_and_started_again(corpus: TinyCorpus, tmp_path: Path, dropout: float) -> None:
    """Dropout draws from the random states that the checkpoint holds."""
    more = {"train_iters": 10, "hidden_dropout": dropout, "attention_dropout": dropout, "lr_decay_style": "cosine"}
    run(corpus.settings(save=str(tmp_path / "whole"), **more))
    broken = corpus.settings(save=str(tmp_path / "broken"), exit_interval=4, **more)
    assert [exit_code_of(lambda: pretrain(broken)) for _ in range(3)] == [75, 75, 0]
    assert differences(tmp_path / "whole", tmp_path / "broken") == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert read_run_log(tmp_path / "broken").starts == [0, 4, 8]


def test_killed_at_random_moments(corpus: TinyCorpus, tmp_path: Path, count: Count) -> None:
    more = {"save_interval": 2, "async_save": True, "eval_interval": count(10, 200), "hidden_dropout": 0.1}
    more |= {"train_iters": count(40, 2000), "global_batch_size": count(4, 2)}  # long enough for all kills
    run(corpus.settings(save=str(tmp_path / "whole"), **{**more, "save_interval": 0}))
    settings = corpus.settings(save=str(tmp_path / "killed"), **more)
    hits = kill_until_done(lambda: pretrain(settings), count(8, 100), longest_seconds=1.5, seed=3)
    assert hits >= count(1, 95), "no kill, or not all of them, met the run alive"
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_four_ranks_of_which_one_is_killed(corpus: TinyCorpus, tmp_path: Path, count: Count) -> None:
    more = {
        "train_iters": count(6, 1200),
        "save_interval": 2,
        "global_batch_size": 8,
        "eval_iters": 0,
        "tensor_model_parallel_size": 2,
        "data_parallel_sharding": "optimizer",
    }
    whole = corpus.settings(save=str(tmp_path / "whole"), **{**more, "save_interval": 0})
    run_ranks(lambda: pretrain(whole), 4, initialize=False, timeout=800)
    settings = corpus.settings(save=str(tmp_path / "killed"), **more)
    draw = random.Random(11)
    hits = 0
    for _ in range(count(1, 100)):
        victim, moment = str(draw.randrange(4)), draw.uniform(0.3, 2.0)

        def doomed(victim: str = victim, moment: float = moment) -> None:
            if os.environ["RANK"] == victim:
                signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, moment)
            pretrain(settings)

        try:
            run_ranks(doomed, 4, initialize=False, timeout=200)
            break
        except RankFailure:
            hits += 1
    assert hits >= count(0, 95), "not all kills met the run alive"
    run_ranks(lambda: pretrain(settings), 4, initialize=False, timeout=800)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_to_be_started_again(
    corpus: TinyCorpus, tmp_path: Path, number: signal.Signals
) -> None:
    """Also when it falls into a save, which goes on in the background all the time here."""
    more = {"train_iters": 200, "save_interval": 1, "async_save": True, "eval_iters": 0}
    process = fork(lambda: pretrain(corpus.settings(save=str(tmp_path / "run"), **more)))
    wait_for(tmp_path / "run/latest.json")
    os.kill(process, number)
    assert wait(process) == 75
    log = read_run_log(tmp_path / "run")
    assert log.saves[-1] == log.steps[-1].step < 200
    settings = corpus.settings(save=str(tmp_path / "run"), **{**more, "train_iters": len(log.steps) + 3})
    run(settings)
    run(corpus.settings(save=str(tmp_path / "whole"), **{**more, "train_iters": len(log.steps) + 3}))
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_every_save_is_told_and_a_finished_run_has_nothing_to_do(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A save in the background is told once it is on disk; a second start writes no checkpoint again."""
    more = {"train_iters": 6, "save_interval": 2, "eval_iters": 0}
    for kind in (True, False):
        settings = corpus.settings(save=str(tmp_path / str(kind)), async_save=kind, **more)
        run(settings)
        assert read_run_log(tmp_path / str(kind)).saves == [2, 4, 6]
        newest = tmp_path / str(kind) / "step-00000006/manifest.json"
        written = newest.stat().st_ino
        capfd.readouterr()
        run(settings)
        assert newest.stat().st_ino == written and read_run_log(tmp_path / str(kind)).saves == [2, 4, 6]
        assert "nothing left to train: samples 24, asked for 24" in capfd.readouterr().err


def test_settings_that_change_on_going_on_are_told(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {"save": str(tmp_path / "run"), "eval_iters": 0}
    run(corpus.settings(train_iters=2, **more))
    capfd.readouterr()
    run(corpus.settings(train_iters=3, lr=5e-4, **more))
    assert "settings changed: since step 2, --train-iters 2 -> 3, --lr" in capfd.readouterr().err


def test_a_folder_for_curves_that_cannot_be_is_named(corpus: TinyCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="no folder can be made at"):
        pretrain(corpus.settings(train_iters=1, tensorboard_dir=str(tmp_path / "file/curves")))


def test_other_data_is_refused_by_name_or_taken_when_asked(corpus: TinyCorpus, tmp_path: Path) -> None:
    """The optimizer, the schedule and the count of samples go on; the place is counted in the new order."""
    more = {"save": str(tmp_path / "run"), "eval_iters": 0}
    run(corpus.settings(train_iters=2, **more))
    other = {"seed": 7, "split": "50,50,0", **more}
    with pytest.raises(ArtifactError, match=r"--split: .* there, '50,50,0' here; --seed: .* there, 7 here") as refused:
        pretrain(corpus.settings(train_iters=4, **other))
    assert "--allow-data-change" in str(refused.value)
    run(corpus.settings(train_iters=4, allow_data_change=True, **other))
    log = read_run_log(tmp_path / "run")
    assert [step.samples for step in log.steps] == [4, 8, 12, 16] and log.starts == [0, 2]
    run(corpus.settings(train_iters=5, **other))  # the new order is now the run's own


def test_the_time_limit_saves_and_uses_the_chosen_code(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = corpus.settings(
        save=str(tmp_path / "run"),
        train_iters=100_000,
        exit_duration_in_mins=0.01,
        exit_on_requeue_code=99,
        eval_iters=0,
    )
    with pytest.raises(Requeue, match=r"time limit of 0\.01 minutes is over; the state is saved") as stopped:
        pretrain(settings)
    assert stopped.value.exit_code == 99
    assert (tmp_path / "run/latest.json").exists()


def test_the_newest_checkpoint_is_damaged(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is set aside, loudly, and the one before it is taken up; the run ends in the same bits."""
    more = {"train_iters": 8, "save_interval": 2, "keep_checkpoints": 0, "eval_iters": 0}
    run(corpus.settings(save=str(tmp_path / "whole"), **more))
    broken = corpus.settings(save=str(tmp_path / "broken"), exit_interval=6, **more)
    assert exit_code_of(lambda: pretrain(broken)) == 75
    shard = tmp_path / "broken/step-00000006/shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert exit_code_of(lambda: pretrain(corpus.settings(save=str(tmp_path / "broken"), **more))) == 0
    assert "damaged checkpoint: path" in capfd.readouterr().err
    assert [path.name[:22] for path in sorted((tmp_path / "broken").glob("*.damaged-*"))] == ["step-00000006.damaged-"]
    assert read_run_log(tmp_path / "broken").starts == [0, 4]
    assert differences(tmp_path / "whole", tmp_path / "broken") == []


def test_load_refuses_another_model_and_a_damaged_checkpoint(corpus: TinyCorpus, tmp_path: Path) -> None:
    run(corpus.settings(save=str(tmp_path / "run"), train_iters=2, eval_iters=0))
    load = str(tmp_path / "run")
    with pytest.raises(ArtifactError, match="--num-layers: 2 there, 3 here"):
        pretrain(corpus.settings(load=load, num_layers=3, train_iters=2))
    with pytest.raises(ArtifactError, match="read other data, or the same in another order"):
        pretrain(corpus.settings(load=load, seed=5, train_iters=2))
    pretrain(corpus.settings(load=load, seed=5, train_iters=1, finetune=True, eval_iters=0))
    (tmp_path / "run/step-00000002/shard-00000.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000\.safetensors is missing"):
        pretrain(corpus.settings(load=load, train_iters=4))


def test_load_without_the_optimizer_goes_on_in_place_with_fresh_moments(corpus: TinyCorpus, tmp_path: Path) -> None:
    """The run that results is one like any other: broken off, it goes on with its own moments."""
    run(corpus.settings(save=str(tmp_path / "first"), train_iters=4, eval_iters=0))
    more = {"load": str(tmp_path / "first"), "train_iters": 8, "eval_iters": 0}
    run(corpus.settings(save=str(tmp_path / "with"), **more))
    more["no_load_optim"] = True
    run(corpus.settings(save=str(tmp_path / "whole"), **more))
    assert read_run_log(tmp_path / "whole").starts == [4]
    assert losses(tmp_path / "whole")[0] == losses(tmp_path / "with")[0], "the same weights and batch"
    assert losses(tmp_path / "whole")[-1] != losses(tmp_path / "with")[-1]
    broken = corpus.settings(save=str(tmp_path / "broken"), exit_interval=2, **more)
    assert [exit_code_of(lambda: pretrain(broken)) for _ in range(2)] == [75, 0]
    assert differences(tmp_path / "whole", tmp_path / "broken") == []


@pytest.mark.parametrize("size", ["pipeline_model_parallel_size", "context_parallel_size"])
def test_another_layout_goes_on_with_the_same_losses(corpus: TinyCorpus, tmp_path: Path, size: str) -> None:
    """One process, two ranks, and one process again."""
    more = {"train_iters": 6, "global_batch_size": 8, "eval_iters": 0}
    run(corpus.settings(save=str(tmp_path / "whole"), **more))
    moved = {"save": str(tmp_path / "moved"), **more}
    start, end = corpus.settings(exit_interval=2, **moved), corpus.settings(**moved)
    assert exit_code_of(lambda: pretrain(start)) == 75
    between = corpus.settings(exit_interval=4, data_parallel_sharding="optimizer", **{size: 2}, **moved)
    assert run_ranks(lambda: exit_code_of(lambda: pretrain(between)), 2, initialize=False, timeout=100) == [75, 75]
    run(end)
    assert read_run_log(tmp_path / "moved").starts == [0, 2, 4]
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
