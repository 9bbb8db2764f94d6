"""Part files of all blocks joined to token files, in the order of the input or shuffled.

One token file in the order of the input grows while blocks are made (`appending.py`); shards and a shuffled order want
to know how many documents there are, so they are joined in one pass at the end, each target by a worker that claims it.
Only the manifest, written last, makes a target finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import has_size, new_file
from megatron_retro.artifacts.manifest import manifest_path, read_manifest
from megatron_retro.data.order import key_of, permuted
from megatron_retro.data.preprocessing.appending import Joined, append_finished
from megatron_retro.data.preprocessing.blocks import (
    DOCUMENTS,
    LENGTHS,
    TOKENS,
    part_path,
    reasons_path,
    refused_path,
    require_counts,
    require_parts,
)
from megatron_retro.data.preprocessing.job import PreprocessingJob
from megatron_retro.data.token_file import KIND, MANIFEST_VERSION
from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.errors import ArtifactError, DataError

_SPAN_BYTES = 1 << 20
_SHUFFLED_SPAN = 1 << 14


@dataclass(frozen=True)
class Output:
    """Where the output goes, how it is sharded and shuffled, and facts of the tokenizer for its manifest."""

    prefix: str
    shards: int
    shuffle_seed: int | None
    tokenizer_facts: dict[str, Any]

    @property
    def grows(self) -> bool:
        """Whether blocks are appended while others are made."""
        return self.shards == 1 and self.shuffle_seed is None

    def target(self, key: str, shard: int) -> str:
        """The prefix of one token file."""
        part = f"_{shard:05d}-of-{self.shards:05d}" if self.shards > 1 else ""
        return f"{self.prefix}{part}_{key}_document"

    def targets(self, job: PreprocessingJob) -> list[tuple[int, int, str]]:
        """Key number, shard and prefix of every token file."""
        keys = job.reading.json_keys
        return [(n, shard, self.target(key, shard)) for n, key in enumerate(keys) for shard in range(self.shards)]

    def config_of(self, job: PreprocessingJob, key: int, shard: int) -> dict[str, Any]:
        """The configuration in the manifest of a target."""
        return {
            **self.tokenizer_facts,
            "plan": job.fingerprint,
            "json_key": job.reading.json_keys[key],
            "append_eod": job.append_eod,
            **({"begins": list(job.begins)} if job.begins else {}),
            "shard": [shard, self.shards],
            "shuffle_documents": self.shuffle_seed,
        }


def is_finished(job: PreprocessingJob, output: Output) -> bool:
    """Whether every target is there, written by this job."""
    return all(_is_written(target, output.config_of(job, key, shard)) for key, shard, target in output.targets(job))


def _is_written(target: str, config: dict[str, Any]) -> bool:
    if not manifest_path(Path(target)).exists():
        return False
    try:
        manifest = read_manifest(Path(target), kind=KIND, version=MANIFEST_VERSION)
    except ArtifactError:
        return False
    if manifest.config != config:
        return False
    return all(has_size(Path(target).with_name(name), record.bytes) for name, record in manifest.files.items())


def append_blocks(job: PreprocessingJob, directory: Path, output: Output) -> Joined:
    """Append the finished blocks that are next in order to an output that grows."""
    return append_finished(job, directory, [target for _, _, target in output.targets(job)])


def unwritten_targets(job: PreprocessingJob, output: Output) -> list[int]:
    """The numbers of the targets that are not finished."""
    found = enumerate(output.targets(job))
    return [
        number for number, (key, shard, target) in found if not _is_written(target, output.config_of(job, key, shard))
    ]


def join_target(job: PreprocessingJob, directory: Path, output: Output, number: int) -> None:
    """Write one target of an output that does not grow; all blocks are finished."""
    _write_target(job, directory, output, number, *_counted(job, directory, output))


def join_blocks(job: PreprocessingJob, directory: Path, output: Output) -> Joined:
    """Append what is left, and write every target: the last manifest says that all is there. Returns the counts."""
    joined, documents = _counted(job, directory, output)
    for number in unwritten_targets(job, output):
        _write_target(job, directory, output, number, joined, documents)
    return joined


def count_blocks(job: PreprocessingJob, directory: Path, output: Output) -> Joined:
    """The counts of an output that does not grow; all blocks are finished."""
    return _counted(job, directory, output)[0]


def _counted(job: PreprocessingJob, directory: Path, output: Output) -> tuple[Joined, NDArray[np.int64]]:
    """The counts of all blocks, and how many documents there are before each that was not appended yet."""
    joined = append_blocks(job, directory, output) if output.grows else Joined()
    documents = [0]
    for block in range(joined.blocks, len(job.blocks)):
        joined = joined.with_block(require_counts(job, directory, block))
        documents.append(joined.documents)
    if joined.documents == 0:
        raise DataError(f"the input holds no documents ({len(job.files)} files, {job.num_bytes} bytes)")
    if joined.documents < output.shards:
        raise DataError("fewer documents than --shards", got=joined.documents, expected=f"{output.shards} or more")
    return joined, np.array(documents)


def _write_target(
    job: PreprocessingJob,
    directory: Path,
    output: Output,
    number: int,
    joined: Joined,
    documents: NDArray[np.int64],
) -> None:
    """Write a target; before the first one, the refused records."""
    key, shard, target = output.targets(job)[number]
    if number == 0:
        for suffix, part in ((".refused.jsonl", refused_path), (".refused.txt", reasons_path)):
            parts = [part(directory, block) for block in range(len(job.blocks))]
            _concatenate(Path(output.prefix + suffix), parts, lambda: 0 not in unwritten_targets(job, output))
    place = (directory, joined.extents[key]) if output.grows else ()
    with TokenFileWriter(target, job.dtype, *place) as writer:
        if not output.grows:
            _append_shard(writer, directory, key, documents, shard, output)
        config = output.config_of(job, key, shard)
        writer.finalize(inputs={"text": job.fingerprint, "tokenizer": job.tokenizer}, config=config)


def _append_shard(
    writer: TokenFileWriter, directory: Path, key: int, before: NDArray[np.int64], shard: int, output: Output
) -> None:
    first, last = (int(before[-1]) * part // output.shards for part in (shard, shard + 1))
    if output.shuffle_seed is None:
        _append_in_order(writer, directory, key, before, first, last)
    else:
        _append_shuffled(writer, directory, key, before, (first, last), output.shuffle_seed)


def _append_in_order(
    writer: TokenFileWriter, directory: Path, key: int, before: NDArray[np.int64], first: int, last: int
) -> None:
    for block in range(len(before) - 1):
        start, stop = max(first, int(before[block])), min(last, int(before[block + 1]))
        if start >= stop:
            continue
        require_parts(directory, block)
        sequences = np.fromfile(part_path(directory, block, key, DOCUMENTS), "<i4")
        lengths = np.fromfile(part_path(directory, block, key, LENGTHS), "<i4")
        start, stop = start - int(before[block]), stop - int(before[block])
        low, high = int(sequences[:start].sum(dtype=np.int64)), int(sequences[:stop].sum(dtype=np.int64))
        skipped = int(lengths[:low].sum(dtype=np.int64))
        wanted = int(lengths[low:high].sum(dtype=np.int64))
        for tokens in _token_spans(part_path(directory, block, key, TOKENS), writer.dtype, skipped, wanted):
            writer.add_documents(tokens, np.zeros(0, np.int32), np.zeros(0, np.int64))
        writer.add_documents(np.zeros(0, writer.dtype), lengths[low:high], sequences[start:stop].astype(np.int64))


def _token_spans(path: Path, dtype: np.dtype[Any], skipped: int, wanted: int) -> Iterator[NDArray[Any]]:
    with path.open("rb") as stream:
        stream.seek(skipped * dtype.itemsize)
        left = wanted * dtype.itemsize
        while left:
            content = stream.read(min(left, _SPAN_BYTES))
            if not content:
                raise ArtifactError(f"{path} is cut", fix="run the same command again")
            left -= len(content)
            yield np.frombuffer(content, dtype)


def _append_shuffled(
    writer: TokenFileWriter,
    directory: Path,
    key: int,
    before: NDArray[np.int64],
    span: tuple[int, int],
    seed: int,
) -> None:
    """Append positions [first, last) of the shuffled order; within a span, documents are read block by block."""
    total = int(before[-1])
    for block in range(len(before) - 1):
        require_parts(directory, block)
    for start in range(span[0], span[1], _SHUFFLED_SPAN):
        positions = np.arange(start, min(start + _SHUFFLED_SPAN, span[1]))
        documents = permuted(positions, total, key_of(seed, total))
        found: list[tuple[NDArray[Any], NDArray[np.int32]]] = [(np.zeros(0), np.zeros(0, np.int32))] * len(documents)
        owners = np.searchsorted(before, documents, side="right") - 1
        for block in np.unique(owners):
            chosen = np.flatnonzero(owners == block)
            local = documents[chosen] - before[block]
            for place, document in zip(
                chosen, _documents(directory, int(block), key, local, writer.dtype), strict=True
            ):
                found[place] = document
        writer.add_documents(
            np.concatenate([tokens for tokens, _ in found]).astype(writer.dtype, copy=False),
            np.concatenate([lengths for _, lengths in found]),
            np.array([len(lengths) for _, lengths in found]),
        )


def _documents(
    directory: Path, block: int, key: int, documents: NDArray[np.int64], dtype: np.dtype[Any]
) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
    """Tokens and sequence lengths of some documents of a block."""
    sequences = np.fromfile(part_path(directory, block, key, DOCUMENTS), "<i4")
    lengths = np.fromfile(part_path(directory, block, key, LENGTHS), "<i4")
    sequence_starts = np.cumsum([0, *sequences], dtype=np.int64)
    token_starts = np.append(0, np.cumsum(lengths, dtype=np.int64))
    with part_path(directory, block, key, TOKENS).open("rb") as stream:
        for document in documents:
            low, high = int(sequence_starts[document]), int(sequence_starts[document + 1])
            stream.seek(int(token_starts[low]) * dtype.itemsize)
            amount = int(token_starts[high] - token_starts[low])
            yield np.frombuffer(stream.read(amount * dtype.itemsize), dtype), lengths[low:high]


def _concatenate(path: Path, parts: Sequence[Path], is_overtaken: Callable[[], bool]) -> None:
    """Join part files that are there; once another worker has, they may be going and what it wrote stays."""
    present = [part for part in parts if part.exists()]
    with new_file(path) as partial:
        with partial.open("wb") as output:
            for part in present:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, output, _SPAN_BYTES)
        if is_overtaken():
            raise ArtifactError(f"{path} was written by another worker meanwhile")
    if not present:
        path.unlink()
