"""Worker numbers, progress, events, tables."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.errors import ConfigError, EnvironmentProblem, Requeue
from megatron_retro.runtime import environment
from megatron_retro.runtime.console import Progress, readable_bytes, readable_seconds, render_table
from megatron_retro.runtime.events import EventLog, read_events
from megatron_retro.runtime.launch import Launch, Worker, this_replica, this_worker
from megatron_retro.runtime.signals import until_stopped
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import json_text, number_of


@pytest.mark.parametrize(
    ("variables", "worker"),
    [
        ({}, Worker(0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, Worker(3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}, Worker(3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Worker(1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Worker(1, 2)),
    ],
)
def test_every_launcher_gives_the_same_numbers(variables: dict[str, str], worker: Worker) -> None:
    assert this_worker(None, variables) == worker


def test_the_flag_wins_and_is_checked() -> None:
    assert this_worker("2/5", {"SLURM_PROCID": "0", "SLURM_NTASKS": "9"}) == Worker(2, 5)
    for wrong in ("5/5", "x", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="i/N"):
            this_worker(wrong, {})


def test_replicas_of_a_launch_are_workers() -> None:
    """Tensor ranks are neighbours, stages are outermost; an array or --shard divides the work before."""

    def replicas(tensor: int, pipeline: int, shard: str | None, variables: dict[str, str]) -> list[Worker]:
        launches = [Launch("torchrun", rank, 8, rank, 8, "127.0.0.1", 1) for rank in range(8)]
        return [this_replica(shard, launch, tensor, pipeline, variables) for launch in launches]

    assert replicas(1, 1, None, {}) == [Worker(rank, 8) for rank in range(8)]
    assert replicas(2, 2, None, {}) == [Worker(number, 2) for number in (0, 0, 1, 1, 0, 0, 1, 1)]
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
    assert replicas(4, 1, None, array) == [Worker(number, 6) for number in (4, 4, 4, 4, 5, 5, 5, 5)]
    assert replicas(4, 2, "1/3", {}) == [Worker(1, 3)] * 8
    assert set(replicas(1, 1, "1/3", {})) == {Worker(1, 3)}, "each process was told its own"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_cover_everything_once(count: int) -> None:
    covered = [item for index in range(count) for item in Worker(index, count).share(23)]
    assert covered == list(range(23))


def test_progress_says_rate_and_remaining_time() -> None:
    stream = io.StringIO()
    progress = Progress("reading", 100, "lines", stream)
    progress._start -= 10
    progress.done = 50
    progress._show("", end="\n")
    assert stream.getvalue() == "reading: 50/100 lines  5/s  10s left\n"


def test_readable_figures() -> None:
    assert readable_bytes(1.37e12) == "1.4 TB"
    assert [readable_seconds(value) for value in (3.21, 75, 3725)] == ["3.2s", "1m15s", "1h02m"]


def test_table_aligns() -> None:
    assert render_table(("name", "n"), [("a", 1), ("long", 10)]) == "name   n\n----  --\na      1\nlong  10"


def strictly_read(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, np.float64("-inf"))], "b": {"c": True, "d": None, "e": "NaN"}}
    read = strictly_read(json_text(value))
    assert read == {"a": [1.5, None, [None, None]], "b": {"c": True, "d": None, "e": "NaN"}}
    assert json_text({"b": 0.1, "a": "ü"}, sort_keys=True, ensure_ascii=False) == '{"a": "ü", "b": 0.1}'
    interval = Interval.from_json(strictly_read(json_text(Interval(0.5, math.nan, math.inf).to_json())))
    assert interval.mean == 0.5 and math.isnan(interval.low) and not interval.above_zero
    assert number_of("inf") == math.inf  # as older logs have it


def test_events_survive_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("step", loss=float("nan"), step=1)
    log.write("save", step=2)
    log.close()
    with path.open("a") as stream:
        stream.write('{"event": "st')
    assert [event["step"] for event in read_events(path)] == [1, 2]
    assert [event["loss"] for event in read_events(path, "step")] == [None]
    strictly_read(path.read_text().splitlines()[0])
    again = EventLog(path)  # the run goes on
    again.write("step", loss=1.0, step=3)
    again.close()
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]


def test_an_absent_package_is_named_with_its_extra() -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"FP8 needs the package transformer-engine(.|\n)*megatron-retro\[gpu\]"
    ):
        environment.require("transformer_engine", "FP8")


def test_two_faiss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version_of", lambda *names: None if "faiss-gpu" in names else "1.0")
    with pytest.raises(EnvironmentProblem, match="faiss-cpu and faiss-gpu-cu12 are both installed"):
        environment.require("faiss", "search")


def test_a_stop_comes_at_a_block_s_end_or_while_waiting_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one that came before anybody listened, which a launcher has kept."""

    def finished(stop_in: str) -> list[int]:
        def blocks() -> Iterator[int]:
            for number in range(4):
                if stop_in == f"waiting for {number}":
                    signal.raise_signal(signal.SIGUSR1)
                yield number

        done: list[int] = []
        before = signal.getsignal(signal.SIGUSR1)
        with pytest.raises(Requeue, match=r"SIG(USR1|TERM) arrived; finished blocks are kept"):
            for number in until_stopped(blocks()):
                if stop_in == f"in {number}":
                    signal.raise_signal(signal.SIGTERM)
                done.append(number)
        assert signal.getsignal(signal.SIGUSR1) == before
        return done

    assert finished("in 2") == [0, 1, 2]
    assert finished("waiting for 2") == [0, 1]
    (tmp_path / "stop").write_text("USR1 n3\n")
    monkeypatch.setenv("MEGATRON_RETRO_ENDINGS", str(tmp_path))
    assert finished("never") == [0]
