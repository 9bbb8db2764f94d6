"""A real SLURM of three nodes on this machine, for the tests of this directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_retro.testing.slurm import Cluster

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


def missing_programs() -> list[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}); Debian: apt install slurm-wlm munge")
    directory = tmp_path_factory.mktemp("slurm")
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = Cluster(SCRIPT, directory, {**os.environ, "PATH": programs})
    try:
        started.start(nodes=3)
        yield started
    except subprocess.CalledProcessError as error:
        pytest.fail(f"SLURM did not start: {error.stderr}")
    finally:
        started.stop()
