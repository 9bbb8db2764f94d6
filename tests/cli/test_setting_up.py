"""Setting up: what is missing is said in one message, and a missing compiler costs speed only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(target / "temp")]
    return subprocess.run(
        words, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = build(tmp_path / "out", PATH=str(tmp_path / "empty"), CXX="")
    assert done.returncode == 0, done.stderr
    for name in ("megatron_retro.ops._operators", "megatron_retro.data._native", "megatron_retro.retrieval._native"):
        assert f"{name} left out: " in done.stdout + done.stderr
    assert list(tmp_path.glob("out/**/*.so")) == []


def test_a_compiler_that_refuses_the_sources_is_an_error_with_its_words(tmp_path: Path) -> None:
    compiler = executable(tmp_path / "broken-cxx", 'echo "unknown dialect of C++" >&2; exit 1')
    done = build(tmp_path / "out", CXX=str(compiler))
    assert done.returncode != 0
    assert "unknown dialect of C++" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["tests/run.sh", "examples/quickstart.sh"])
def test_both_commands_explain_their_flags_without_setting_anything_up(tmp_path: Path, script: str) -> None:
    environment = {**os.environ, "MEGATRON_RETRO_VENV": str(tmp_path / "environment")}
    command = ["bash", str(REPOSITORY / script), "--help"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--setup-only   stop after the set-up" in done.stdout
    assert not (tmp_path / "environment").exists()


@pytest.mark.parametrize("script", ["tests/run.sh", "examples/quickstart.sh"])
def test_an_old_python_is_one_message(tmp_path: Path, script: str) -> None:
    body = 'case "$*" in *version_info*) exit 1 ;; *--version*) echo "Python 3.8.1" ;; *) exit 3 ;; esac'
    executable(tmp_path / "python3", body)
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment = {
        **kept,
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "MEGATRON_RETRO_VENV": str(tmp_path / "environment"),
    }
    done = subprocess.run(
        ["bash", str(REPOSITORY / script), "--setup-only"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: Python 3.10 or newer is needed; got: Python 3.8.1"
    assert not (tmp_path / "environment").exists()
