"""Workers as an array of SLURM. The name of the array says what it works on, so a second start finds what runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

from megatron_retro.cli.executors.job import Executor
from megatron_retro.cli.executors.workers import Workers
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.runtime.console import say

_MOST_SILENT_LOOKS = 60  # a controller that restarts answers none


class SlurmArray(Executor):
    """One task of an array per worker; SLURM queues again what a node's death or preemption ended."""

    def __init__(self, workers: Workers, options: str) -> None:
        self._workers, self._options = workers, shlex.split(options)
        self._left, self._silent = 0, 0
        if shutil.which("sbatch") is None:
            raise EnvironmentProblem(
                "--executor slurm needs sbatch, which is not on PATH", fix="start it where jobs are submitted"
            )

    def left(self) -> int:
        """Tasks in the queue, also those that another start of this command submitted."""
        who = ["--user", str(os.getuid()), "--name", self._workers.name]
        asked = ["squeue", "--noheader", "--array", *who, "--format", "%i"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
        self._silent = 0 if found.returncode == 0 else self._silent + 1
        if self._silent > _MOST_SILENT_LOOKS:
            raise EnvironmentProblem("squeue fails", got=found.stderr.strip(), fix="run the same command again")
        if self._silent == 0:
            self._left = len(found.stdout.split())
        return self._left

    def start(self) -> None:
        """Submit the array."""
        number = "$SLURM_ARRAY_TASK_ID"
        exports = " ".join(f'{name}="{value}"' for name, value in self._workers.environment(number).items())
        done = subprocess.run(
            [
                *("sbatch", "--parsable", "--requeue", "--open-mode=append", "--signal=B:USR1@300"),
                *(f"--job-name={self._workers.name}", f"--array=0-{self._workers.count - 1}"),
                *(f"--output={self._workers.log('%a')}", "--nodes=1", "--ntasks=1", *self._options),
                *("--wrap", f"export {exports}; exec {shlex.join(self._workers.command)}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EnvironmentProblem(
                "sbatch refuses the workers",
                got=done.stderr.strip(),
                fix="give what your cluster wants, as in --sbatch-options='--partition=cpu --account=me'",
            )
        say(f"submitted array {done.stdout.split(';')[0].strip()} of {self._workers.count} workers")

    def cancel_waiting(self) -> None:
        """Take what waits out of the queue."""
        words = ["scancel", "--state=PENDING", f"--name={self._workers.name}", f"--user={os.getuid()}"]
        subprocess.run(words, capture_output=True, check=False)

    def leave(self) -> None:
        """The array goes on."""
        if self._left:
            say(
                "the array goes on without this process; the same command watches it again, "
                f"scancel --name={shlex.quote(self._workers.name)} ends it"
            )
