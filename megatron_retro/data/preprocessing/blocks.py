"""One block of work: its records tokenized into piece files, refused records set aside, a record of it all last.

A block's pieces are a pure function of the plan and the block, so it does not matter who makes them or how often.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import named_disk_errors, temporary_name, write_file
from megatron_retro.data.preprocessing.encoding import Encoder
from megatron_retro.data.preprocessing.plan import LINES, TEXT, Plan
from megatron_retro.data.preprocessing.records import Record, Refused, Texts, read_segment, texts_of
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.runtime.strict_json import json_text

TOKENS, LENGTHS, DOCUMENTS = "tokens", "lengths", "documents"
PLAIN_FORMATS = (LINES, TEXT)
_BATCH_CHARACTERS = 1 << 20
_WARM_PLACES = 4
_COPY_BYTES = 1 << 20
Report = Callable[[int, int, int], None]


@dataclass
class BlockCounts:
    """What a block holds; written as JSON when all of its pieces are in place."""

    documents: int = 0
    tokens: int = 0
    refused: int = 0
    blank: int = 0
    piece_bytes: dict[str, int] = field(default_factory=dict)


def piece_path(directory: Path, block: int, key: int, kind: str) -> Path:
    """A piece: the tokens, sequence lengths (i4) or sequences per document (i4) of one key."""
    return directory / f"{block:06d}.{key}.{kind}"


def refused_path(directory: Path, block: int) -> Path:
    """The refused records of a block, as they were read."""
    return directory / f"{block:06d}.refused"


def reasons_path(directory: Path, block: int) -> Path:
    """Why they were refused, one line each."""
    return directory / f"{block:06d}.reasons"


def counts_path(directory: Path, block: int) -> Path:
    """The record of a finished block."""
    return directory / f"{block:06d}.json"


def read_counts(directory: Path, block: int) -> BlockCounts | None:
    """The record of a block if it is finished and its pieces have their sizes."""
    try:
        counts = BlockCounts(**json.loads(counts_path(directory, block).read_text()))
        sizes = {name: os.path.getsize(directory / name) for name in counts.piece_bytes}
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return counts if sizes == counts.piece_bytes else None


class _Pieces:
    """The files that a block writes, under temporary names until it is finished."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._streams: dict[Path, tuple[Path, BinaryIO]] = {}

    def write(self, path: Path, content: bytes | memoryview) -> None:
        if path not in self._streams:
            partial = temporary_name(path)
            self._streams[path] = (partial, partial.open("wb"))
        self._streams[path][1].write(content)

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
class BlockMaker:
    """Makes blocks of one plan in one directory."""

    plan: Plan
    directory: Path
    encoder: Encoder
    eod: int

    def make(self, block: int, report: Report) -> None:
        """Tokenize a block. `report` is told of stored bytes, documents and tokens done as it goes."""
        pieces = _Pieces(self.directory)
        try:
            with named_disk_errors(self.directory):
                counts = self._fill(block, pieces, report)
                counts.piece_bytes = pieces.publish()
                write_file(counts_path(self.directory, block), json_text(asdict(counts)))
        finally:
            pieces.discard()

    def warm_up(self) -> None:
        """Let the encoder learn the words of a few places of the input, for the processes that are forked from here."""
        plain = [block for block in self.plan.blocks if self.plan.files[block[0].file].format in PLAIN_FORMATS]
        for place in range(_WARM_PLACES if plain else 0):
            texts: list[str] = []
            characters = 0
            for record in read_segment(self.plan, plain[len(plain) * place // _WARM_PLACES][0]):
                if characters >= _BATCH_CHARACTERS:
                    break
                with suppress(Refused):  # whoever makes the block reports it
                    found = texts_of(record, self.plan) or {}
                    texts += [text for parts in found.values() for text in parts]
                characters += record.length
            self.encoder.encode(texts)

    def _fill(self, block: int, pieces: _Pieces, report: Report) -> BlockCounts:
        counts = BlockCounts()
        dtype = np.dtype(self.plan.dtype)
        for number in range(len(self.plan.reading.json_keys)):
            for kind in (TOKENS, LENGTHS, DOCUMENTS):
                pieces.write(piece_path(self.directory, block, number, kind), b"")
        for batch, stored_bytes in self._batches(block, pieces, counts):
            before = counts.tokens
            for number, key in enumerate(self.plan.reading.json_keys):
                tokens, lengths, sequences = self._encode([texts[key] for texts in batch])
                for kind, array in (
                    (TOKENS, tokens.astype(dtype, copy=False)),
                    (LENGTHS, lengths),
                    (DOCUMENTS, sequences),
                ):
                    if array.size:
                        pieces.write(piece_path(self.directory, block, number, kind), array.data.cast("B"))
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
        if self.plan.append_eod and len(lengths):
            is_last = np.append(owner[1:] != owner[:-1], True)
            tokens = np.insert(tokens, np.cumsum(lengths)[is_last], self.eod)
            lengths = lengths + is_last
        sequences = np.bincount(owner, minlength=len(documents)).astype(np.int32)
        return tokens, lengths.astype(np.int32), sequences

    def _batches(self, block: int, pieces: _Pieces, counts: BlockCounts) -> Iterator[tuple[list[Texts], int]]:
        """Texts of about a million characters at a time, and the stored bytes that they took."""
        batch: list[Texts] = []
        characters = stored = 0
        for segment in self.plan.blocks[block]:
            share, seen = self.plan.segment_bytes(segment), 0
            is_stored_plain = self.plan.files[segment.file].format in PLAIN_FORMATS
            for record in read_segment(self.plan, segment):
                texts = self._usable(block, record, pieces, counts)
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

    def _usable(self, block: int, record: Record, pieces: _Pieces, counts: BlockCounts) -> Texts | None:
        try:
            texts = texts_of(record, self.plan)
        except Refused as reason:
            if self.plan.reading.on_error == "stop":
                raise _stopped(record, str(reason)) from None
            counts.refused += 1
            pieces.write(reasons_path(self.directory, block), f"{record.place}: {reason}\n".encode())
            for piece in _raw(record):
                pieces.write(refused_path(self.directory, block), piece)
            return None
        counts.blank += texts is None
        return texts


def _raw(record: Record) -> Iterator[bytes]:
    """A refused record as it stands in its file; one that was never held is copied piece by piece."""
    if isinstance(record.content, bytes):
        yield record.content if record.content.endswith(b"\n") else record.content + b"\n"
    elif isinstance(record.content, dict):
        yield json_text(record.content, default=repr).encode() + b"\n"
    elif not record.path.endswith((".gz", ".zst")):
        left = record.length
        with open(record.path, "rb") as stream:
            stream.seek(record.offset)
            while left and (piece := stream.read(min(left, _COPY_BYTES))):
                left -= len(piece)
                yield piece


def _stopped(record: Record, reason: str) -> DataError:
    line = f", line {_line_number(record)}" if record.unit == "byte" else ""
    return DataError(
        f"{record.place}{line}: {reason}",
        fix="correct the record, or give --on-error skip to set such records aside",
    )


def _line_number(record: Record) -> str:
    """Lines are counted only when one has to be named."""
    if record.path.endswith((".gz", ".zst")):
        return "?"
    lines, left = 1, record.offset
    with open(record.path, "rb") as stream:
        while left and (piece := stream.read(min(left, _COPY_BYTES))):
            lines += piece.count(b"\n")
            left -= len(piece)
    return str(lines)


def require_counts(plan: Plan, directory: Path, block: int) -> BlockCounts:
    """The record of a block that must be finished."""
    counts = read_counts(directory, block)
    if counts is None:
        raise ArtifactError(
            f"{directory}: the pieces of block {block} ({plan.describe(block)}) are missing or cut",
            fix="run the same command with --resume",
        )
    return counts
