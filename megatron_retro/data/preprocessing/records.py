"""Records of input ranges with their place in the file, read in bounded memory, and their texts by key.

A record longer than the limit is never held: its content is None, its place and length are known.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megatron_retro.data.preprocessing.frames import gzip_stream, zstd_stream
from megatron_retro.data.preprocessing.job import (
    ARRAY,
    ARROW,
    CSV,
    GZIP,
    LINES,
    PARQUET,
    TEXT,
    ZSTD,
    InputRange,
    PreprocessingJob,
)
from megatron_retro.data.preprocessing.tables import array_items, arrow_rows, csv_rows, parquet_rows
from megatron_retro.errors import DataError

COMPRESSED = {".gz": GZIP, ".zst": ZSTD}
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)  # what a compressed file that is cut or damaged raises
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"
Texts = dict[str, list[str]]


class RecordRefused(Exception):
    """Why a record cannot be used."""


@dataclass(frozen=True)
class Record:
    """A record and where it lies. `content` is bytes, or a row of a table; None when it is longer than allowed.

    `is_plain` says that it is text as such, not JSON.
    """

    path: str
    offset: int
    length: int
    content: bytes | dict[str, Any] | None
    unit: str = "byte"
    is_plain: bool = False

    @property
    def place(self) -> str:
        """Where the record lies, for messages."""
        return f"{self.path}, {self.unit} {self.offset}"


def read_range(job: PreprocessingJob, span: InputRange) -> Iterator[Record]:
    """The records that begin in a range."""
    file, limit, keys = job.files[span.file], job.reading.max_document_bytes, job.reading.json_keys
    if file.format in (PARQUET, ARROW):
        read = parquet_rows if file.format == PARQUET else arrow_rows
        yield from (Record(file.path, row, 1, content, "row") for row, content in read(file.path, span.start, keys))
    elif file.format == CSV:
        yield from (Record(file.path, row, 1, content, "row") for row, content in csv_rows(file.path, keys, limit))
    elif file.format == ARRAY:
        for number, item in array_items(file.path, limit):
            content = item.encode("utf-8", "surrogatepass")
            yield Record(file.path, number, len(content), content if len(content) <= limit else None, "element")
    elif file.format == LINES or (file.format == TEXT and job.reading.text_documents == "line"):
        with open(file.path, "rb", buffering=_READ_BYTES) as stream:
            for record in _lines_between(stream, file.path, span.start, span.stop, limit):
                yield replace(record, is_plain=True) if file.format == TEXT else record
    elif file.format == TEXT:
        yield _whole_file(file.path, file.bytes, limit)
    elif (span.start, span.stop) == (0, file.bytes):
        with _decompressed(file.path, file.format) as stream:
            yield from _with_named_errors(_lines(stream, file.path, 0, limit), file.path)
    else:
        yield from _with_named_errors(_lines_of_frames(file.path, file.format, span, limit), file.path)


def _lines_between(stream: BinaryIO, path: str, start: int, stop: int, limit: int) -> Iterator[Record]:
    """Lines whose first byte is in [start, stop)."""
    offset = start
    if start > 0:
        stream.seek(start - 1)
        while True:
            line = stream.readline(min(_READ_BYTES, stop - offset + 1))
            offset = stream.tell()
            if line.endswith(b"\n"):
                break
            if not line or offset >= stop:
                return
    for record in _lines(stream, path, offset, limit):
        if record.offset >= stop:
            return
        yield record


def _lines_of_frames(path: str, kind: str, span: InputRange, limit: int) -> Iterator[Record]:
    """Lines that begin behind the first byte of some frames, up to the first byte behind them; offsets count from them.

    What the frames before ended with is not known without reading them, so they go on to the end of a line that
    begins in these.
    """
    frames = gzip_stream(path, span.start, span.stop) if kind == GZIP else zstd_stream(path, span.start, span.stop)
    unit, offset = (f"compressed byte {span.start}, byte", 0) if span.start else ("byte", 0)
    with io.BufferedReader(frames, _READ_BYTES) as stream:
        while span.start and (line := stream.readline(_READ_BYTES)):
            offset += len(line)
            if line.endswith(b"\n"):
                break
        for record in _lines(stream, path, offset, limit):
            if frames.before_stop is not None and record.offset > frames.before_stop:
                return
            yield replace(record, unit=unit)


def _lines(stream: BinaryIO, path: str, offset: int, limit: int) -> Iterator[Record]:
    while line := stream.readline(limit + 2):
        length = len(line)
        too_long = length > limit and len(line.rstrip(b"\r\n")) > limit
        if not line.endswith(b"\n") and length == limit + 2:
            while rest := stream.readline(_READ_BYTES):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield Record(path, offset, length, None if too_long else line)
        offset += length


def _whole_file(path: str, size: int, limit: int) -> Record:
    if size > limit:
        return Record(path, 0, size, None, is_plain=True)
    with open(path, "rb") as stream:
        content = stream.read(limit + 1)
    return Record(path, 0, len(content), content if len(content) <= limit else None, is_plain=True)


def _decompressed(path: str, kind: str) -> BinaryIO:
    if kind == GZIP:
        return io.BufferedReader(gzip.open(path, "rb"), _READ_BYTES)
    return io.BufferedReader(zstd_stream(path), _READ_BYTES)


def opened(path: Path) -> BinaryIO:
    """A file's bytes, decompressed where its name says so."""
    kind = COMPRESSED.get(path.suffix)
    return path.open("rb") if kind is None else _decompressed(str(path), kind)


def _with_named_errors(records: Iterator[Record], path: str) -> Iterator[Record]:
    """Name a compressed file that is cut or damaged; it ends the run whatever --on-error says."""
    last = 0
    try:
        for record in records:
            last = record.offset + record.length
            yield record
    except BROKEN as error:
        raise DataError(
            f"{path} is cut or damaged after {last} decompressed bytes", got=error, fix="fetch or compress it again"
        ) from None


def texts_of(record: Record, job: PreprocessingJob) -> Texts | None:
    """The texts of a record by key (a list of them when the field is a list); None for a blank line."""
    reading = job.reading
    if record.content is None:
        raise RecordRefused(f"{record.length} bytes, more than --max-document-bytes {reading.max_document_bytes}")
    if isinstance(record.content, dict):
        return {key: _checked(record.content[key], key, reading.max_document_bytes) for key in reading.json_keys}
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordRefused(f"invalid UTF-8 at byte {record.offset + error.start}") from None
    if record.offset == 0:
        text = text.removeprefix(_BYTE_ORDER_MARK)
    if record.is_plain and reading.text_documents == "file":
        return {key: [text] for key in reading.json_keys}
    if not text or text.isspace():
        return None
    if record.is_plain:
        return {key: [text.rstrip("\r\n")] for key in reading.json_keys}
    return _fields(text, reading.json_keys, reading.max_document_bytes)


def _fields(text: str, keys: tuple[str, ...], limit: int) -> Texts:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordRefused(f"malformed JSON (a line holds one object): {error}") from None
    if not isinstance(value, dict):
        raise RecordRefused(f"a JSON {type(value).__name__} where an object is expected")
    missing = [key for key in keys if key not in value]
    if missing:
        raise RecordRefused(f"no key {missing[0]!r} (there are {', '.join(list(value)[:8])})")
    return {key: _checked(value[key], key, limit) for key in keys}


def _checked(value: Any, key: str, limit: int) -> list[str]:
    parts: list[str] = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str):
            raise RecordRefused(f"{key!r} is {'null' if part is None else type(part).__name__}, not text")
        if len(part) > limit:
            raise RecordRefused(f"{key!r} has {len(part)} characters, more than --max-document-bytes {limit}")
        if not part.isascii():
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                raise RecordRefused(f"{key!r} holds half a surrogate pair") from None
    return parts
