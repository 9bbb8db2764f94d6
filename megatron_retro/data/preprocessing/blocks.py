"""One block of work: its records tokenized into part files, refused records set aside, its counts written last.

A block's part files are a pure function of the job and the block, so any worker may write them, any number of times.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.files import named_disk_errors, temporary_name
from megatron_retro.artifacts.manifest import read_sealed_json, write_sealed_json
from megatron_retro.data.preprocessing.job import LINES, TEXT, PreprocessingJob
from megatron_retro.data.preprocessing.records import Record, RecordRefused, Texts, read_range, texts_of
from megatron_retro.data.preprocessing.tokenization import TextEncoder
from megatron_retro.errors import ArtifactError, DamagedArtifact, DataError
from megatron_retro.runtime.strict_json import json_text

TOKENS, LENGTHS, DOCUMENTS = "tokens", "lengths", "documents"
REFUSED, REASONS = ".refused", ".reasons"
PLAIN_FORMATS = (LINES, TEXT)
_BATCH_CHARACTERS = 1 << 20
_COPY_BYTES = 1 << 20
Report = Callable[[int, int, int], None]


@dataclass
class BlockCounts:
    """Counts of a block, sizes and checksums of its part files; written as JSON when all of these are in place."""

    documents: int = 0
    tokens: int = 0
    refused: int = 0
    blank: int = 0
    piece_bytes: dict[str, int] = field(default_factory=dict)
    piece_crc32: dict[str, int] = field(default_factory=dict)

    @property
    def token_pieces(self) -> list[str]:
        """The part files but those of refused records, which are joined last."""
        return [name for name in self.piece_bytes if not name.endswith((REFUSED, REASONS))]


def part_path(directory: Path, block: int, key: int, kind: str) -> Path:
    """A part file: the tokens, sequence lengths (i4) or sequences per document (i4) of one key."""
    return directory / f"{block:06d}.{key}.{kind}"


def refused_path(directory: Path, block: int) -> Path:
    """The refused records of a block, as they were read."""
    return directory / f"{block:06d}{REFUSED}"


def reasons_path(directory: Path, block: int) -> Path:
    """The reasons for refusing them, one line each."""
    return directory / f"{block:06d}{REASONS}"


def counts_path(directory: Path, block: int) -> Path:
    """The counts of a finished block."""
    return directory / f"{block:06d}.json"


def read_counts(directory: Path, block: int) -> BlockCounts | None:
    """The counts of a block if it is finished and its part files have their sizes."""
    fields = BlockCounts.__dataclass_fields__
    try:
        counts = BlockCounts(
            **read_sealed_json(counts_path(directory, block), fields, fix="run the same command again")
        )
        sizes = {name: os.path.getsize(directory / name) for name in counts.piece_bytes}
    except (FileNotFoundError, DamagedArtifact):
        return None
    return counts if sizes == counts.piece_bytes else None


class _PartFiles:
    """The files that a block writes, under temporary names until it is finished."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._streams: dict[Path, tuple[Path, BinaryIO]] = {}
        self.checksums: dict[str, int] = {}

    def write(self, path: Path, content: bytes | memoryview) -> None:
        if path not in self._streams:
            partial = temporary_name(path)
            self._streams[path] = (partial, partial.open("wb"))
        self._streams[path][1].write(content)
        self.checksums[path.name] = checksum_of(content, self.checksums.get(path.name, 0))

    def publish(self) -> dict[str, int]:
        sizes = {}
        for path, (partial, stream) in self._streams.items():
            sizes[path.name] = stream.tell()
            stream.close()
            os.replace(partial, path)
        return sizes

    def discard(self) -> None:
        for partial, stream in self._streams.values():
            stream.close()
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class BlockTokenizer:
    """Tokenizes the blocks of a job into one directory."""

    job: PreprocessingJob
    directory: Path
    encoder: TextEncoder
    eod: int

    def tokenize(self, block: int, report: Report) -> None:
        """Tokenize a block; `report` is called with the stored bytes, documents and tokens of each batch."""
        files = _PartFiles(self.directory)
        try:
            with named_disk_errors(self.directory):
                counts = self._fill(block, files, report)
                counts.piece_bytes, counts.piece_crc32 = files.publish(), files.checksums
                write_sealed_json(counts_path(self.directory, block), asdict(counts))
        finally:
            files.discard()

    def _fill(self, block: int, files: _PartFiles, report: Report) -> BlockCounts:
        counts = BlockCounts()
        dtype = np.dtype(self.job.dtype)
        for number in range(len(self.job.reading.json_keys)):
            for kind in (TOKENS, LENGTHS, DOCUMENTS):
                files.write(part_path(self.directory, block, number, kind), b"")
        for batch, stored_bytes in self._batches(block, files, counts):
            before = counts.tokens
            for number, key in enumerate(self.job.reading.json_keys):
                tokens, lengths, sequences = self._encode([texts[key] for texts in batch])
                for kind, array in (
                    (TOKENS, tokens.astype(dtype, copy=False)),
                    (LENGTHS, lengths),
                    (DOCUMENTS, sequences),
                ):
                    if array.size:
                        files.write(part_path(self.directory, block, number, kind), array.data.cast("B"))
                counts.tokens += tokens.size
            counts.documents += len(batch)
            report(stored_bytes, len(batch), counts.tokens - before)
        return counts

    def _encode(self, documents: Sequence[list[str]]) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
        """Tokens, sequence lengths and sequences per document, as Megatron stores them.

        A text without tokens is no sequence; a document without tokens is a document without sequences or eod.
        """
        owner = np.repeat(np.arange(len(documents)), [len(texts) for texts in documents])
        tokens, lengths = self.encoder.encode([text for texts in documents for text in texts])
        kept = lengths > 0
        owner, lengths = owner[kept], lengths[kept]
        if self.job.append_eod and len(lengths):
            is_last = np.append(owner[1:] != owner[:-1], True)
            tokens = np.insert(tokens, np.cumsum(lengths)[is_last], self.eod)
            lengths = lengths + is_last
        sequences = np.bincount(owner, minlength=len(documents)).astype(np.int32)
        return tokens, lengths.astype(np.int32), sequences

    def _batches(self, block: int, files: _PartFiles, counts: BlockCounts) -> Iterator[tuple[list[Texts], int]]:
        """Texts of about a million characters at a time, and the stored bytes that they took."""
        batch: list[Texts] = []
        characters = stored = 0
        for span in self.job.blocks[block]:
            share, seen = self.job.range_bytes(span), 0
            is_stored_plain = self.job.files[span.file].format in PLAIN_FORMATS
            for record in read_range(self.job, span):
                texts = self._usable(block, record, files, counts)
                amount = min(record.length, share - seen) if is_stored_plain else 0
                seen, stored = seen + amount, stored + amount
                if texts is not None:
                    batch.append(texts)
                    characters += sum(len(text) for parts in texts.values() for text in parts)
                if characters >= _BATCH_CHARACTERS or len(batch) >= 4096:
                    yield batch, stored
                    batch, characters, stored = [], 0, 0
            stored += share - seen
        yield batch, stored

    def _usable(self, block: int, record: Record, files: _PartFiles, counts: BlockCounts) -> Texts | None:
        try:
            texts = texts_of(record, self.job)
        except RecordRefused as reason:
            if self.job.reading.on_error == "stop":
                raise _stopped(record, str(reason)) from None
            counts.refused += 1
            files.write(reasons_path(self.directory, block), f"{record.place}: {reason}\n".encode())
            for content in _raw(record):
                files.write(refused_path(self.directory, block), content)
            return None
        counts.blank += texts is None
        return texts


def require_parts(directory: Path, block: int) -> None:
    """Refuse part files that have changed since they were written."""
    counts = read_counts(directory, block) or BlockCounts()
    for name in counts.piece_crc32:
        found = 0
        with (directory / name).open("rb") as stream:
            while content := stream.read(_COPY_BYTES):
                found = checksum_of(content, found)
        require_unchanged(directory / name, block, counts, found)


def require_unchanged(path: Path, block: int, counts: BlockCounts, found: int) -> None:
    """Refuse a part file whose checksum is another; the next run then makes its block again."""
    if found != counts.piece_crc32.get(path.name, found):
        counts_path(path.parent, block).unlink(missing_ok=True)
        raise DamagedArtifact(
            f"{path} has changed since it was written: its checksum is wrong",
            fix="run the same command again: its block is made anew, and nothing else",
        )


def _raw(record: Record) -> Iterator[bytes]:
    """A refused record as it stands in its file; one too long to be held is copied in parts."""
    if isinstance(record.content, bytes):
        yield record.content if record.content.endswith(b"\n") else record.content + b"\n"
    elif isinstance(record.content, dict):
        yield json_text(record.content, default=repr).encode() + b"\n"
    elif not record.path.endswith((".gz", ".zst")):
        left = record.length
        with open(record.path, "rb") as stream:
            stream.seek(record.offset)
            while left and (content := stream.read(min(left, _COPY_BYTES))):
                left -= len(content)
                yield content


def _stopped(record: Record, reason: str) -> DataError:
    line = f", line {_line_number(record)}" if record.unit == "byte" else ""
    return DataError(
        f"{record.place}{line}: {reason}",
        fix="correct the record, or give --on-error skip to set such records aside",
    )


def _line_number(record: Record) -> str:
    """The number of a record's line, counted only for an error."""
    if record.path.endswith((".gz", ".zst")):
        return "?"
    lines, left = 1, record.offset
    with open(record.path, "rb") as stream:
        while left and (content := stream.read(min(left, _COPY_BYTES))):
            lines += content.count(b"\n")
            left -= len(content)
    return str(lines)


def require_counts(job: PreprocessingJob, directory: Path, block: int) -> BlockCounts:
    """The counts of a block that must be finished."""
    counts = read_counts(directory, block)
    if counts is None:
        raise ArtifactError(
            f"{directory}: the part files of block {block} ({job.describe(block)}) are missing or cut",
            fix="run the same command again",
        )
    return counts
