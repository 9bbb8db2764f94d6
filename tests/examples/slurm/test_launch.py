"""The launcher under a real SLURM, with jobs that train nothing: steps, ranks, logs, health, requeue, lost nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_retro import __version__
from megatron_retro.testing.slurm import Cluster

pytestmark = pytest.mark.long

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
    assert "99999999 GB needed" in log and "other nodes have the same directory" in log
    assert not list((tmp_path / "logs").glob("*/rank-*.log"))


def test_missing_gpus_and_a_full_or_closed_disk_are_named(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "examples/slurm/health_check.sh"
    closed = tmp_path / "file" / "below"
    closed.parent.touch()
    text = cluster.run("bash", "-c", f"EXPECTED_GPUS=8 {script} {closed} 2>&1 || true")
    assert "0 of 8 GPUs answer" in text
    assert f"{closed} cannot be written" in text


def srun_words(directory: Path, *words: str, **variables: str) -> tuple[str, str]:
    """What srun is started with for the check and for the work, seen by a program of that name."""
    recorder = directory / "srun"
    recorder.write_text(f'#!/bin/sh\necho "$@ [$PYTORCH_ALLOC_CONF $GLOO_SOCKET_IFNAME]" >>{directory}/seen\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "LOGS": str(directory / "logs"), **variables}
    subprocess.run([str(LAUNCH), *words], env=environment, check=True, capture_output=True)
    check, start = (directory / "seen").read_text().splitlines()
    return check, start


def test_container_flags_and_options_go_to_srun(tmp_path: Path) -> None:
    """SLURM itself has no containers here."""
    flags = ["--container-image=retro.sqsh", "--container-mounts=/data:/data"]
    check, start = srun_words(tmp_path, "pretrain", "--lr", "1", *flags, SRUN_OPTIONS="--cpu-bind=none")
    for line in (check, start):
        assert f"--cpu-bind=none --kill-on-bad-exit=0 {' '.join(flags)}" in line
    assert "--ntasks=2" in check and "health_check.sh" in check
    assert "pretrain --lr 1 [expandable_segments:True" in start


def test_the_profile_of_the_cluster_reaches_the_processes(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.env"
    profile.write_text(
        "CONTAINER_IMAGE=retro.sqsh\nCONTAINER_MOUNTS=/data:/data\nGLOO_SOCKET_IFNAME=ib0\nPYTORCH_ALLOC_CONF=max_split_size_mb:64\n"
    )
    for line in srun_words(tmp_path, "pretrain", CLUSTER=str(profile)):
        assert "--container-image=retro.sqsh" in line and "[max_split_size_mb:64 ib0]" in line
        assert f"--container-mounts=/data:/data,{ROOT}:{ROOT},{Path.cwd()}:{Path.cwd()}" in line


def test_an_image_of_apptainer_is_entered_by_each_task(tmp_path: Path) -> None:
    """The check and the work run inside, the file of the rank's ending is written outside."""
    profile = tmp_path / "cluster.env"
    profile.write_text("CONTAINER_IMAGE=/images/retro.sif\nCONTAINER_MOUNTS=/data:/data\n")
    check, start = srun_words(tmp_path, "pretrain", "--lr", "1", CLUSTER=str(profile))
    mounts = f"/data:/data,{ROOT}:{ROOT},{Path.cwd()}:{Path.cwd()}"
    entered = f"apptainer exec --nv --bind {mounts} --pwd {Path.cwd()} /images/retro.sif"
    assert f"start-0 {entered} {ROOT}/examples/slurm/health_check.sh" in check
    assert f"start-0 {entered} python -m megatron_retro.cli.main pretrain --lr 1" in start
    assert "--container" not in check + start


def test_a_node_needs_no_shared_home_repository_or_path(cluster: Cluster, tmp_path: Path) -> None:
    """Each node has an environment and a home of its own, which a prolog names; submission and scripts are shared."""
    copy, room = tmp_path / "opt/megatron_retro", tmp_path / "submitted"
    shutil.copytree(ROOT / "examples/slurm", copy / "examples/slurm")
    shutil.copytree(ROOT / "megatron_retro", copy / "megatron_retro", ignore=shutil.ignore_patterns("__pycache__"))
    for node in ("batch", "n0", "n1", "n2"):
        python = tmp_path / node / "venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho {node} $HOME\nPYTHONPATH={copy} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    room.mkdir()
    prolog = room / "prolog.sh"
    prolog.write_text(f"""#!/usr/bin/env bash
echo "export PATH={tmp_path}/$SLURMD_NODENAME/venv/bin:$PATH"
echo "export HOME=/nowhere/$SLURMD_NODENAME"
""")
    prolog.chmod(0o755)
    (room / "cluster.env").write_text(
        f"ENVIRONMENT={tmp_path}/batch/venv\nHEALTH_CHECK=off\nSRUN_OPTIONS=--task-prolog={prolog}\n"
    )
    script = batch(room, f"exec {copy}/examples/slurm/launch.sh --version")
    options = ("--nodes=2", "--nodelist=n0,n1", "--ntasks-per-node=1", "--job-name=local")
    job = cluster.submit(*options, *where(room), script, CLUSTER=str(room / "cluster.env"), PYTHONPATH="")
    assert cluster.wait(job)["JobState"] == "COMPLETED", (room / "job.log").read_text()
    said = [(room / f"logs/local-{job}/rank-{rank}.log").read_text() for rank in range(2)]
    assert said == [f"n{rank} /nowhere/n{rank}\nmegatron_retro {__version__}\n" for rank in range(2)]


def test_both_recipes_of_an_image_install_the_same(tmp_path: Path) -> None:
    """Neither can be built in a test: shellcheck reads their commands, and their words are compared."""
    folder = ROOT / "examples/containers"
    post = (folder / "megatron_retro.def").read_text().split("%post\n")[1].split("\n\n%")[0]
    docker = (folder / "megatron_retro.Dockerfile").read_text()
    runs = re.findall(r"^RUN (.*(?:\\\n.*)*)", docker, flags=re.MULTILINE)
    for name, text in (("post.sh", post), ("run.sh", "\n".join(runs))):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        checker = str(Path(sys.executable).parent / "shellcheck")
        done = subprocess.run([checker, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    commands = [
        re.findall(r"(?:apt-get install|/opt/venv/bin/p\w+|python3 -m venv) .*?(?= \\|$)", text, re.M)
        for text in (post, docker)
    ]
    assert commands[0] == commands[1] and len(commands[0]) == 5


def test_an_environment_that_the_profile_names_is_used_on_every_node(tmp_path: Path) -> None:
    place = tmp_path / "venv/bin/python"
    place.parent.mkdir(parents=True)
    place.write_text("#!/bin/sh\necho the one of the profile\n")
    place.chmod(0o755)
    environment = {**os.environ, "ENVIRONMENT": str(tmp_path / "venv"), "LAUNCHER": "none"}
    done = subprocess.run([str(LAUNCH), "reach"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "the one of the profile\n"


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)", "SLURM_NTASKS_PER_NODE": "8"}, "12"),
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}, "4"),
        ({"SLURM_JOB_CPUS_PER_NODE": "96,64", "SLURM_NTASKS_PER_NODE": "8"}, None),
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)"}, None),
    ],
)
def test_each_process_gets_its_share_of_the_cores(variables: dict[str, str], cores: str | None, tmp_path: Path) -> None:
    check, start = srun_words(tmp_path, "pretrain", **variables)
    assert "--cpus-per-task" not in check
    assert re.findall(r"--cpus-per-task=(\d+)", start) == ([cores] if cores else [])


@pytest.mark.parametrize(
    ("variables", "message"), [({"CLUSTER": "/nowhere"}, "is no file"), ({"MODULES": "cuda"}, "no command `module`")]
)
def test_a_profile_that_cannot_be_used_is_named(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([str(LAUNCH), "reach"], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--save", "{}/out"],
        ["pretrain", "--save={}/out", "--lr", "1"],
        ["preprocess", "--output-prefix", "{}/out/corpus"],
        ["build-retrieval", "--retro-project-dir", "{}/out"],
    ],
)
def test_the_directory_that_is_written_is_checked_too(words: list[str], tmp_path: Path) -> None:
    check, _ = srun_words(tmp_path, *(word.format(tmp_path) for word in words))
    assert f"health_check.sh {tmp_path}/logs/job-7 {tmp_path}/out [" in check


def health(directory: Path, **variables: str) -> str:
    """What the check says of this machine and of a directory that is not there yet."""
    script = ROOT / "examples/slurm/health_check.sh"
    command = ["bash", str(script), str(directory / "later/run")]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_full_file_system_is_no_fault_of_the_node(tmp_path: Path) -> None:
    assert health(tmp_path, MINIMUM_FREE_GB="0").endswith(": fit\n")
    text = health(tmp_path, MINIMUM_FREE_GB="99999999")
    assert f"GB free in {tmp_path}, 99999999 GB needed" in text
    assert "other nodes have the same directory" in text and "DRAIN" not in text
    assert not list(tmp_path.iterdir())


def test_what_nvidia_smi_tells_of_gpus_is_named(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    links = "GPU 0: H100\\n  Link 0: 26.562 GB/s\\n  Link 1: <inactive>"
    rows = ("0, 0, No\\n1, [N/A], [N/A]\\n2, 3, No\\n3, 0, Yes", "0, 0, No\\n1, 0, No\\n2, 0, No\\n3, 0, No")
    for row, link in zip(rows, (links, "Link 0: 26.562 GB/s"), strict=True):
        program.write_text(
            "#!/bin/sh\ncase $1 in --list-gpus) printf 'a\\nb\\nc\\nd\\n';; nvlink) "
            f"printf '{link}\\n';; *) printf '{row}\\n';; esac\n"
        )
        program.chmod(0o755)
        text = health(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", EXPECTED_GPUS="4", MINIMUM_FREE_GB="0")
        sick = ("GPU 2 has 3 uncorrected memory errors", "GPU 3 waits for a reset", "an NVLink is inactive: 1 in all")
        assert [words in text for words in sick] == [row == rows[0]] * 3, text
        assert "GPU 0" not in text and "GPU 1" not in text


def test_a_driver_that_does_not_know_a_field_condemns_no_node(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in --list-gpus) echo a;; nvlink) ;; *) "
        "echo 'Field \"remapped_rows.pending\" is not a valid field to query.'; exit 2;; esac\n"
    )
    program.chmod(0o755)
    text = health(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", EXPECTED_GPUS="1", MINIMUM_FREE_GB="0")
    assert text.endswith(": fit\n"), text


@pytest.mark.parametrize(("verb", "ranks"), [("pretrain", "8"), ("evaluate", "8"), ("preprocess", ""), ("report", "")])
def test_a_node_without_slurm_starts_ranks_of_what_ranks_share(tmp_path: Path, verb: str, ranks: str) -> None:
    """Data stages share by claims: eight of them would search on the same GPUs."""
    programs = {"nvidia-smi": "seq 8", "torchrun": 'echo torchrun "$@"', "python": 'echo python "$@"'}
    for name, said in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    left_out = ("SLURM_JOB_ID", "LAUNCHER", "PROCESSES", "NODES", "ENVIRONMENT")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(LAUNCH), verb], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torchrun" if ranks else "python"), done.stdout
    assert (f"--nproc-per-node {ranks} " in done.stdout) == bool(ranks)


def test_a_loopback_name_is_a_hint_where_nodes_do_not_meet(tmp_path: Path) -> None:
    for name, said in (("python", "exit 1"), ("getent", "echo 127.0.1.1 here")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "MINIMUM_FREE_GB": "0"}
    text = health(tmp_path, **variables)
    assert "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in text and "Reason=health" in text
    assert "GLOO" not in health(tmp_path, **variables, GLOO_SOCKET_IFNAME="ib0")


def test_the_last_line_of_a_job_is_this_starts_first_error(tmp_path: Path) -> None:
    """Whole, whichever rank it was; neither that of an earlier start nor one that followed from it."""
    program = tmp_path / "srun"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEALTH_CHECK": "off"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "LOGS": str(tmp_path)}
    starts = (
        (2, {0: "error: an old one\n  fix:      wait\n"}, "error: an old one; fix:      wait"),
        (0, {0: "saved: step 4\n"}, "saved: step 4"),
        (
            2,
            {
                1: "error: the disk is full\n  got:      0 B\n  fix:      free space\nsaid after it\n",
                0: "step 5\nerror: a collective of rank 0 failed\n",
            },
            "error: the disk is full; got:      0 B; fix:      free space",
        ),
        (1, {0: "a fault of ours\n"}, "a fault of ours"),
    )
    for code, said, last in starts:
        lines = [f"printf '%s' '{text}' >>{tmp_path}/job-7/rank-{rank}.log; sleep 0.05" for rank, text in said.items()]
        program.write_text("\n".join(["#!/bin/sh", *lines, f"exit {code}"]) + "\n")
        program.chmod(0o755)
        done = subprocess.run([str(LAUNCH), "pretrain"], env=environment, capture_output=True, text=True)
        assert done.returncode == code and done.stdout.rstrip().endswith(f"; {last}"), done.stdout + done.stderr


def test_nodes_that_a_watchdog_blames_have_failed_too(tmp_path: Path) -> None:
    """Beside those whose ranks were killed or left no word; one that refused has not."""
    ranks = {0: ("n0", '"code": 2'), 1: ("n1", '"code": 137'), 2: ("n2", None), 3: ("n3", '"code": 76')}
    for rank, (node, code) in ranks.items():
        (tmp_path / f"rank-{rank}.node").write_text(f"{node}\n")
        if code is not None:
            (tmp_path / f"rank-{rank}.json").write_text(f'{{"rank": {rank}, {code}, "why": ""}}\n')
    (tmp_path / "culprits.json").write_text('{"culprits": [{"rank": 4, "node": "n4.example"}, {"node": "n5"}]}\n')
    words = f"source {LAUNCH.with_name('outcome.sh')}; failed_nodes {tmp_path} {tmp_path}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["n1", "n2", "n4", "n5"]
