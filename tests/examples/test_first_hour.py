"""The first hour on a GPU: every step's outcome stands in the file, and none stops the others."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "first_hour"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs benchmarks")


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("outcomes", "steps")}
    sys.path.remove(str(FOLDER))
    for name in ("outcomes", "steps"):
        del sys.modules[name]


def test_every_outcome_stands_in_the_file_and_stops_nothing(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    outcomes, marker = parts["outcomes"], tmp_path / "lives"

    def works(stage: Any) -> dict[str, Any]:
        return {"answer": float(stage.python("-c", "print(42)"))}

    def fails(stage: Any) -> dict[str, Any]:
        stage.python("-c", "print('a'); print('the last line'); raise SystemExit(3)")
        return {}

    def hangs(stage: Any) -> dict[str, Any]:
        child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
        stage.python(
            "-c",
            f"import subprocess, sys; print('at work', flush=True); subprocess.run([sys.executable, '-c', {child!r}])",
        )
        return {}

    def skips(stage: Any) -> dict[str, Any]:
        raise outcomes.Skip("not here")

    def breaks(stage: Any) -> dict[str, Any]:
        raise KeyError("x")

    work = {"hangs": hangs, "works": works, "fails": fails, "skips": skips, "breaks": breaks}
    steps = [outcomes.Step(name, 1.5 if name == "hangs" else 30.0, each) for name, each in work.items()]
    result = tmp_path / "first.json"
    outcomes.run_steps(steps, tmp_path / "room", {"date": "today"}, result, gpu=False, seconds=60.0)
    content = json.loads(result.read_text())
    assert content["date"] == "today" and content["complete"]
    found = {step["name"]: step for step in content["steps"]}
    kinds = {"works": "ok", "fails": "failed", "hangs": "timed out", "skips": "skipped", "breaks": "failed"}
    assert {name: step["outcome"] for name, step in found.items()} == kinds
    assert found["works"]["figures"] == {"answer": 42.0}
    assert "ended with 3" in found["fails"]["reason"] and found["fails"]["reason"].endswith("a\nthe last line")
    assert found["skips"]["reason"] == "not here" and "KeyError" in found["breaks"]["reason"]
    assert found["hangs"]["seconds"] < 10
    time.sleep(2.0)
    assert not marker.exists(), "what a step started outlives it"


def test_the_time_of_all_is_a_limit(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    outcomes = parts["outcomes"]
    steps = [outcomes.Step("late", 30.0, lambda stage: {})]
    found = outcomes.run_steps(steps, tmp_path / "room", {}, tmp_path / "first.json", gpu=False, seconds=0.5)
    assert [(each.outcome, each.reason) for each in found] == [("skipped", "the time of all steps is over")]


def test_no_test_that_passed_is_a_failure(parts: dict[str, ModuleType]) -> None:
    steps = parts["steps"]
    assert steps.counted("..s\n2 passed, 1 skipped in 0.1s") == {"passed": 2, "skipped": 1}
    with pytest.raises(parts["outcomes"].Failure, match="no test ran"):
        steps.counted("270 skipped in 0.1s")


def test_what_a_step_took_is_summed_by_kernel(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    events = [("kernel", "gemm", 1500), ("cpu_op", "aten::mm", 9000), ("kernel", "norm", 200), ("kernel", "gemm", 500)]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [{"cat": c, "name": n, "dur": d} for c, n, d in events] + [{}]}))
    assert parts["steps"].longest(trace) == [("gemm", 2.0), ("norm", 0.2)]


def test_on_a_cpu_it_runs_what_a_cpu_can(tmp_path: Path) -> None:
    """The script itself: a step of a Retro with its plan, and reasons where a GPU is needed."""
    result = tmp_path / "first.json"
    names = ("build", "sanitizer", "training_step")
    command = [str(ROOT / "benchmarks" / "first_hour.sh"), "--cpu", "--json", str(result), "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(result.read_text())
    build, sanitizer, step = content["steps"]
    assert build["outcome"] == sanitizer["outcome"] == "skipped" and sanitizer["reason"] == "there is no GPU"
    assert step["outcome"] == "ok", step["reason"]
    figures = step["figures"]
    assert figures["planned_bytes"] > 4 * 4 * figures["parameters"] and figures["tokens_per_second"] > 0
    assert all(5.0 < loss < 8.0 for loss in figures["losses"]) and figures["longest"] and figures["kernels"]
    assert {"date", "hardware", "versions"} <= set(content)


def test_a_gpu_that_torch_cannot_use_is_no_cpu(tmp_path: Path) -> None:
    """A driver that is older than torch's CUDA: the committed figures of a CPU would have been written over."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    program.chmod(0o755)
    command = [sys.executable, str(FOLDER / "program.py"), "--only", "build", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "cannot use GPU 0: NVIDIA H200" in done.stderr
    assert not (tmp_path / "found.json").exists()
