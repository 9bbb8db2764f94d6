"""What the tests of the CUDA kernels on the host shim reach, and what they notice."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.ops import library
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.testing.cuda_shim import (
    COMPILER,
    COUNTING_VARIABLE,
    CSRC,
    CSRC_VARIABLE,
    Kernels,
    Shim,
    declared_kernels,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs csrc and a C++ compiler"),
]

COMPARISONS = Path(__file__).with_name("test_cuda_sources.py")


def comparisons() -> list[Callable[..., None]]:
    """The tests that compare kernels with formulas."""
    spec = importlib.util.spec_from_file_location("comparisons", COMPARISONS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [each for name, each in vars(module).items() if name.startswith("test_") and inspect.isfunction(each)]


def parameters_of(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Every combination that pytest would run."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for chosen in itertools.product(*(mark.args[1] for mark in marks)):
        combination: dict[str, Any] = {}
        for mark, values in zip(marks, chosen, strict=True):
            names = mark.args[0]
            combination |= {names: values} if isinstance(names, str) else dict(zip(names, values, strict=True))
        yield combination


LINES_ARE_COUNTED = "g++" in (COMPILER or "") and shutil.which("gcov") is not None


@pytest.mark.skipif(LINES_ARE_COUNTED and COUNTING_VARIABLE not in os.environ, reason="runs where lines are counted")
def test_every_kernel_in_every_type_is_run_by_a_test(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """All comparisons once more, in this process, with one order of threads: what none of them reaches fails here."""
    monkeypatch.setenv(VARIABLE, "reference")
    for test in comparisons():
        if "kernels" in inspect.signature(test).parameters:
            for parameters in parameters_of(test):
                torch.manual_seed(0)
                test(kernels=Kernels(shim.ops, "cpu"), thread_order=0, **parameters)
    assert {re.split(r"\W", name)[0] for name in shim.compiled.values()} == declared_kernels()
    assert set(shim.compiled.values()) - shim.launched() == set(), "compiled, and never executed"


def test_every_operator_has_a_cuda_side_or_is_declared_without(shim: Shim) -> None:
    operators = re.findall(r"library\.def\(\s*\"(\w+)\(", (CSRC / "operators" / "schemas.cpp").read_text())
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = {name for name in operators if has_kernel(f"megatron_retro_shim::{name}", "CPU")}
    assert len(operators) >= 11 and set(operators) - on_cuda == library.CPU_ONLY


def is_template(mangled: str) -> bool:
    """Of our own files: kernels and what they call are templates, what launches them is not."""
    name = re.search(r"_GLOBAL__N_1(\d+)", mangled)
    return name is not None and mangled[name.end() + int(name[1]) :].startswith("I")


@pytest.mark.skipif(not LINES_ARE_COUNTED, reason="needs g++ and gcov")
def test_every_line_of_every_kernel_in_every_type_runs(tmp_path: Path) -> None:
    """A kernel that was launched may have found nothing to do: gcov counts lines, by instantiation."""
    test = f"{__file__}::{test_every_kernel_in_every_type_is_run_by_a_test.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        command, env={**environment, COUNTING_VARIABLE: str(tmp_path)}, capture_output=True, check=False
    )
    assert ran.returncode == 0 and b"1 passed" in ran.stdout, ran.stdout.decode()
    kernels, never = set(), []
    for counts in sorted(tmp_path.glob("*.gcda")):
        shown = subprocess.run(
            ["gcov", "--json-format", "--stdout", counts.name], cwd=tmp_path, capture_output=True, check=True
        )
        for source in json.loads(shown.stdout)["files"]:
            for line in source["lines"] if source["file"].endswith(".cu") else ():
                function = line.get("function_name", "")
                name = re.search(rf"\d({'|'.join(declared_kernels())})I", function)
                kernels |= {name[1]} if name else set()
                if line["count"] == 0 and is_template(function):
                    never.append((Path(source["file"]).name, line["line_number"], function))
    assert kernels == declared_kernels() and never == []


def test_every_barrier_is_missed(shim: Shim, tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """Each taken out of the sources in turn: a comparison fails under one of the orders of threads."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "csrc").symlink_to(CSRC.parent / "build" / "csrc")  # the objects of all that is left as it is
    barriers = [
        (path, *match.span(1))
        for path in sorted((tmp_path / "csrc" / "operators" / "cuda").iterdir())
        for match in re.finditer(r"(__sync(?:threads|warp)\(\);)(?!.*on the shim it does)", path.read_text())
    ]
    assert len(barriers) >= 15
    random.Random(0).shuffle(barriers)
    chosen = ["-k", "shim and (norm or vocabulary or attention)"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(COMPARISONS), *chosen]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment[CSRC_VARIABLE] = str(tmp_path / "csrc")
    for path, start, stop in barriers[: count(1, len(barriers))]:
        text = path.read_text()
        path.write_text(text[:start] + ";" + text[stop:])
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        path.write_text(text)
        where = f"{path.name} line {text[:start].count(chr(10)) + 1}"
        assert ran.returncode == 1 and "AssertionError" in ran.stdout, where + ran.stdout[-2000:]


PLANTED = """
#include <cstdio>
#include "cuda_shim.h"
__global__ void reversed(const float* from, float* to, bool with_barrier, bool stuck, bool unwritten) {
  float* shared = shim::running()->shared.data();
  if (!unwritten || threadIdx.x != 5) shared[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) __syncthreads();
  if (stuck && threadIdx.x == 0) __syncthreads();
  if (stuck && threadIdx.x > 0 && threadIdx.x < 32) __syncwarp();
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
int main(int, char** words) {
  float from[64], to[64];
  const auto is = [&](int word) { return words[word][0] == '1'; };
  for (int i = 0; i < 64; ++i) from[i] = float(i);
  try {
    shim::launch(1, 64, 64 * 4, [&] { reversed(from, to, is(1), is(2), is(3)); });
  } catch (const std::exception& problem) {
    return std::puts(problem.what()), 3;
  }
  for (int i = 0; i < 64; ++i)
    if (!(to[i] == float(63 - i))) return 1;
  return 0;
}
"""


def test_the_shim_notices_a_missing_barrier_a_deadlock_and_memory_never_written(tmp_path: Path) -> None:
    source, program = tmp_path / "planted.cpp", tmp_path / "planted"
    source.write_text(PLANTED)
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-w", f"-I{CSRC / 'shim'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)

    def exit_code(*words: str, seed: int = 0) -> int:
        environment = {"MEGATRON_RETRO_SHIM_SEED": str(seed)}
        return subprocess.run([program, *words], env=environment, capture_output=True, check=False).returncode

    assert [exit_code("1", "0", "0", seed=seed) for seed in range(4)] == [0] * 4
    assert any(exit_code("0", "0", "0", seed=seed) == 1 for seed in range(4))
    assert exit_code("1", "1", "0") == 3
    assert exit_code("1", "0", "1") == 1
