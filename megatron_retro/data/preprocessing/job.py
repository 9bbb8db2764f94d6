"""A preprocessing job: its input files, cut into blocks of work that do not depend on the workers.

A block is one or more input ranges: bytes of a plain file, a row group of a Parquet file, a batch of an Arrow file, or
frames of a compressed file, or a whole file of another kind.
The job's fingerprint says whether unfinished work on disk belongs to it. Its file is called `plan.json`.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.data.preprocessing.frames import bgzf_members, cuts_of, zstd_frames
from megatron_retro.data.preprocessing.tables import num_batches, num_row_groups
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.runtime.console import say
from megatron_retro.runtime.strict_json import json_text

SMALLEST_BLOCK = 8 << 20
MOST_BLOCKS = 4096
LINES, TEXT, GZIP, ZSTD, PARQUET = "lines", "text", "gzip", "zstd", "parquet"
ARROW, CSV, ARRAY = "arrow", "csv", "array"
BY_PART = {PARQUET: "row group", ARROW: "batch"}
_ENDINGS = {
    ".jsonl.gz": GZIP,
    ".json.gz": GZIP,
    ".jsonl.zst": ZSTD,
    ".json.zst": ZSTD,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".csv": CSV,
    ".tsv": CSV,
    ".jsonl": LINES,
    ".json": LINES,
    ".ndjson": LINES,
}
# What Hugging Face's datasets writes beside its Arrow files.
_FACTS_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class InputFile:
    """A file of the input as it was when the job was defined.

    `row_groups` counts an Arrow file's batches, too; a compressed file may be cut at `cuts`, where frames begin.
    """

    path: str
    format: str
    bytes: int
    content: str
    row_groups: int = 0
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputRange:
    """A range of one input file: bytes [start, stop), or row group or batch `start`."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class ReadOptions:
    """How records are read and which are refused."""

    json_keys: tuple[str, ...]
    text_documents: str
    max_document_bytes: int
    on_error: str


@dataclass(frozen=True)
class PreprocessingJob:
    """The inputs and everything else that the output depends on."""

    files: tuple[InputFile, ...]
    reading: ReadOptions
    append_eod: bool
    tokenizer: str
    dtype: str
    begins: tuple[int, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Of the content, not of where it lies."""
        facts = asdict(self)
        del facts["reading"]["on_error"]  # blocks that are finished held no fault, or set it aside
        if not self.begins:
            del facts["begins"]
        for file in facts["files"]:
            file["path"] = Path(file["path"]).name
            if not file["cuts"]:
                del file["cuts"]
        return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """How another job, as it was stored, differs."""
        mine: dict[str, Any] = json.loads(json_text(asdict(self)))
        theirs = {**stored, **stored.get("reading", {})}
        facts = {**mine.pop("reading"), **mine}
        files, others = (
            {Path(file["path"]).name: file["content"] for file in found["files"]} for found in (facts, theirs)
        )
        changed = sorted(name for name in files | others if files.get(name) != others.get(name))
        names = [name for name in facts if name != "files" and theirs.get(name) != facts[name]]
        return [f"input {name}" for name in changed] + [
            f"{name.replace('_', '-')} {theirs.get(name)}" for name in names
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs as stored."""
        return sum(file.bytes for file in self.files)

    @property
    def block_bytes(self) -> int:
        """Stored bytes of a block, where the input can be cut."""
        return max(SMALLEST_BLOCK, -(-self.num_bytes // MOST_BLOCKS))

    @cached_property
    def blocks(self) -> tuple[tuple[InputRange, ...], ...]:
        """The input in order, cut into blocks."""
        size = self.block_bytes
        return tuple(_packed(((span, self.range_bytes(span)) for span in self._ranges(size)), size))

    def _ranges(self, size: int) -> Iterator[InputRange]:
        for number, file in enumerate(self.files):
            if file.format in BY_PART:
                yield from (InputRange(number, group, group + 1) for group in range(file.row_groups))
            elif file.format == LINES or (file.format == TEXT and self.reading.text_documents == "line"):
                starts = range(0, file.bytes, size)
                yield from (InputRange(number, start, min(start + size, file.bytes)) for start in starts)
            else:
                start = 0
                for cut in file.cuts:
                    if cut - start >= size:
                        yield InputRange(number, start, cut)
                        start = cut
                yield InputRange(number, start, file.bytes)

    def range_bytes(self, span: InputRange) -> int:
        """The stored bytes of a range, for the progress bar."""
        file = self.files[span.file]
        return file.bytes // max(file.row_groups, 1) if file.format in BY_PART else span.stop - span.start

    def describe(self, block: int) -> str:
        """The input range of a block, for messages."""
        first, last = self.blocks[block][0], self.blocks[block][-1]
        path = self.files[first.file].path
        if len(self.blocks[block]) > 1:
            return f"files {path} to {self.files[last.file].path}"
        if part := BY_PART.get(self.files[first.file].format):
            return f"{part} {first.start} of {path}"
        return f"bytes {first.start} to {first.stop} of {path}"


def _packed(ranges: Iterable[tuple[InputRange, int]], size: int) -> Iterator[tuple[InputRange, ...]]:
    """Put small neighbouring ranges into one block."""
    block: list[InputRange] = []
    room = size
    for span, amount in ranges:
        if block and amount > room:
            yield tuple(block)
            block, room = [], size
        block.append(span)
        room -= amount
    if block:
        yield tuple(block)


def find_inputs(words: Sequence[str]) -> tuple[InputFile, ...]:
    """The files that paths, globs and folders name, in sorted order word by word."""
    paths = [path for word in words for path in _expanded(word)]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ConfigError(f"--input names {twice[0]} twice")
    return tuple(_described(path) for path in paths)


def _expanded(word: str) -> list[str]:
    path = Path(word)
    if path.is_dir():
        found = _of_folder(path)
    elif path.is_file():
        found = [word]
    else:
        found = sorted(name for name in glob.glob(word, recursive=True) if Path(name).is_file())
    if not found:
        raise ConfigError(f"--input {word}: there is no such file", fix="check the path; quote a glob or let it match")
    return found


def _of_folder(folder: Path) -> list[str]:
    """All visible files; where some hold records, a README beside them is no document."""
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    facts = [name for name in files if Path(name).name in _FACTS_OF_DATASETS]
    if any(format_of(name) == ARROW for name in files):
        files = [name for name in files if name not in facts]
    records = [name for name in files if format_of(name) != TEXT]
    if records and len(records) < len(files):
        say(f"--input {folder}: {len(files) - len(records)} file(s) of text beside records left out")
    return records or files


def format_of(path: str) -> str:
    """How a file is read, by its name."""
    return next((kind for ending, kind in _ENDINGS.items() if path.endswith(ending)), TEXT)


def _described(path: str) -> InputFile:
    kind = format_of(path)
    for ending in (".gz", ".zst", ".xz", ".bz2", ".zip"):
        if kind == TEXT and path.endswith(ending):
            raise DataError(
                f"{path} is compressed in a way that is not read",
                expected="JSON lines as .jsonl.gz, .json.gz, .jsonl.zst or .json.zst",
                fix="rename it if it is that, or decompress it",
            )
    content = map_file(Path(path))
    if kind == LINES and content[: 1 << 12].tobytes().lstrip().startswith(b"["):
        kind = ARRAY
    count = {PARQUET: num_row_groups, ARROW: num_batches}.get(kind)
    frames = {GZIP: bgzf_members, ZSTD: zstd_frames}.get(kind)
    large = len(content) >= 2 * SMALLEST_BLOCK
    cuts = cuts_of(frames(content), len(content), SMALLEST_BLOCK) if frames and large else ()
    return InputFile(path, kind, len(content), _sampled_hash(content), count(path) if count else 0, cuts)


def _sampled_hash(content: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Identity of a file from its size and 64 windows."""
    digest = hashlib.sha256(len(content).to_bytes(8, "little"))
    for number in range(64):
        start = max(0, len(content) - 1024) * number // 63
        digest.update(content[start : start + 1024].tobytes())
    return digest.hexdigest()[:32]
