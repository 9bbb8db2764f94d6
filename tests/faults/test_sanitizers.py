"""The C++ that reads files and arrays, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, "csrc")
from build_host import SANITIZED, SOURCES, build_host
for name, sources in (("data", SOURCES), ("retrieval", SOURCES / "retrieval")):
    build_host(Path(sys.argv[1]) / name / "_native.so", sources, SANITIZED)
"""


@pytest.mark.full
def test_no_number_leads_outside(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """gcc's sanitizers and a seeded fuzzer: clang, which libFuzzer needs, is no part of the set-up."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True)
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    options = "detect_leaks=0:allocator_may_return_null=1"
    environment = {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options}
    fuzzer, cases = str(Path(__file__).with_name("host_fuzzer.py")), str(count(200, 20_000))
    for name, wanted in (("data", "gather: DamagedFile"), ("retrieval", "bm25: answered")):
        words = [sys.executable, fuzzer, name, str(tmp_path / name / "_native.so"), "1", cases]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode == 0, done.stderr[-4000:]
        assert wanted in done.stdout
