"""Workers as tasks of a Ray cluster: one long task per CPU, which Ray places, and starts again when its node dies."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_retro.cli.executors.job import Executor
from megatron_retro.cli.executors.workers import Workers
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.runtime.console import say
from megatron_retro.runtime.environment import require
from megatron_retro.runtime.signals import die_with_parent

_RETRIES = 3  # of one task between two starts; blocks that were finished stay finished


def connect(address: str | None) -> int:
    """Join the cluster, or start one on this machine; returns its CPUs."""
    require("ray", "--executor ray")
    import ray

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


class RayTasks(Executor):
    """One task per worker. A worker that is killed ends its task with an error, which Ray answers with a new one."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._tasks: list[Any] = []

    def left(self) -> int:
        """Tasks that wait or run."""
        import ray

        try:
            if self._tasks:
                ended, self._tasks = ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
                for task in ended:
                    self._note(task)
        except ray.exceptions.RayError as error:
            raise EnvironmentProblem(
                "the Ray cluster is gone", got=error, fix="start it, and run the same command again: it goes on"
            ) from None
        return len(self._tasks)

    def _note(self, task: Any) -> None:
        """Tell of a worker that Ray has given up."""
        import ray

        try:
            ray.get(task)
        except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
            say(f"a worker was lost: {str(error).strip().splitlines()[-1]}")

    def start(self) -> None:
        """Submit all tasks."""
        import ray

        task = ray.remote(run_worker).options(num_cpus=1, max_retries=_RETRIES, retry_exceptions=True)
        count = self._workers.count
        self._tasks = [
            task.remote(
                (*self._workers.command, "--shard", f"{number}/{count}"),
                self._workers.environment(number),
                str(self._workers.log(number)),
                os.getcwd(),
            )
            for number in range(count)
        ]
        say(f"started {count} workers on {len(ray.nodes())} nodes")

    def cancel_waiting(self) -> None:
        """End the workers: all is done."""
        self.leave()

    def leave(self) -> None:
        """End the workers; their finished blocks stay."""
        import ray

        for task in self._tasks:
            ray.cancel(task, force=True)


def run_worker(words: Sequence[str], environment: Mapping[str, str], log: str, folder: str) -> int:
    """A worker process, which dies with the task that waits for it; returns its code."""
    with open(log, "ab") as said:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        code = process.wait()
    if code < 0:
        raise RuntimeError(f"a worker was killed by signal {-code}; its log is {log}")
    return code
