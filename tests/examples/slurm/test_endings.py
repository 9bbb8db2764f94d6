"""How a job ends under a real SLURM when its ranks leave apart, refuse, fail or die, and when signals come early."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_retro.testing.slurm import Cluster

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "examples/slurm/launch.sh"


@dataclass
class Job:
    """A job whose ranks do as `variables` say (endings.py), in a directory of its own."""

    cluster: Cluster
    room: Path
    number: int = 0
    options: tuple[str, ...] = ("--nodes=1", "--ntasks-per-node=2")
    variables: dict[str, str] = field(default_factory=dict)

    def submit(self) -> Job:
        self.room.mkdir()
        python = self.room / "bin/python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("endings.py")} "$@"\n')
        python.chmod(0o755)
        script = self.room / "job.sh"
        script.write_text(f"#!/usr/bin/env bash\nexec {LAUNCH} pretrain --save {self.room}/run\n")
        variables = {"HEALTH_CHECK": "off", "PYTHONPATH": str(ROOT), **self.variables}
        variables["PATH"] = f"{python.parent}:{self.cluster.environment['PATH']}"
        where = [f"--chdir={self.room}", f"--output={self.room}/job.log", "--open-mode=append", "--requeue"]
        self.number = self.cluster.submit("--job-name=end", *where, *self.options, str(script), **variables)
        return self

    def until_up(self, ranks: int = 2, start: int = 0) -> None:
        self.cluster.wait_until(
            lambda: len(list(self.room.glob(f"up-{start}-*"))) == ranks, 60, "ranks to be up", self.number
        )

    def signal(self, *options: str) -> None:
        self.cluster.run("scancel", *options, str(self.number))

    def ended(self) -> tuple[str, str, str]:
        """State, exit code, and how often it was started again."""
        facts = self.cluster.wait(self.number, 150)
        return facts["JobState"], facts["ExitCode"], facts["Restarts"]

    def log(self) -> str:
        log = self.room / "job.log"
        return log.read_text() if log.exists() else ""


def apart(ranks: int, seconds: float, code: int = 75) -> str:
    """Ranks that leave one after the other, the last one after `seconds`."""
    return ",".join(f"{code} after {seconds * rank / (ranks - 1):g}" for rank in range(ranks))


def requested(ranks: int) -> tuple[str, ...]:
    return (f"--nodes={max(1, ranks // 4)}", f"--ntasks-per-node={min(ranks, 4)}")


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TOLD: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "apart": (requested(2), {"ON_STOP": apart(2, 2.0)}),
    "refused": (requested(2), {"AT_ONCE": "2 after 0,76 after 1"}),
    "lost": (requested(2), {"AT_ONCE": "KILL after 0,76 after 0.3", "FAILING_STARTS": "1"}),
    "bounded": (requested(1), {"AT_ONCE": "1 after 0", "MAX_FAILURES": "1"}),
    "standing": (requested(1), {"AT_ONCE": "76 after 0", "NO_CHECKPOINTS": "1"}),
    "node": (("--nodes=1", "--exclude=n0,n2"), {"AT_ONCE": "KILL after 0", "FAILING_STARTS": "2"}),
    "check": (TWO_NODES, {"HEALTH_CHECK": "on", "MINIMUM_FREE_GB": "0", "REACH_SECONDS": "2"}),
    "import": (TWO_NODES, {"IMPORT_SECONDS": "3", "ON_STOP": "75 after 0"}),
    "cancelled": (TWO_NODES, {"ON_STOP": "75 after 0"}),
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Side by side, for most of their time they wait for SLURM."""
    room = tmp_path_factory.mktemp("endings")
    told = {name: Job(cluster, room / name, 0, *of_job).submit() for name, of_job in TOLD.items()}
    for name in ("check", "import"):
        tasks = told[name].room / "logs"
        cluster.wait_until(lambda at=tasks: len(list(at.glob("*/endings/*/rank-*.node"))) == 2, 60, "a step's tasks")
        told[name].signal("--signal=USR1")
    for name, options in (("apart", ("--signal=USR1",)), ("cancelled", ())):
        told[name].until_up()
        told[name].signal(*options)
    kept = told.pop("node")  # it waits for its node for ever
    cluster.wait_until(
        lambda: bool(cluster.has_ended(kept.number)) or "failed twice" in kept.log(), 60, "a node's failures"
    )
    cluster.wait_all([job.number for job in told.values()])
    told["node"] = kept
    yield told


def test_ranks_that_saved_are_started_again_however_far_apart_they_leave(jobs: dict[str, Job]) -> None:
    """srun would end the last ones with 143 when the first one leaves."""
    assert jobs["apart"].ended() == ("COMPLETED", "0:0", "1"), jobs["apart"].log()
    assert "saved, starts again" in jobs["apart"].log() and "failed" not in jobs["apart"].log()


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seconds", [0.2, 2.0, 10.0])
@pytest.mark.parametrize("options", [("--signal=USR1",), ("--signal=TERM",), ("--batch", "--signal=USR1"), ("limit",)])
def test_every_way_to_ask_for_a_stop(
    cluster: Cluster, tmp_path: Path, ranks: int, seconds: float, options: tuple[str, ...]
) -> None:
    """Three at a time; SLURM's shortest time limit is a minute."""
    limit = ("--time=1", "--signal=B:USR1@50") if options == ("limit",) else ()
    told = [
        Job(cluster, tmp_path / str(number), 0, (*requested(ranks), *limit), {"ON_STOP": apart(ranks, seconds)})
        for number in range(3)
    ]
    for job in told:
        job.submit()
    for job in told:
        job.until_up(ranks)
        if not limit:
            job.signal(*options)
    cluster.wait_all([job.number for job in told], 200)
    assert [job.ended() for job in told] == [("COMPLETED", "0:0", "1")] * 3, [job.log() for job in told]


@pytest.mark.parametrize("end", ["1 minute", "-2 seconds", "unknown"])
def test_what_finishes_after_its_time_limit_starts_again(end: str) -> None:
    """For SLURM it timed out whatever its code, and the jobs that wait for it would never start."""
    stub = f'scontrol() {{ echo "JobId=7 EndTime=$(date -d "{end}" +%FT%T 2>/dev/null || echo Unknown) A=b"; }}'
    words = f"set -euo pipefail; source {LAUNCH.with_name('outcome.sh')}; {stub}; SLURM_JOB_ID=7; is_past_its_limit"
    assert (subprocess.run(["bash", "-c", words], check=False).returncode == 0) == end.startswith("-")


def test_without_an_answer_of_slurm_no_limit_is_past() -> None:
    words = f"set -euo pipefail; source {LAUNCH.with_name('outcome.sh')}; scontrol() {{ false; }}; is_past_its_limit"
    assert subprocess.run(["bash", "-c", words], env={"SLURM_JOB_ID": "7"}, check=False).returncode == 1


def test_what_is_refused_fails_and_what_fails_is_tried_again(jobs: dict[str, Job]) -> None:
    assert jobs["refused"].ended() == ("FAILED", "2:0", "0"), jobs["refused"].log()
    assert jobs["lost"].ended() == ("COMPLETED", "0:0", "1"), jobs["lost"].log()
    assert "failed with code 137" in jobs["lost"].log()
    assert "failure 1 of at most 5, starts again from step-00000001" in jobs["lost"].log()
    assert jobs["bounded"].ended() == ("FAILED", "1:0", "1"), jobs["bounded"].log()
    assert "not started again (MAX_FAILURES=1)" in jobs["bounded"].log()
    assert jobs["standing"].ended() == ("FAILED", "76:0", "1"), jobs["standing"].log()
    assert "no checkpoint since the failure before, not started again" in jobs["standing"].log()


def test_a_node_that_failed_twice_is_left_out_and_named(jobs: dict[str, Job]) -> None:
    assert "they failed twice: n1" in jobs["node"].log()
    assert jobs["node"].cluster.facts(jobs["node"].number)["ExcNodeList"] == "n1,n[0,2]"
    jobs["node"].signal()


@pytest.mark.parametrize("name", ["check", "import"])
def test_a_signal_before_any_handler_stands_is_kept(jobs: dict[str, Job], name: str) -> None:
    assert jobs[name].ended() == ("COMPLETED", "0:0", "1"), jobs[name].log()
    assert "saved, starts again" in jobs[name].log()
    assert not list(jobs[name].room.glob("up-0-*")), "the work did not begin"


def test_a_user_s_scancel_ends_the_job_for_good(jobs: dict[str, Job]) -> None:
    """Though its ranks save."""
    assert jobs["cancelled"].ended()[0] == "CANCELLED"
    assert "cancelled after" in jobs["cancelled"].log()
