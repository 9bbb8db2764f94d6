"""`--executor slurm` on a real SLURM: the bytes of one process, whoever watches or dies."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_retro.cli.executors import job, slurm_array, workers
from megatron_retro.cli.main import main
from megatron_retro.data.preprocessing import job as preprocessing
from megatron_retro.testing.corpora import random_text, write_json_lines
from megatron_retro.testing.preprocessing_runs import SCRIPT, files, start
from megatron_retro.testing.slurm import Cluster

pytestmark = pytest.mark.long


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which this process submits to the cluster, workers with small blocks."""
    for name, value in cluster.shell_environment({}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "PROGRAM", (sys.executable, "-c", SCRIPT))
    monkeypatch.setattr(preprocessing, "SMALLEST_BLOCK", 30000)
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each array."""
    found, submit = list[int](), slurm_array.SlurmArray.start
    monkeypatch.setattr(slurm_array.SlurmArray, "start", lambda self: (found.append(1), submit(self)))
    return found


def preprocess(source: Path, *more: str) -> int:
    words = ["preprocess", "--input", str(source), "--output-prefix", "o", "--append-eod", "--workers", "1"]
    return main([*words, "--executor", "slurm", "--executor-workers", "3", *more])


def interrupted_when(condition: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches is interrupted, once, when a condition holds."""

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if condition():
            monkeypatch.setattr(job, "time", time)
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=sleep))


def test_a_watcher_leaves_a_node_dies_and_the_same_command_goes_on(
    cluster: Cluster,
    here: Path,
    submitted: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    generator = random.Random(1)
    source = write_json_lines(here / "a.jsonl", [{"text": random_text(generator, 150)} for _ in range(3000)])
    interrupted_when(lambda: list(here.glob("o.unfinished/*.json")), monkeypatch)
    assert preprocess(source, "--sbatch-options=--exclusive") == 130  # one worker on each node
    assert "scancel --name=preprocess-" in capfd.readouterr().err
    cluster.kill_node("n0")
    cluster.start_node("n0")
    assert preprocess(source) == 0, capfd.readouterr().err
    assert start(here / "whole", source, "--workers", "1").wait() == 0
    assert files(here / "o") == files(here / "whole")
    assert submitted == [1] and sorted(path.name for path in here.glob("o.*")) == []
    assert preprocess(source) == 0 and submitted == [1]


def test_what_a_worker_or_sbatch_refuses_is_said(
    here: Path, submitted: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    source = here / "a.jsonl"
    source.write_text('{"text": 1}\n')
    assert preprocess(source) == 2
    said = capfd.readouterr().err
    assert "a worker ended with code 2" in said and "line 1" in said and "worker-" in said
    assert preprocess(source, "--sbatch-options=--partition=none") == 2
    assert "sbatch refuses the workers" in capfd.readouterr().err
    assert submitted == [1, 1]


def test_an_index_is_built(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_json_lines(here / "a.jsonl", [{"text": random_text(random.Random(2), 150)} for _ in range(40)])
    assert start(here / "o", source, "--workers", "1").wait() == 0
    words = ["build-retrieval", "--retro-database-corpus", "o_text_document", "--retro-index-str", "Flat"]
    words += ["--retro-tasks", "plan", "train", "encode", "merge", "query", "--retro-block-size", "64"]
    for name, flags in (("one", []), ("many", ["--executor", "slurm", "--executor-workers", "2"])):
        assert main([*words, "--retro-project-dir", name, *flags]) == 0, capfd.readouterr().err
    tables = [sorted((here / name).glob("neighbors/*/*.ids")) for name in ("one", "many")]
    assert tables[0] and [path.read_bytes() for path in tables[0]] == [path.read_bytes() for path in tables[1]]


def test_without_sbatch_one_line_says_it(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n')
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "o"), "--executor", "slurm"]
    command = [sys.executable, "-m", "megatron_retro.cli.main", "preprocess", *words]
    run = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False, cwd=Path.cwd())
    assert run.returncode == 2 and "needs sbatch" in run.stderr
