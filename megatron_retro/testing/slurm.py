"""A SLURM for tests: starts the cluster of a script, submits, waits, preempts, kills nodes, reads logs."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_POLL_SECONDS = 0.2
_OLD_START_SECONDS = 4.0  # a node that has just been told to end a job refuses to start it again
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Cluster:
    """`script` knows start, stop, kill-node and start-node; everything it writes is in `directory`."""

    script: Path
    directory: Path
    environment: Mapping[str, str]

    def start(self, nodes: int) -> None:
        """Start the daemons, which end with this process at the latest; returns when every node is idle."""
        self._script("start", str(nodes), str(os.getpid()))

    def stop(self) -> None:
        """End every process of the cluster."""
        self._script("stop")

    def kill_node(self, name: str) -> None:
        """As a power cut."""
        self._script("kill-node", name)

    def start_node(self, name: str) -> None:
        """Power back on."""
        self._script("start-node", name)

    def run(self, *command: str, **variables: str) -> str:
        """Run a command as a user of the cluster; its standard output."""
        done = subprocess.run(
            command, env=self.shell_environment(variables), capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise AssertionError(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, **variables: str) -> int:
        """sbatch; the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, **variables).split(";")[0])

    def facts(self, job: int) -> dict[str, str]:
        """What scontrol knows of a job (of an array: of its first task)."""
        return self.tasks(job)[0]

    def tasks(self, job: int) -> list[dict[str, str]]:
        """What scontrol knows of each task of an array; of a job, its facts alone."""
        text = self.run("scontrol", "show", "job", str(job), "--oneliner")
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line]

    def restarts(self, job: int) -> int:
        """How often a job, or the tasks of an array, were started again."""
        return sum(int(task.get("Restarts", "0")) for task in self.tasks(job))

    def states(self, job: int) -> set[str]:
        """The states of a job, or of all tasks of an array."""
        return {task["JobState"] for task in self.tasks(job)}

    def wait(self, job: int, seconds: float = 120.0) -> dict[str, str]:
        """Until the job has ended; a requeued job's delay is skipped."""
        self.wait_until(lambda: self.has_ended(job), seconds, f"job {job} to end", job)
        return self.facts(job)

    def wait_all(self, jobs: Sequence[int], seconds: float = 120.0) -> None:
        """Until all of these jobs have ended; the delays of those that are requeued are skipped side by side."""

        def ended() -> bool:
            found = [self.has_ended(job) for job in jobs]
            return all(found)

        self.wait_until(ended, seconds, f"jobs {jobs} to end")

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str, job: int | None = None) -> None:
        """Poll; a timeout, or the end of the job before the condition, shows the queue and the logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = job is not None and self.states(job) <= set(_ENDED)
            if time.monotonic() > deadline or (ended and not condition()):
                queue = self.run("squeue", "--format", "%i %j %T %r %S")
                facts = "" if job is None else self.run("scontrol", "show", "job", str(job))
                raise AssertionError(f"waited at most {seconds:g} s for {what}:\n{queue}\n{facts}\n{self.logs()}")
            time.sleep(_POLL_SECONDS)

    def skip_delay(self, job: int) -> None:
        """SLURM holds a requeued job for two minutes; start it now."""
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"],
            env=self.shell_environment({}),
            capture_output=True,
            check=False,
        )

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        files = sorted((self.directory / "log").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{_tail(file)}" for file in files)

    def has_ended(self, job: int) -> bool:
        """Whether a job has ended; where it waits out the delay of a requeue, the delay is skipped."""
        tasks = self.tasks(job)
        for task in tasks:
            if task["JobState"] == "PENDING" and task["Reason"] == "BeginTime" and _age(task) > _OLD_START_SECONDS:
                self.skip_delay(int(task["JobId"]))
        return {task["JobState"] for task in tasks} <= set(_ENDED)

    def shell_environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The environment of a user of the cluster."""
        # node names of the test cluster are in no hosts file, so the ranks are told where to meet
        own = {"SLURM_CONF": str(self.directory / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        return {**self.environment, **own, **variables}

    def _script(self, *words: str) -> None:
        action, *rest = words
        subprocess.run(
            [str(self.script), action, str(self.directory), *rest],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )


def _age(facts: Mapping[str, str]) -> float:
    """Seconds since the job was (re)queued."""
    return (datetime.now() - datetime.fromisoformat(facts["SubmitTime"])).total_seconds()


def _tail(file: Path, lines: int = 12) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
