"""Kills of any worker, raylet or head of a Ray at random moments: the same command goes on, to the same bytes.

`pytest --full tests/cli/test_ray_kills.py` kills a hundred times and writes `tests/results/ray_kills.json`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.testing.corpora import random_text, write_json_lines
from megatron_retro.testing.preprocessing_runs import files
from tests.faults.injection import ROOT, commit, seconds_since

SEED, KILLS, RESULTS = 20, 100, ROOT / "tests/results/ray_kills.json"
LONGEST_WAIT = 15.0  # before a kill: longer than an undisturbed run
VICTIMS = {"worker": 6, "raylet": 3, "head": 1}  # how many of ten kills
COMMAND = """
import sys, time
from megatron_retro.cli.executors import job as executors, workers
from megatron_retro.data.preprocessing import appending, blocks, job
job.SMALLEST_BLOCK = appending.APPENDED_BYTES = 30000
executors.POLL_SECONDS = 0.3
workers.PROGRAM = (sys.executable, __file__)
tokenize = blocks.BlockTokenizer.tokenize
blocks.BlockTokenizer.tokenize = lambda *words: (time.sleep(0.3), tokenize(*words))[1]
from megatron_retro.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes; a node that misses its head gives up after 20 seconds."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "20"  # noqa: SIM112  # Ray spells it so
    os.environ["RAY_enable_worker_prestart"] = os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            add_node(started)
        yield started
    finally:
        started.shutdown()


def add_node(cluster: Any, tries: int = 5) -> None:
    """A node of one CPU; on a crowded machine it may miss Ray's half minute for its start."""
    for left in reversed(range(tries)):
        try:
            cluster.add_node(num_cpus=1, wait=False)
            return
        except Exception:
            if not left:
                raise


class Killer:
    """Runs of one command on Ray, in which something is killed until so many kills are done."""

    def __init__(self, folder: Path, dice: random.Random, most: int) -> None:
        self.folder, self.dice, self.most = folder, dice, most
        self.kills, self.ended, self.starts = Counter[str](), 0, 0
        (folder / "command.py").write_text(COMMAND)
        lines = [{"text": random_text(dice, 150)} for _ in range(300)]
        self.source = write_json_lines(folder / "a.jsonl", lines)
        assert self.start(folder / "whole", "--workers", "1").wait() == 0

    def start(self, prefix: Path, *flags: str) -> subprocess.Popen[bytes]:
        """The command, its words to a file."""
        words = ("preprocess", "--input", str(self.source), "--output-prefix", str(prefix), "--append-eod", *flags)
        self.starts += 1
        with open(f"{prefix}.said", "ab") as said:
            return subprocess.Popen([sys.executable, str(self.folder / "command.py"), *words], stdout=said, stderr=said)

    def runs(self) -> Iterator[Path]:
        """The outputs of runs that ended, on one cluster after another: with its head, each is gone."""
        prefix, code = self.folder / "run-000", 1
        while code or self.kills.total() < self.most:
            with cluster() as ray:
                lives = True
                while lives:
                    code, lives = self._run_on(ray, prefix)
                    if code == 0:
                        self.ended += 1
                        yield prefix
                        prefix = self.folder / f"run-{self.ended:03d}"
                        lives = lives and self.kills.total() < self.most

    def _run_on(self, ray: Any, prefix: Path) -> tuple[int, bool]:
        """The code of the command, which is given again until it is done or the head is gone; whether that lives."""
        run = self.start(prefix, "--executor", "ray", "--ray-address", ray.address)
        while True:
            try:
                code = run.wait(self.dice.uniform(0, LONGEST_WAIT))
                if code == 0:
                    return 0, True
                run = self.start(prefix, "--executor", "ray", "--ray-address", ray.address)
            except subprocess.TimeoutExpired:
                if self.kills.total() < self.most and self._kill(ray, prefix) == "head":
                    return run.wait(300), False

    def _kill(self, ray: Any, prefix: Path) -> str | None:
        """Kill one of a kind that lives."""
        kind = self.dice.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        running = worker_processes(prefix)
        node = self.dice.choice(sorted(ray.worker_nodes, key=id))
        victims = {
            "worker": self.dice.sample(running, min(1, len(running))),
            "raylet": daemons(node, "raylet"),
            "head": [*daemons(ray.head_node, "gcs_server"), *daemons(ray.head_node, "raylet")],
        }[kind]
        try:
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            victims = []
        if kind == "raylet":
            ray.remove_node(node, allow_graceful=False)
            add_node(ray)
        if not victims:
            return None
        self.kills[kind] += 1
        print(f"{time.strftime('%X')} {kind}: {self.kills.total()} kills, {self.ended} runs ended", flush=True)
        return kind


def daemons(node: Any, kind: str) -> list[int]:
    """Process ids of a node's daemons of a kind."""
    return [daemon.process.pid for daemon in node.all_processes.get(kind, [])]


def worker_processes(prefix: Path) -> list[int]:
    """Those of a run."""
    found = subprocess.run(["pgrep", "-f", f"output-prefix {prefix} .*--shard"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray; pip install ray")
def test_whoever_is_killed_the_bytes_are_the_same(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    start, killer = time.monotonic(), Killer(tmp_path, random.Random(SEED), count(KILLS, KILLS))
    expected, others = files(tmp_path / "whole"), list[Path]()
    for prefix in killer.runs():
        left = [path.name for path in tmp_path.glob(f"{prefix.name}.*") if path.suffix != ".said"]
        others += [prefix] if files(prefix) != expected or left or worker_processes(prefix) else []
        row = {
            "kills": dict(killer.kills),
            "runs that ended": killer.ended,
            "starts of the command": killer.starts - 1,
            "not byte-equal, or something left": len(others),
        }
        facts = {"seed": SEED, "commit": commit(), "seconds": seconds_since(start), **row}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(facts, flush=True)
    assert not others
