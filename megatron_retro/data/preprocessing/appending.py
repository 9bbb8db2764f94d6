"""Finished blocks appended to the output in the order of the input, while others are still made.

How far the output has come stands in `joined/N.json`, N blocks, which is written when their tokens are on the disk;
only then their part files go. Whoever goes on after a kill, or beside a worker that was taken for dead, writes the same
bytes at the same places, and the record of most blocks is the one that counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.manifest import read_sealed_json, write_sealed_json
from megatron_retro.data.preprocessing.blocks import (
    DOCUMENTS,
    LENGTHS,
    TOKENS,
    BlockCounts,
    counts_path,
    part_path,
    read_counts,
    require_unchanged,
)
from megatron_retro.data.preprocessing.job import PreprocessingJob
from megatron_retro.data.token_writer import Extent, TokenFileWriter

APPENDED_BYTES = 64 << 20  # of the input, at a time: each time costs a few flushes
_SPAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Joined:
    """The first `blocks` of a job, which are in the unfinished output: their counts, and the extent of each file."""

    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    refused: int = 0
    blank: int = 0
    extents: tuple[Extent, ...] = ()

    def with_block(self, counts: BlockCounts) -> Joined:
        """One more block."""
        return replace(
            self,
            blocks=self.blocks + 1,
            documents=self.documents + counts.documents,
            tokens=self.tokens + counts.tokens,
            refused=self.refused + counts.refused,
            blank=self.blank + counts.blank,
        )


def blocks_at_a_time(job: PreprocessingJob) -> int:
    """How many blocks are appended at a time."""
    return max(1, APPENDED_BYTES // job.block_bytes)


def count_joined(directory: Path) -> int:
    """How many blocks the output holds."""
    try:
        return max((int(name[:-5]) for name in os.listdir(directory / "joined") if name.endswith(".json")), default=0)
    except FileNotFoundError:
        return 0


def read_joined(directory: Path) -> Joined:
    """The record of the blocks that the output holds."""
    while blocks := count_joined(directory):
        try:
            fix = f"remove {directory} and run the same command again"
            content = read_sealed_json(_record_path(directory, blocks), Joined.__dataclass_fields__, fix=fix)
        except FileNotFoundError:
            continue  # another worker has come further
        return Joined(**{**content, "extents": tuple(Extent(**extent) for extent in content["extents"])})
    return Joined()


def _record_path(directory: Path, blocks: int) -> Path:
    return directory / "joined" / f"{blocks:06d}.json"


def are_ready(job: PreprocessingJob, directory: Path) -> bool:
    """Whether enough blocks are finished to append them; mostly one look at a file."""
    first = count_joined(directory)
    last = min(first + blocks_at_a_time(job), len(job.blocks)) - 1
    if last < first or not counts_path(directory, last).exists():
        return False
    return len(list(_finished(directory, range(first, last + 1)))) == last + 1 - first


def _finished(directory: Path, blocks: range) -> Iterator[BlockCounts]:
    """The counts of blocks up to the first that is not finished."""
    for block in blocks:
        counts = read_counts(directory, block)
        if counts is None:
            return
        yield counts


def append_finished(job: PreprocessingJob, directory: Path, targets: Sequence[str]) -> Joined:
    """Append the finished blocks that are next in order, a few at a time; `targets` has the prefix of each key."""
    joined = read_joined(directory)
    while True:
        last = min(joined.blocks + blocks_at_a_time(job), len(job.blocks))
        found = list(_finished(directory, range(joined.blocks, last)))
        if not found:
            return joined
        joined = _append(job, directory, targets, joined, found)


def _append(
    job: PreprocessingJob, directory: Path, targets: Sequence[str], joined: Joined, found: Sequence[BlockCounts]
) -> Joined:
    extents = joined.extents or [Extent() for _ in targets]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TokenFileWriter(target, job.dtype, directory, extent))
            for target, extent in zip(targets, extents, strict=True)
        ]
        before = joined
        for counts in found:
            for key, writer in enumerate(writers):
                _append_block(writer, directory, joined.blocks, key, counts)
            joined = joined.with_block(counts)
        joined = replace(joined, extents=tuple(writer.save() for writer in writers))
    write_sealed_json(_record_path(directory, joined.blocks), asdict(joined))
    if before.blocks:
        _record_path(directory, before.blocks).unlink(missing_ok=True)
    for block, counts in enumerate(found, before.blocks):
        for path in (counts_path(directory, block), *(directory / name for name in counts.token_pieces)):
            path.unlink(missing_ok=True)
    return joined


def _append_block(writer: TokenFileWriter, directory: Path, block: int, key: int, counts: BlockCounts) -> None:
    """Append the documents of a block, its part files verified on the way."""
    path = part_path(directory, block, key, TOKENS)
    no_lengths, no_sequences, found = np.zeros(0, np.int32), np.zeros(0, np.int64), 0
    with path.open("rb") as stream:
        while content := stream.read(_SPAN_BYTES):
            found = checksum_of(content, found)
            writer.add_documents(np.frombuffer(content, writer.dtype), no_lengths, no_sequences)
    require_unchanged(path, block, counts, found)
    arrays = []
    for kind in (LENGTHS, DOCUMENTS):
        path = part_path(directory, block, key, kind)
        content = path.read_bytes()
        require_unchanged(path, block, counts, checksum_of(content))
        arrays.append(np.frombuffer(content, "<i4"))
    writer.add_documents(np.zeros(0, writer.dtype), arrays[0], arrays[1].astype(np.int64))
