"""Slow ranks are named, falling throughput is told, lines come in time, and waiting is counted apart from computing."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_retro.data.dataset import Dataset
from megatron_retro.reporting.run_page import write_report
from megatron_retro.runtime.console import warn
from megatron_retro.runtime.heartbeat import Beat, Heartbeat, Pace
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import process_group
from megatron_retro.runtime.run_log import read_rank_steps, read_run_log
from megatron_retro.runtime.run_records import RunFacts, StepRecord
from megatron_retro.testing.processes import exit_code_of, run_ranks
from megatron_retro.testing.tiny_corpus import TinyCorpus
from megatron_retro.training import console_lines, watches
from megatron_retro.training.clock import Clock
from megatron_retro.training.console_lines import ConsoleLines
from megatron_retro.training.observers import GarbageCollection
from megatron_retro.training.program import pretrain
from megatron_retro.training.watches import FallingThroughput, SlowRanks, slow_ranks

# Stops a process three quarters of the time, until it is gone.
STOPPER = """
import os, signal, sys, time
try:
    while True:
        os.kill(int(sys.argv[1]), signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(int(sys.argv[1]), signal.SIGCONT)
        time.sleep(0.05)
except ProcessLookupError:
    pass
"""


def step(number: int, seconds: float = 0.1, **more: Any) -> StepRecord:
    known: dict[str, Any] = {"samples": 4 * number, "batch_size": 4, "positions": 400, "loss": 2.0}
    return StepRecord(number, **{**known, "gradient_norm": 1.0, "learning_rate": 1e-3, **more}, seconds={"a": seconds})


def beats(*computing: float) -> list[Beat]:
    return [Beat(rank, 1, 1, "data", "host", 100 + rank, Pace(one, 0.1)) for rank, one in enumerate(computing)]


def test_a_rank_is_slow_against_those_that_do_the_same_work() -> None:
    assert slow_ranks(beats(1.0, 1.19, 1.0)) == {}
    assert slow_ranks(beats(1.0, 1.25, 1.0)) == {1: 1.0}
    assert slow_ranks(beats(1.0, 1.25)) == {1: 1.0}, "of two, the quicker one is the measure"
    assert slow_ranks(beats(1.0, 0.0, 9.0)) == {}, "one has not told its pace yet"
    assert slow_ranks(beats(9.0)) == {}, "nobody to compare with"


def test_a_slow_rank_is_named_once_and_a_heavy_stage_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "CHECK_SECONDS", 0.0)
    told: list[str] = []
    looks = iter([beats(1, 1, 3, 3), beats(1, 1, 3, 4), beats(1, 1, 3, 4), beats(1, 1, 3, 4), *[beats(1, 1, 3, 3)] * 3])

    class Looks:
        def everyone(self) -> list[Beat]:
            return next(looks)

    def tell(event: str, facts: dict[str, Any]) -> None:
        told.append(f"{event}: {facts['rank']}, {facts['place']}")

    watch = SlowRanks(cast(Heartbeat, Looks()), 2, tell)
    for number in range(7):
        watch.stepped(step(number))
    assert told == ["slow rank: 3, process 103 on host"]


def test_throughput_that_falls_by_a_third_is_told_once() -> None:
    told: list[dict[str, Any]] = []
    watch = FallingThroughput(lambda event, facts: told.append({"event": event, **facts}))
    paces: Iterable[float] = [*[0.1] * 40, 5.0, *[0.1] * 10, *[0.14] * 20, *[0.1] * 20, *[0.2] * 20]
    for number, seconds in enumerate(paces, 1):
        watch.stepped(step(number, seconds))
    assert [one["event"] for one in told] == ["throughput fell"], "neither a single slow step nor a fall by a quarter"
    assert told[0]["step"] == 97 and told[0]["tokens per second"] == "2k" and told[0]["usual"] == "4k"


def test_a_line_says_what_a_person_asks_at_night(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console_lines.time, "monotonic", lambda: now[0])
    lines = ConsoleLines(interval=100, show_throughput=True)
    facts = RunFacts(world_size=2, flops_per_token=1e9, peak_flops=1e12, total_samples=1000)
    lines.started(facts, 0)
    for number in range(1, 61):
        now[0] += 1.0
        lines.stepped(step(number, 0.2, waiting_seconds=0.05, memory_bytes=5_000_000))
    told = [line for line in capsys.readouterr().err.splitlines() if "  step " in line]
    assert [re.findall(r"step (\d+)/250", line) for line in told] == [["30"], ["60"]], "30 seconds without a line"
    pattern = r"\d\d-\d\d \d\d:\d\d:\d\d  step 60/250  200 ms/step  2k tokens/s \([+-]0%\)  100.0% of peak"
    assert re.match(pattern, told[1])
    for part in ("waits for ranks 25.0%", "loss 2.0000", "5.0 MB", "38s left"):
        assert part in told[1], part


def test_waiting_is_counted_where_it_happens() -> None:
    """The late rank computes, the early one waits; a thread's collectives are its own."""

    def late(rank: int) -> tuple[float, float]:
        other = dist.new_group(backend="gloo")
        dist.barrier()  # both begin together, and are connected
        clock = Clock()
        with clock.counting_waits():
            thread = threading.Thread(target=lambda: dist.barrier(other))
            if rank == 0:
                thread.start()  # waits a whole second in the background
            clock.lap()
            time.sleep(0.5 * rank)
            dist.all_reduce(torch.zeros(1))
            lap = clock.lap()
            time.sleep(0.5 * rank)
            if rank:
                thread.start()
            thread.join()
        return sum(lap.seconds.values()), lap.waiting

    (first, waited), (second, hardly) = run_ranks(lambda: late(dist.get_rank()), 2)
    assert first == pytest.approx(second, abs=0.25) and waited > 0.3 and hardly < 0.2


@pytest.mark.parametrize("world_size", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (4, 8))])
def test_a_rank_that_is_stopped_most_of_the_time_is_named(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(watches, "CHECK_SECONDS", 0.5)
    victim = world_size - 1
    more = {"global_batch_size": 8, "train_iters": 28, "eval_iters": 0, "log_interval": 2}
    settings = corpus.settings(save=str(tmp_path / "run"), **more)

    def work() -> None:
        stopper = None
        if find_launch().rank == victim:
            stopper = subprocess.Popen([sys.executable, "-c", STOPPER, str(os.getpid())])
        pretrain(settings)
        if stopper is not None:
            stopper.kill()

    run_ranks(work, world_size, initialize=False, timeout=200)
    named = [event["rank"] for event in read_run_log(tmp_path / "run").incidents if event["event"] == "slow rank"]
    assert named[:1] == [victim]
    steps = read_rank_steps(tmp_path / "run")
    computing = {rank: sum(one.computing_seconds for one in steps[rank][2:]) for rank in range(world_size)}
    waiting = {rank: sum(one.waiting_seconds for one in steps[rank][2:]) for rank in range(world_size)}
    assert max(computing, key=lambda rank: computing[rank]) == victim == min(waiting, key=lambda rank: waiting[rank])
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"The newest steps of {world_size} ranks" in text and "slow rank" in text


def test_what_all_ranks_would_say_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with process_group(find_launch()):
            warnings.showwarning = lambda message, *rest: print(message, file=sys.stderr)  # type: ignore[assignment]
            warn("of ours")
            warnings.warn("of a library", stacklevel=1)
            dist.barrier()

    run_ranks(work, 3, initialize=False)
    told = capfd.readouterr().err
    assert told.count("of ours") == 1 and told.count("of a library") == 1


def test_garbage_is_collected_between_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 1)  # as in a forked process: nothing is thawed after it
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(collected)))
    observer = GarbageCollection(3)
    observer.started(RunFacts(), 0)
    assert not gc.isenabled()
    for number in range(1, 8):
        observer.stepped(step(number))
    assert len(collected) == 2
    observer.ended()
    assert gc.isenabled()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_loader_that_hangs_is_named_by_a_process_that_is_alone(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str], threads: int
) -> None:
    """With the code of a lost rank: the same command goes on."""
    settings = corpus.settings(
        save=str(tmp_path / "run"), train_iters=4, eval_iters=0, distributed_timeout_minutes=0.02, num_workers=threads
    )

    def hanging() -> None:
        read = Dataset.read

        def slow(self: Dataset, numbers: Any) -> Any:
            if 9 in numbers:
                time.sleep(60)
            return read(self, numbers)

        Dataset.read = slow  # type: ignore[method-assign]
        pretrain(settings)

    assert exit_code_of(hanging) == 76
    said = capfd.readouterr().err
    assert "the loader hangs: samples 8 to 11 did not come" in said and str(corpus.tokens) in said
    assert "Traceback" not in said and exit_code_of(lambda: pretrain(settings)) == 0
