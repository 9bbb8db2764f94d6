"""The launcher under a real SLURM, with jobs that train nothing: steps, ranks, logs, health, requeue, lost nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_retro.testing.slurm import Cluster

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "examples/slurm/launch.sh"


def batch(directory: Path, *lines: str) -> str:
    """A batch script on disk."""
    script = directory / "job.sh"
    script.write_text("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines]) + "\n")
    return str(script)


def where(directory: Path) -> list[str]:
    return [f"--chdir={directory}", f"--output={directory}/job.log", "--open-mode=append"]


def test_four_ranks_on_two_nodes_meet(cluster: Cluster, tmp_path: Path) -> None:
    script = batch(tmp_path, f"exec {LAUNCH} reach")
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", "--job-name=meet", *where(tmp_path), script)
    facts = cluster.wait(job)
    log = (tmp_path / "job.log").read_text()
    assert facts["JobState"] == "COMPLETED", log
    assert log.count(": fit") == 2
    assert "4 processes reach each other" in (tmp_path / f"logs/meet-{job}/rank-0.log").read_text()
    assert (tmp_path / f"logs/meet-{job}/rank-3.log").exists()
    assert f"reach meet {job}: finished" in log


def test_a_killed_test_leaves_no_daemon_behind(cluster: Cluster, tmp_path: Path) -> None:
    """A second cluster whose owner is killed with SIGKILL ends by itself; the first one stays."""
    before = daemons(cluster.directory)
    owner = f"""
import os, sys
from pathlib import Path
from megatron_retro.testing.slurm import Cluster
Cluster(Path({str(cluster.script)!r}), Path({str(tmp_path)!r}), os.environ).start(1)
print("up", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", owner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(cluster.environment)
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert len(daemons(tmp_path)) == 3
        process.kill()
    cluster.wait_until(lambda: not daemons(tmp_path), 30, "the daemons of a killed owner to end")
    assert before and daemons(cluster.directory) == before


def daemons(directory: Path) -> list[str]:
    """Command lines of the running daemons of a cluster."""
    lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = ("munged", "slurmctld", "slurmd")
    return [line for line in lines if f"{directory}/" in line and Path(line.split()[0]).name in names]


def test_an_unfit_node_ends_the_job_before_its_work(cluster: Cluster, tmp_path: Path) -> None:
    script = batch(tmp_path, f"exec {LAUNCH} environment")
    job = cluster.submit("--nodes=1", "--job-name=unfit", *where(tmp_path), script, MINIMUM_FREE_GB="99999999")
    facts = cluster.wait(job)
    log = (tmp_path / "job.log").read_text()
    assert facts["JobState"] == "FAILED"
    assert "99999999 GB needed" in log and "scontrol update NodeName=n" in log and "Reason=health" in log
    assert not list((tmp_path / "logs").glob("*/rank-*.log"))


def test_missing_gpus_and_a_full_or_closed_disk_are_named(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "examples/slurm/health_check.sh"
    closed = tmp_path / "nowhere"
    text = cluster.run("bash", "-c", f"EXPECTED_GPUS=8 {script} {closed} 2>&1 || true")
    assert "0 of 8 GPUs answer" in text
    assert f"{closed} cannot be written" in text


def test_container_flags_and_options_go_to_srun(tmp_path: Path) -> None:
    """What srun is started with, seen by a program of that name; SLURM itself has no containers here."""
    recorder = tmp_path / "srun"
    recorder.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/seen\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN_OPTIONS": "--cpu-bind=none"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "LOGS": str(tmp_path / "logs")}
    command = [str(LAUNCH), "pretrain", "--lr", "1", "--container-image=retro.sqsh", "--container-mounts=/data:/data"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    check, start = (tmp_path / "seen").read_text().splitlines()
    for line in (check, start):
        assert (
            "--cpu-bind=none --kill-on-bad-exit=1 --container-image=retro.sqsh --container-mounts=/data:/data" in line
        )
    assert "--ntasks=2" in check and "health_check.sh" in check
    assert start.endswith("pretrain --lr 1")


def test_the_last_line_of_a_job_names_its_error(tmp_path: Path) -> None:
    """Not the advice below it; and of a job that finished, not the stop of an earlier start."""
    program = tmp_path / "srun"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEALTH_CHECK": "off"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "LOGS": str(tmp_path)}
    log = tmp_path / "job-7/rank-0.log"
    for code, said in ((2, "error: runs/x belongs to a run that is going on"), (0, "saved: step 4")):
        program.write_text(
            f"#!/bin/sh\nprintf '{said}\\n' >>{log}\n[ {code} = 0 ] || echo '  fix: wait' >>{log}\nexit {code}\n"
        )
        program.chmod(0o755)
        done = subprocess.run([str(LAUNCH), "pretrain"], env=environment, capture_output=True, text=True)
        assert done.returncode == code and done.stdout.rstrip().endswith(said), done.stdout + done.stderr
