"""`--executor slurm` and `ray`: the work of a verb by workers that something else starts, under one progress bar.

The workers share the work as any others do, through claims and finished files; nothing here says what is done. They are
started again as long as blocks are finished between two starts.
"""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.artifacts.files import TEMPORARY_MARK, make_folder
from megatron_retro.artifacts.manifest import load_manifest, manifest_path
from megatron_retro.cli.executors.workers import AGAIN, Workers
from megatron_retro.config.data import ExecutorConfig, InputConfig, PreprocessConfig, TokenizerConfig
from megatron_retro.config.retrieval import RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.preprocessing.joining import is_finished
from megatron_retro.data.preprocessing.run import Run, plan_run
from megatron_retro.errors import ConfigError, EnvironmentProblem, MegatronRetroError
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.runtime.console import Progress, say
from megatron_retro.runtime.launch import Worker

POLL_SECONDS = 2.0
_SLURM_WORKERS = 16


class Executor(ABC):
    """Starts workers and knows how many are left."""

    @abstractmethod
    def left(self) -> int:
        """Workers that wait or run."""

    @abstractmethod
    def start(self) -> None:
        """Start all workers."""

    @abstractmethod
    def cancel_waiting(self) -> None:
        """All is done: who has not begun need not."""

    @abstractmethod
    def leave(self) -> None:
        """Whoever watched goes, before the work is done."""


@dataclass(frozen=True)
class _Stage:
    name: str
    done: int
    total: int | None
    unit: str


class _Work(ABC):
    """What a verb has done so far, as its files say."""

    folder: Path

    @abstractmethod
    def stage(self) -> _Stage:
        """The stage in work."""

    def is_finished(self) -> bool:
        """Whether there is nothing to start anybody for."""
        return False


class _Preprocessing(_Work):
    def __init__(self, run: Run) -> None:
        self._run = run
        self.folder = Path(f"{run.output.prefix}.workers")

    def stage(self) -> _Stage:
        return _Stage("preprocess", self._run.done_bytes(), self._run.job.num_bytes, "B")

    def is_finished(self) -> bool:
        return is_finished(self._run.job, self._run.output)


class _Building(_Work):
    def __init__(self, config: RetrievalConfig) -> None:
        self._layout, self._block_size = ProjectLayout(Path(config.retro_project_dir)), config.retro_block_size
        self.folder = self._layout.root / "work" / "workers"

    def stage(self) -> _Stage:
        layout = self._layout
        if layout.merged.exists():
            tables = sum(_count_files(folder) for folder in layout.root.glob("work/neighbors-*"))
            return _Stage("query", tables, None, "blocks")
        if layout.trained.exists() and manifest_path(layout.database).exists():
            chunks = int(load_manifest(layout.database).counts["chunks"])
            return _Stage("encode", _count_files(layout.codes), -(-chunks // self._block_size), "blocks")
        return _Stage("train", 0, None, "blocks")


def _count_files(folder: Path) -> int:
    try:
        return sum(TEMPORARY_MARK not in name for name in os.listdir(folder))
    except FileNotFoundError:
        return 0


def run_elsewhere(words: Sequence[str], settings: Settings) -> int:
    """Do what a command line says by workers of the executor that its settings name."""
    config = settings[ExecutorConfig]
    work = _work_of(words[0], settings)
    if work.is_finished():
        say("finished before, nothing to do")
        return 0
    if config.executor == "slurm":
        from megatron_retro.cli.executors.slurm_array import SlurmArray

        workers = Workers.of(words, config.executor_workers or _SLURM_WORKERS, work.folder)
        executor: Executor = SlurmArray(workers, config.sbatch_options or "")
    else:
        from megatron_retro.cli.executors.ray_tasks import RayTasks, connect

        slots = connect(config.ray_address)
        one_core = ("--workers", "1") if words[0] == "preprocess" else ()
        workers = Workers.of((*words, *one_core), config.executor_workers or slots, work.folder)
        executor = RayTasks(workers)
    make_folder(workers.folder)
    try:
        _run(executor, workers, work)
    except BaseException:
        executor.leave()
        raise
    shutil.rmtree(workers.folder, ignore_errors=True)
    return 0


def _work_of(verb: str, settings: Settings) -> _Work:
    if verb != "preprocess":
        return _Building(settings[RetrievalConfig])
    config = settings[PreprocessConfig]
    if config.merge_token_files is not None or config.checksum_token_files is not None:
        raise ConfigError(
            "--merge-token-files and --checksum-token-files are one process's work",
            got=f"--executor {settings[ExecutorConfig].executor}",
            expected="--executor local",
        )
    return _Preprocessing(plan_run(settings[InputConfig], config, settings[TokenizerConfig], Worker(0, 1)))


def _run(executor: Executor, workers: Workers, work: _Work) -> None:
    """Start workers until one of them says that all is done, as long as there is progress."""
    while True:
        before = work.stage()
        if executor.left() == 0:
            workers.forget_endings()
            executor.start()
        else:
            say(f"{workers.verb}: workers of an earlier start go on")
        while stage := _watch(executor, workers, work):
            say(f"{stage.name}: done")
        endings = workers.endings()
        if any(code == 0 for code, _, _ in endings):
            executor.cancel_waiting()
            say(f"{workers.verb}: done")
            return
        refused = next((ending for ending in endings if ending[0] not in AGAIN), None)
        if refused is not None:
            raise _as_worker_said(*refused)
        if work.stage() == before:
            raise EnvironmentProblem(
                "all workers ended, and no block was finished since they were started",
                got="; ".join(why for _, why, _ in endings) or "killed without a word",
                fix=f"see {workers.folder}; the same command goes on",
            )
        say(f"{workers.verb}: the workers ended before the work was done; they are started again")


def _watch(executor: Executor, workers: Workers, work: _Work) -> _Stage | None:
    """One bar of all workers; returns a stage when the next one begins, None when no worker is left or all is done."""
    stage = work.stage()
    with Progress(stage.name, stage.total, stage.unit, done=stage.done) as progress:
        while True:
            left, now = executor.left(), work.stage()
            if now.name != stage.name:
                return stage
            progress.advance(now.done - progress.done, f"{left} workers")
            if left == 0 or any(code == 0 for code, _, _ in workers.endings()):
                return None
            time.sleep(POLL_SECONDS)


def _as_worker_said(code: int, why: str, log: Path) -> MegatronRetroError:
    error = MegatronRetroError(f"a worker ended with code {code}: {why}", fix=f"its log is {log}")
    error.exit_code = code
    return error
