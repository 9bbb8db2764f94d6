"""`--executor ray` on a real Ray of several nodes on this machine; whoever dies, the bytes are those of one process."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_retro.cli.executors import job, workers
from megatron_retro.cli.main import main
from megatron_retro.data.preprocessing import job as preprocessing
from megatron_retro.runtime import environment
from megatron_retro.testing.corpora import random_text, write_json_lines
from megatron_retro.testing.preprocessing_runs import SCRIPT, files, start
from megatron_retro.testing.retrieval_projects import CHUNK, echoing_documents, write_corpus

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray; pip install ray")


@contextmanager
def started_cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes, whose workers are not put behind all else that this machine does."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            started.add_node(num_cpus=1)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One of all tests; the last of them kills a node."""
    with started_cluster() as started:
        yield started


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text of many small blocks."""
    monkeypatch.setattr(workers, "PROGRAM", (sys.executable, "-c", SCRIPT))
    monkeypatch.setattr(preprocessing, "SMALLEST_BLOCK", 30000)
    monkeypatch.setattr(job, "POLL_SECONDS", 0.3)
    generator = random.Random(1)
    return write_json_lines(tmp_path / "a.jsonl", [{"text": random_text(generator, 150)} for _ in range(600)])


def on_each_look(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something while the workers are watched."""
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=lambda seconds: (act(), time.sleep(seconds))))


def worker_processes(prefix: Path) -> list[int]:
    """Those of a run."""
    found = subprocess.run(["pgrep", "-f", f"output-prefix {prefix} .*--shard"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split() if int(word) != os.getpid()]


def preprocess(source: Path, prefix: Path, address: str) -> int:
    words = ["preprocess", "--input", str(source), "--output-prefix", str(prefix), "--append-eod"]
    return main([*words, "--executor", "ray", "--ray-address", address])


@needs_ray
def test_an_index_and_a_table_are_built(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "POLL_SECONDS", 0.3)
    corpus = write_corpus(tmp_path / "corpus", echoing_documents(3, 80))
    words = ["build-retrieval", "--retro-database-corpus", corpus, "--retro-index-str", "IVF8,Flat"]
    words += ["--retro-chunk-length", str(CHUNK), "--retro-embedder-dimension", "64", "--retro-block-size", "60"]
    words += ["--retro-tasks", "plan", "train", "encode", "merge", "query"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*words, "--retro-project-dir", str(here)]) == 0, capfd.readouterr().err
    on_ray = ["--executor", "ray", "--ray-address", cluster.address]
    assert main([*words, "--retro-project-dir", str(there), *on_ray]) == 0, capfd.readouterr().err
    assert "started 2 workers" in capfd.readouterr().err
    for made in ("index/merged", "neighbors/corpus"):
        names = sorted(path.name for path in (here / made).iterdir())
        assert names == sorted(path.name for path in (there / made).iterdir())
        names.remove("manifest.json")  # it says when it was written
        assert all((here / made / name).read_bytes() == (there / made / name).read_bytes() for name in names)


@needs_ray
def test_a_worker_and_a_node_are_killed(
    cluster: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix, victims = tmp_path / "o", list[str]()

    def kill() -> None:
        if not victims and (running := worker_processes(prefix)) and list(tmp_path.glob("o.unfinished/joined/*")):
            os.kill(running[0], signal.SIGKILL)
            victims.append("worker")
        elif len(victims) == 1:
            cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
            victims.append("node")

    on_each_look(monkeypatch, kill)
    assert preprocess(source, prefix, cluster.address) == 0, capfd.readouterr().err
    assert victims == ["worker", "node"]
    assert start(tmp_path / "whole", source, "--workers", "1").wait() == 0
    assert files(prefix) == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("o.*")) == [] and worker_processes(prefix) == []


@needs_ray
@pytest.mark.full
def test_the_head_is_killed(source: Path, tmp_path: Path) -> None:
    """With all nodes and whoever watched; the same command goes on without Ray."""
    with started_cluster() as cluster:
        check_killed_head(cluster, source, tmp_path)


def check_killed_head(cluster: Any, source: Path, tmp_path: Path) -> None:
    words = ["--executor", "ray", "--ray-address", cluster.address]
    run = start(tmp_path / "o", source, *words)
    while not list(tmp_path.glob("o.unfinished/joined/*")):
        assert run.poll() is None, run.communicate()
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    for node in list(cluster.worker_nodes):
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    run.kill()
    run.wait()
    assert start(tmp_path / "o", source, "--workers", "1").wait() == 0
    assert start(tmp_path / "whole", source, "--workers", "1").wait() == 0
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_without_ray_one_message_names_the_extra(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _: None)
    assert preprocess(source, tmp_path / "o", "127.0.0.1:1") == 2
    assert "pip install 'megatron-retro[ray]'" in capfd.readouterr().err
