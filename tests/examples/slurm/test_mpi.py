"""A real mpirun and srun's MPI plugins: ranks are numbered as MPI numbers them, meet, and train as torchrun's do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.toml_files import render_toml
from megatron_retro.testing.slurm import Cluster
from megatron_retro.testing.tiny_corpus import write_tiny_corpus

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "examples/slurm/launch.sh"
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="no mpirun on this machine; Debian: apt install openmpi-bin libopenmpi-dev"
)
NUMBERS = """
from mpi4py import MPI
from megatron_retro.runtime.launch import find_launch
launch, world = find_launch(), MPI.COMM_WORLD
local = world.Split_type(MPI.COMM_TYPE_SHARED)
ours = (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size)
assert ours == (world.Get_rank(), world.Get_size(), local.Get_rank(), local.Get_size()), ours
print(launch.launcher, flush=True)
"""
PLACE = """
from megatron_retro.runtime.launch import find_launch
launch = find_launch()
print(launch.launcher, launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, flush=True)
"""


def environment(**variables: str) -> dict[str, str]:
    """As an operator's shell, with what Open MPI wants to hear before it runs as root or on few cores."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {
        **kept,
        **allowed,
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def started(folder: Path, *words: str, **variables: str) -> str:
    run = subprocess.run(
        words, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@needs_mpirun
def test_ranks_are_numbered_as_mpi_numbers_them(tmp_path: Path) -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    said = started(tmp_path, "mpirun", "-n", "3", sys.executable, "-c", NUMBERS)
    assert said.count("Open MPI") == 3  # lines of three processes may run together


@needs_mpirun
def test_the_launcher_starts_ranks_that_meet(tmp_path: Path) -> None:
    said = started(tmp_path, str(LAUNCH), "reach", LAUNCHER="mpirun", PROCESSES="2")
    assert "2 processes reach each other" in said


@needs_mpirun
def test_training_begins_and_goes_as_under_torchrun(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    changes: dict[str, Any] = {"tensor_model_parallel_size": 2, "train_iters": 2, "log_interval": 1, "eval_iters": 0}
    losses = {}
    for launcher in ("mpirun", "torchrun"):
        recipe, run = tmp_path / f"{launcher}.toml", tmp_path / launcher
        recipe.write_text(render_toml(corpus.settings(save=str(run), **changes)))
        started(tmp_path, str(LAUNCH), "pretrain", "--config", str(recipe), LAUNCHER=launcher, PROCESSES="2")
        losses[launcher] = step_losses(run)
    assert len(losses["mpirun"]) == 2
    assert losses["mpirun"] == losses["torchrun"]


@pytest.mark.parametrize("plugin", ["none", "pmi2", "pmix"])
def test_every_plugin_of_srun_starts_the_same_ranks(cluster: Cluster, plugin: str) -> None:
    said = of_srun(cluster, plugin, PLACE)
    assert sorted(said.splitlines()) == [f"srun {rank} 4 {rank % 2} 2" for rank in range(4)]


@needs_mpirun
def test_ranks_of_pmix_are_numbered_as_mpi_numbers_them(cluster: Cluster) -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    world = "\nfrom mpi4py.MPI import COMM_WORLD as world\nassert launch.rank == world.Get_rank(), world.Get_rank()\n"
    assert len(of_srun(cluster, "pmix", PLACE + world).splitlines()) == 4


def of_srun(cluster: Cluster, plugin: str, program: str) -> str:
    """What four ranks on two nodes say."""
    if plugin not in cluster.run("bash", "-c", "srun --mpi=list 2>&1"):
        pytest.skip(f"this SLURM was built without {plugin}")
    where = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--distribution=block"]
    variables = {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return cluster.run("srun", f"--mpi={plugin}", *where, sys.executable, "-c", program, **variables)


def step_losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]
