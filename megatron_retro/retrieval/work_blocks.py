"""Work cut into blocks that any number of workers share: ranges, claims, samples, and computing some blocks again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.artifacts.files import fresh_name, make_folder
from megatron_retro.errors import ArtifactError, EnvironmentProblem
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.runtime.console import Progress
from megatron_retro.runtime.launch import Worker
from megatron_retro.runtime.signals import until_stopped
from megatron_retro.runtime.strict_json import json_text

_SEED = 1234


@dataclass(frozen=True)
class WorkBlock:
    """Items [first, last), which one worker does at a time."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The block in file names."""
        return f"{self.first:013d}-{self.last:013d}"

    @property
    def size(self) -> int:
        """The number of items."""
        return self.last - self.first


def cut_blocks(total: int, size: int) -> tuple[WorkBlock, ...]:
    """`total` items cut into blocks of `size`, the last one perhaps smaller."""
    return tuple(WorkBlock(first, min(first + size, total)) for first in range(0, total, size))


@contextmanager
def ignore_failure_if_done(is_done: Callable[[], bool]) -> Iterator[None]:
    """Ignore a failed write if the output exists: a worker that was taken for dead may be overtaken by another.

    Both write the same bytes, so the failure of one does not matter then.
    """
    try:
        yield
    except (OSError, ArtifactError, EnvironmentProblem):
        if not is_done():
            raise


def claim_blocks(
    layout: ProjectLayout, what: str, blocks: Sequence[str], is_done: Callable[[str], bool], worker: Worker
) -> Iterator[str]:
    """The blocks that this worker claims; ends when all are done, by any worker.

    Workers start at different places, so that they rarely try to claim the same block. A signal ends it with `Requeue`
    after the block in work.
    """
    start = worker.share(len(blocks)).start
    order = [*blocks[start:], *blocks[:start]]
    return until_stopped(iter(BlockClaims(layout.claims(what), order, is_done)))


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside others that vanishes afterwards, as do those of killed workers."""
    folder = fresh_name(path)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def uniform_sample(total: int, size: int) -> NDArray[np.int64]:
    """`size` of `total` numbers: one from each of `size` equal parts, the same ones every time."""
    within = np.random.default_rng(_SEED).random(size)
    return np.minimum(((np.arange(size) + within) * (total / size)).astype(np.int64), total - 1)


def key_of(facts: dict[str, Any]) -> str:
    """A name for unfinished work, which must never be taken for that from other inputs."""
    return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:12]


def recompute(what: str, files: Sequence[Path], share: float, write: Callable[[int, Path], None]) -> None:
    """Compute a share of finished `files` again (`write(number, path)`) and refuse the first that differs."""
    if share <= 0 or not files:
        return
    chosen = uniform_sample(len(files), max(1, round(share * len(files))))
    with (
        _scratch(files[0].parent.parent / "again") as folder,
        Progress(f"{what}: computing again", len(chosen), "blocks") as progress,
    ):
        for number in chosen.tolist():
            try:
                finished = files[number].read_bytes()
            except FileNotFoundError:
                continue  # published by another worker, who computed a share again before
            path = folder / files[number].name
            write(number, path)
            if path.read_bytes() != finished:
                raise ArtifactError(
                    f"{files[number]} is not what its inputs give",
                    fix="remove it and run the same command again; if it happens again, a machine computes wrongly",
                )
            path.unlink()
            progress.advance(1)
