"""Where a test finds megatron-core, in a process of its own: it is no dependency, and changes torch as it is used."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

_VERSION = "0.15.3"


def require_core() -> str:
    """The path on which megatron-core lies; without it the test is skipped."""
    path = [*sys.path, *filter(None, [os.environ.get("MEGATRON_RETRO_PEERS")])]
    found = importlib.metadata.distributions(name="megatron-core", path=path)
    if not any(each.version == _VERSION for each in found):
        pytest.skip(f"needs megatron-core {_VERSION}, installed or in the folder of MEGATRON_RETRO_PEERS")
    return os.pathsep.join(filter(None, path))


def run_beside_core(program: Path, *arguments: str) -> None:
    """Run a Python program that imports it."""
    command = [sys.executable, "-W", "ignore", str(program), *arguments]
    environment = {**os.environ, "PYTHONPATH": require_core()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
