"""A preprocessing run from settings to finished token files, alone or as one of many workers on a shared directory.

The work directory `PREFIX.unfinished` holds the job, claims, the output so far and finished part files that are not in
it; the same command goes on from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.artifacts.manifest import load_manifest, manifest_path, read_sealed_json, write_sealed_json
from megatron_retro.config.data import InputConfig, PreprocessConfig, TokenizerConfig, WorkersConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.config.training import ObservabilityConfig
from megatron_retro.data.preprocessing.appending import Joined, are_ready, blocks_at_a_time, count_joined
from megatron_retro.data.preprocessing.blocks import BlockTokenizer, read_counts
from megatron_retro.data.preprocessing.job import PreprocessingJob, ReadOptions, find_inputs
from megatron_retro.data.preprocessing.joining import (
    Output,
    append_blocks,
    count_blocks,
    is_finished,
    join_blocks,
    join_target,
    unwritten_targets,
)
from megatron_retro.data.preprocessing.pool import Send, WorkerPool
from megatron_retro.data.preprocessing.token_files import describe_token_files, join_token_files, verify_file
from megatron_retro.data.preprocessing.tokenization import beginning_of, build_encoder
from megatron_retro.data.token_file import bin_path, idx_path, token_dtype
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError, EnvironmentProblem
from megatron_retro.runtime.console import Progress, readable_bytes, say, warn
from megatron_retro.runtime.launch import Worker, this_worker
from megatron_retro.runtime.signals import until_stopped

_JOIN = "join"
_PLAN = "plan.json"
_ATTEMPTS = 10


@dataclass(frozen=True)
class Run:
    """One run: its job, output files, tokenizer and worker."""

    job: PreprocessingJob
    output: Output
    tokenizer: Tokenizer
    worker: Worker

    @property
    def directory(self) -> Path:
        """The work directory."""
        return Path(self.output.prefix + ".unfinished")

    def is_done(self, block: str) -> bool:
        """Whether a block's part files, or the whole output, are in place."""
        return self._is_made(int(block)) or is_finished(self.job, self.output)

    def _is_made(self, block: int) -> bool:
        made = read_counts(self.directory, block) is not None
        return made or (self.output.grows and block < count_joined(self.directory))

    def remaining(self) -> list[int]:
        """Blocks that are not finished."""
        return [block for block in range(len(self.job.blocks)) if not self._is_made(block)]

    def done_bytes(self) -> int:
        """Stored bytes of finished blocks, for who watches others work: two folders are listed, nothing is opened."""
        try:
            made = {int(name[:-5]) for name in os.listdir(self.directory) if name[:-5].isdigit()}
        except FileNotFoundError:
            return self.job.num_bytes if is_finished(self.job, self.output) else 0
        made |= set(range(count_joined(self.directory) if self.output.grows else 0))
        return sum(self.job.range_bytes(span) for block in made for span in self.job.blocks[block])

    def claims(self, number: int, workers: int, *, wait: bool) -> Iterator[int]:
        """Unfinished blocks, each under a claim, about in order; worker `number` of this machine begins at its own.

        A signal ends it with `Requeue` after the block in work.
        """
        workers, number = self.worker.count * workers, self.worker.index * workers + number
        numbers = sorted(range(len(self.job.blocks)), key=lambda b: (b // workers, (b - number) % workers))
        order = [f"{block:06d}" for block in numbers]
        return until_stopped(self._with_late_ones(self._claimed(order, self.is_done, wait=wait), workers))

    def _with_late_ones(self, claimed: Iterator[str], workers: int) -> Iterator[int]:
        """Each block, then the one that the output waits for, if it is far behind and its worker is dead."""
        for name in claimed:
            yield int(name)
            joined = count_joined(self.directory) if self.output.grows else int(name)
            if int(name) - joined > 4 * workers + blocks_at_a_time(self.job):
                late = next((block for block in range(joined, int(name)) if not self._is_made(block)), None)
                if late is not None:
                    yield from map(int, self._claimed([f"{late:06d}"], self.is_done, wait=False))

    def join_targets(self, *, wait: bool) -> None:
        """Write the shards and shuffled files that no other worker has claimed, once all blocks are finished."""
        numbers = {f"target-{number:05d}": number for number in unwritten_targets(self.job, self.output)}
        for name in self._claimed(list(numbers), lambda name: self._is_written(numbers[name]), wait=wait):
            with self.overtaken(partial(self._is_written, numbers[name])):
                join_target(self.job, self.directory, self.output, numbers[name])

    def _is_written(self, number: int) -> bool:
        return number not in unwritten_targets(self.job, self.output)

    def finish_claim(self) -> Iterator[str]:
        """One claim, for the worker that joins the last blocks; the others wait for it."""
        return self._claimed([_JOIN], lambda _: is_finished(self.job, self.output), wait=True)

    def append(self) -> None:
        """Append finished blocks to the output if enough are ready and no other worker is at it."""
        if not self.output.grows or not are_ready(self.job, self.directory):
            return
        joined = count_joined(self.directory)
        for _ in self._claimed([_JOIN], lambda _: not are_ready(self.job, self.directory), wait=False):
            with self.overtaken(lambda: count_joined(self.directory) > joined):
                append_blocks(self.job, self.directory, self.output)

    def _claimed(self, blocks: Sequence[str], is_done: Callable[[str], bool], *, wait: bool) -> Iterator[str]:
        return iter(BlockClaims(self.directory / "claims", blocks, is_done, wait=wait))

    @contextmanager
    def overtaken(self, is_done: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Work that may fail in silence where another worker has done it, whose files are the same."""
        try:
            yield
        except (OSError, ArtifactError, EnvironmentProblem):
            if not is_done() and not is_finished(self.job, self.output):
                raise

    def tokenize(self, blocks: BlockTokenizer, block: int, report: Callable[[int, int, int], None]) -> None:
        """Make one block, and append what is ready."""
        with self.overtaken():
            blocks.tokenize(block, report)
        self.append()

    def block_tokenizer(self) -> BlockTokenizer:
        """The tokenizer of blocks in this process."""
        encoder = build_encoder(self.tokenizer, np.dtype(self.job.dtype), self.job.begins)
        return BlockTokenizer(self.job, self.directory, encoder, self.tokenizer.eod)


def preprocess(settings: Settings) -> None:
    """Make the token files that the settings name, from text or by joining others."""
    inputs, config = settings[InputConfig], settings[PreprocessConfig]
    if config.merge_token_files is not None:
        join_token_files(inputs, config, settings[TokenizerConfig].allow_tokenizer_mismatch)
        return
    if config.checksum_token_files is not None:
        describe_token_files(config.checksum_token_files)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    worker = this_worker(settings[WorkersConfig].shard)
    run = plan_run(inputs, config, settings[TokenizerConfig], worker)
    if _begin(run):
        say(f"{run.output.prefix}: finished before, nothing to do")
        return
    asked_to_log = settings.origin("log_interval") != DEFAULT_ORIGIN
    log_interval = settings[ObservabilityConfig].log_interval if asked_to_log else None
    try:
        workers = config.workers or len(os.sched_getaffinity(0))
        _tokenize_blocks(run, workers, log_interval)
        summary = _finish(run, workers)
    except BaseException:
        if run.worker.count == 1 and not _holds_work(run.directory):  # others may be about to claim a block
            shutil.rmtree(run.directory, ignore_errors=True)
        raise
    if config.verify:
        verify(run)
    _print_summary(run, summary)


def plan_run(inputs: InputConfig, config: PreprocessConfig, tokenizer_config: TokenizerConfig, worker: Worker) -> Run:
    """Check the settings and define the job; reads sizes and samples of the input, nothing else."""
    if inputs.input is None or config.output_prefix is None:
        raise ConfigError("--input and --output-prefix are needed", got=f"{inputs.input} and {config.output_prefix}")
    if len(set(inputs.json_keys)) < len(inputs.json_keys):
        raise ConfigError("--json-keys names a key twice", got=" ".join(inputs.json_keys))
    tokenizer = build_tokenizer(tokenizer_config)
    reading = ReadOptions(inputs.json_keys, inputs.text_documents, inputs.max_document_bytes, inputs.on_error)
    dtype, begins = str(token_dtype(tokenizer.vocab_size)), beginning_of(tokenizer, config)
    job = PreprocessingJob(find_inputs(inputs.input), reading, config.append_eod, tokenizer.fingerprint, dtype, begins)
    facts: dict[str, Any] = {
        "tokenizer_type": tokenizer_config.tokenizer_type,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    output = Output(config.output_prefix, config.shards, config.shuffle_documents, facts)
    return Run(job, output, tokenizer, worker)


def _begin(run: Run) -> bool:
    """Open the work directory, which a worker that ends may remove meanwhile; whether the run is finished instead."""
    for left in reversed(range(_ATTEMPTS)):
        if is_finished(run.job, run.output):
            shutil.rmtree(run.directory, ignore_errors=True)  # a kill may have come between the last file and this
            return True
        try:
            _open_work_directory(run)
            break
        except FileNotFoundError:
            if left == 0:
                raise
    return False


def _open_work_directory(run: Run) -> None:
    """Open the work directory, to begin or to go on; that of another job is refused, and so are files of others."""
    plan_file = run.directory / _PLAN
    is_ours = plan_file.exists() and _holds_work(run.directory)
    if is_ours:
        fields = {"fingerprint", *asdict(run.job)}
        stored = read_sealed_json(plan_file, fields, fix=f"remove {run.directory} and run the same command again")
        back_to_stop = stored["reading"]["on_error"] == "skip" and run.job.reading.on_error == "stop"
        if stored["fingerprint"] != run.job.fingerprint or back_to_stop:
            raise ArtifactError(
                f"{run.directory} holds unfinished work of another run",
                got="other " + ", ".join(run.job.differences(stored)[:5]),
                fix="finish that run with its own settings, or remove the directory",
            )
    for key, shard, target in run.output.targets(run.job):
        _require_free(target, run.output.config_of(run.job, key, shard), is_ours or run.worker.count > 1)
    write_sealed_json(plan_file, {"fingerprint": run.job.fingerprint, **asdict(run.job)})


def _holds_work(directory: Path) -> bool:
    """Whether a work directory has more in it than the job: a run that failed before its first block left none."""
    return any(name != _PLAN for _, _, names in os.walk(directory) for name in names)


def _require_free(target: str, config: dict[str, Any], may_be_unfinished: bool) -> None:
    """Refuse to write over files that are not this run's."""
    path = next((path for path in (bin_path(target), idx_path(target)) if path.exists()), None)
    if path is None:
        return
    finished = manifest_path(Path(target)).exists()
    if load_manifest(Path(target)).config != config if finished else not may_be_unfinished:
        raise ArtifactError(
            f"{path} exists already" + (", made by another run" if finished else ""),
            fix="remove it, or give another --output-prefix",
        )


def _tokenize_blocks(run: Run, workers: int, log_interval: int | None) -> None:
    left = run.remaining()
    total = sum(run.job.range_bytes(span) for block in left for span in run.job.blocks[block])
    with Progress("preprocess", total, "B") as progress:
        log = _Log(progress, log_interval)
        workers = max(1, min(workers, len(left)))
        if workers == 1:
            _tokenize_here(run, log)
            return
        blocks = run.block_tokenizer()  # before the fork: the processes share its vocabulary
        pool = WorkerPool(workers, partial(_work, run, blocks, workers), log, run.job.describe)
        pool.run()
        _tokenize_here(run, log)


class _Log:
    """Adds up the counts that workers report."""

    def __init__(self, progress: Progress, log_interval: int | None) -> None:
        self._progress, self._interval = progress, log_interval
        self._documents = self._tokens = 0

    def __call__(self, facts: tuple[int, int, int]) -> None:
        stored, documents, tokens = facts
        before = self._documents
        self._documents, self._tokens = before + documents, self._tokens + tokens
        self._progress.advance(stored, f"{self._documents} documents, {self._tokens} tokens")
        if self._interval and self._documents // self._interval > before // self._interval:
            say(f"{self._documents} documents, {self._tokens} tokens, {self._progress.facts()}")


def _work(run: Run, blocks: BlockTokenizer, workers: int, number: int, send: Send) -> None:
    """The work of a worker process: blocks that no other worker has claimed."""
    for block in run.claims(number, workers, wait=False):
        send("block", block)
        run.tokenize(blocks, block, lambda *facts: send("progress", facts))


def _tokenize_here(run: Run, log: _Log) -> None:
    """Tokenize all unfinished blocks in this process; waits for blocks that other machines have claimed."""
    if not run.remaining():
        return
    blocks = run.block_tokenizer()
    for block in run.claims(0, 1, wait=True):
        run.tokenize(blocks, block, lambda *facts: log(facts))


def _finish(run: Run, workers: int) -> Joined | None:
    """Join what is left: by one worker, or targets shared by all. None where another worker did."""
    joined = None
    if run.output.grows:
        for _ in run.finish_claim():
            with run.overtaken():
                joined = join_blocks(run.job, run.directory, run.output)
    else:
        with run.overtaken():
            joined = count_blocks(run.job, run.directory, run.output)
        workers = min(workers, len(unwritten_targets(run.job, run.output)))
        if workers > 1:
            WorkerPool(workers, lambda *_: run.join_targets(wait=False), lambda _: None, run.job.describe).run()
        run.join_targets(wait=True)
    shutil.rmtree(run.directory, ignore_errors=True)
    return joined


def verify(run: Run) -> None:
    """Read the finished files again; any fault is an error."""
    for _, _, target in run.output.targets(run.job):
        verify_file(target, run.tokenizer.vocab_size)


def _print_summary(run: Run, summary: Joined | None) -> None:
    if summary is None:
        say(f"{run.output.prefix}: finished by another worker")
        return
    say(
        f"{summary.documents} documents, {summary.tokens} tokens from {readable_bytes(run.job.num_bytes)}"
        + (f"; {summary.blank} blank lines" if summary.blank else "")
    )
    if summary.refused:
        warn(f"{summary.refused} records were refused; see {run.output.prefix}.refused.txt and .refused.jsonl")
    for _, _, target in run.output.targets(run.job):
        say(f"wrote {target}.bin and .idx")
