"""Writing token files: documents, or whole files joined; then checks of what was written.

Lengths and boundaries go to disk as they come, so memory does not grow with the corpus. The `.bin` and `.idx` take
their names when both are whole, the manifest last. What is written into a folder of its own outlives its writer:
another goes on from the `Extent` that the first one saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_retro.artifacts.block_checksums import (
    BLOCK_BYTES,
    ChecksumList,
    RunningBlocks,
    blocks_digest,
    checksums_of,
)
from megatron_retro.artifacts.files import (
    flush_directory,
    fresh_name,
    make_folder,
    named_disk_errors,
    write_file,
)
from megatron_retro.artifacts.manifest import (
    FileRecord,
    Manifest,
    damage,
    file_records,
    load_manifest,
    manifest_path,
    write_manifest,
)
from megatron_retro.data.token_file import (
    KIND,
    MANIFEST_VERSION,
    StoredTokenizer,
    TokenFile,
    bin_path,
    checksums_path,
    idx_path,
)
from megatron_retro.data.token_index import header
from megatron_retro.data.unfinished_files import HashedFile, Spool, UnfinishedFile
from megatron_retro.errors import ArtifactError, DataError

_SPAN = 1 << 20


@dataclass(frozen=True)
class Extent:
    """How far an unfinished token file has come: what a writer needs to go on from there."""

    num_bytes: int = 0
    sequences: int = 0
    documents: int = 0
    last_checksum: int = 0  # of the block of the `.bin` that is not full
    lengths_checksum: int = 0
    bounds_checksum: int = 0
    sums_checksum: int = 0


class TokenFileWriter:
    """Collects documents into `PREFIX.bin` and `.idx`. As a context manager it drops what was not finalized.

    With a `folder`, what is unfinished lies and stays there: `save` says how far it came, for a writer to go on.
    """

    def __init__(
        self, prefix: str | Path, dtype: DTypeLike, folder: Path | None = None, extent: Extent | None = None
    ) -> None:
        self.prefix, self.dtype, self._folder = Path(prefix), np.dtype(dtype), folder
        header(self.dtype, 0, 0)
        make_folder(self.prefix.parent)
        at = extent or Extent()
        self._path, kept = bin_path(prefix), folder is not None
        boundaries, sums = at.documents + 1 if at.documents else 0, at.num_bytes // BLOCK_BYTES
        with named_disk_errors(self._path):
            self._bin = UnfinishedFile(self._unfinished_bin(at.num_bytes), at.num_bytes, is_kept=kept)
            self._lengths = self._spool("lengths", "<i4", at.sequences, at.lengths_checksum)
            self._bounds = self._spool("bounds", "<i8", boundaries, at.bounds_checksum if boundaries else 0)
            self._sums = self._spool("sums", "<u4", sums, at.sums_checksum)
            finished = [value for span in self._sums.spans() for value in span.tolist()]
        self._blocks = RunningBlocks.after(at.num_bytes, finished, at.last_checksum)
        if not boundaries:
            self._bounds.extend([0])

    def _spool(self, kind: str, dtype: str, count: int, checksum: int) -> Spool:
        return Spool(self._unfinished(kind), dtype, count, checksum, is_kept=self._folder is not None)

    def _unfinished(self, kind: str) -> Path:
        name = f"{self.prefix.name}.{kind}"
        return fresh_name(self.prefix.with_name(name)) if self._folder is None else self._folder / name

    def _unfinished_bin(self, num_bytes: int) -> Path:
        """Where the tokens are; a kill may have come when they had their final name and no manifest."""
        path = self._unfinished("bin")
        return self._path if num_bytes and not path.exists() else path

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._bin.size // self.dtype.itemsize

    def save(self) -> Extent:
        """Force all that was added to the disk; another writer may go on from here."""
        with named_disk_errors(self._path):
            self._sums.extend(self._blocks.finished[self._sums.count :])
            for part in (self._bin, self._lengths, self._bounds, self._sums):
                part.flush()
        return Extent(
            num_bytes=self._bin.size,
            sequences=self._lengths.count,
            documents=self._bounds.count - 1,
            last_checksum=self._blocks.current,
            lengths_checksum=self._lengths.checksum,
            bounds_checksum=self._bounds.checksum,
            sums_checksum=self._sums.checksum,
        )

    def _add_bytes(self, content: bytes | memoryview) -> None:
        self._bin.write(content)
        self._blocks.feed(memoryview(content))

    def add_documents(
        self, tokens: NDArray[Any], lengths: NDArray[np.int32], sequences_per_document: NDArray[np.int64]
    ) -> None:
        """Append documents: all their tokens, the length of each sequence, the number of sequences of each document."""
        stored = np.ascontiguousarray(_checked_tokens(tokens, self.dtype))
        with named_disk_errors(self._path):
            self._add_bytes(stored.data.cast("B") if stored.size else b"")
            before = self._lengths.count
            self._lengths.extend(lengths)
            self._bounds.extend(np.cumsum(sequences_per_document) + before)

    def add_file(self, prefix: str | Path) -> None:
        """Append every document of another token file."""
        other = TokenFile(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{prefix} holds another type of tokens", got=other.dtype, expected=self.dtype)
        with named_disk_errors(self._path):
            for tokens in other.spans(_SPAN):
                self._add_bytes(tokens.tobytes())
            before = self._lengths.count
            for start in range(0, other.index.num_sequences, _SPAN):
                self._lengths.extend(other.index.lengths[start : start + _SPAN])
            for start in range(1, other.num_documents + 1, _SPAN):
                self._bounds.extend(other.index.documents[start : start + _SPAN] + before)

    def finalize(self, *, inputs: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None) -> Manifest:
        """Write the index and the manifest and give the files their names."""
        counts = {
            "documents": self._bounds.count - 1,
            "sequences": self._lengths.count,
            "tokens": self.num_tokens,
            "dtype": str(self.dtype),
        }
        with named_disk_errors(idx_path(self.prefix)):
            index = self._written_index()
            try:
                self._bin.publish(self._path)  # fails where another has, whose manifest then stays
                manifest_path(self.prefix).unlink(missing_ok=True)
                index.publish(idx_path(self.prefix))
            finally:
                index.discard()
            flush_directory(self._path.parent)
            checksums = _write_checksums(self.prefix, ChecksumList.of(self._blocks))
        tokens = FileRecord(self._bin.size, blocks_digest(self._blocks.checksums()))
        return write_manifest(
            self.prefix,
            kind=KIND,
            version=MANIFEST_VERSION,
            inputs=inputs,
            config=config,
            counts=counts,
            files={self._path.name: tokens, idx_path(self.prefix).name: index.record(), **checksums},
        )

    def _written_index(self) -> HashedFile:
        index = HashedFile(idx_path(self.prefix))
        try:
            index.write(header(self.dtype, self._lengths.count, self._bounds.count))
            for lengths in self._lengths.spans():
                index.write(lengths.data)
            end = 0
            for lengths in self._lengths.spans():
                end = _write_pointers(index, lengths, self.dtype.itemsize, end)
            for bounds in self._bounds.spans():
                index.write(bounds.data)
            index.flush()
        except BaseException:
            index.discard()
            raise
        return index

    def discard(self) -> None:
        """Drop what was written, or, in a folder, close it."""
        for part in (self._bin, self._lengths, self._bounds, self._sums):
            part.discard()

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _write_pointers(stream: HashedFile, lengths: NDArray[np.int32], itemsize: int, start: int) -> int:
    """Write the byte offsets of a run of sequences that begins at byte `start`; returns where it ends."""
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize + start
    if not len(ends):
        return start
    pointers = np.empty(len(ends), "<i8")
    pointers[0] = start
    pointers[1:] = ends[:-1]
    stream.write(pointers.tobytes())
    return int(ends[-1])


def _write_checksums(prefix: Path, checksums: ChecksumList) -> dict[str, FileRecord]:
    path = checksums_path(prefix)
    write_file(path, checksums.to_bytes())
    return file_records(path.parent, [path.name])


def describe_token_file(prefix: str | Path) -> Manifest:
    """Write a manifest and block checksums beside a token file of another program, or one that was replaced.

    What an earlier manifest says of its tokenizer is said of other tokens, so it is not kept.
    """
    make_folder(Path(prefix).parent)
    manifest_path(Path(prefix)).unlink(missing_ok=True)
    file = TokenFile(prefix)
    checksums = _write_checksums(Path(prefix), checksums_of(bin_path(prefix)))
    recorded = file_records(Path(prefix).parent, [path(prefix).name for path in (bin_path, idx_path)])
    counts = {"documents": file.num_documents, "sequences": file.index.num_sequences, "tokens": file.num_tokens}
    return write_manifest(
        Path(prefix),
        kind=KIND,
        version=MANIFEST_VERSION,
        counts={**counts, "dtype": str(file.dtype)},
        files={**recorded, **checksums},
    )


def _checked_tokens(tokens: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tokens in the stored type; a value that the type cannot hold is refused."""
    if tokens.dtype == dtype or not tokens.size:
        return tokens
    bounds = np.iinfo(dtype)
    low, high = int(tokens.min()), int(tokens.max())
    if low < bounds.min or high > bounds.max:
        raise DataError(
            "a token does not fit the stored type",
            got=low if low < bounds.min else high,
            expected=f"{bounds.min} to {bounds.max} ({dtype})",
            fix="the tokenizer's vocabulary is larger than the type; store int32",
        )
    return tokens.astype(dtype)


def merge_token_files(prefixes: Sequence[str | Path], output: str | Path, *, allow_mismatch: bool = False) -> Manifest:
    """Join token files in the given order."""
    if not prefixes:
        raise DataError("there are no token files to merge")
    files = [TokenFile(prefix) for prefix in prefixes]
    inputs = {str(number): file.fingerprint for number, file in enumerate(files)}
    config: dict[str, Any] = {}
    shared = _shared_tokenizer(files, allow_mismatch)
    if shared is not None:
        inputs["tokenizer"] = shared.fingerprint
        config = {"tokenizer_type": shared.kind, "vocab_size": shared.vocab_size}
    with TokenFileWriter(output, files[0].dtype) as writer:
        for prefix in prefixes:
            writer.add_file(prefix)
        return writer.finalize(inputs=inputs, config=config)


def _shared_tokenizer(files: Sequence[TokenFile], allow_mismatch: bool) -> StoredTokenizer | None:
    """The tokenizer of all files; None where one does not say, or where they differ and that is allowed."""
    named = {file.tokenizer: file.prefix for file in files if file.tokenizer is not None}
    if len({tokenizer.fingerprint for tokenizer in named}) > 1 and not allow_mismatch:
        made = [f"{prefix}: {tokenizer.kind}, {tokenizer.fingerprint[:12]}" for tokenizer, prefix in named.items()]
        raise ArtifactError(
            "token files of different tokenizers cannot be one corpus",
            got="; ".join(made),
            fix="preprocess the texts with one tokenizer; --allow-tokenizer-mismatch goes on where ids mean the same",
        )
    return next(iter(named)) if len(named) == 1 and all(file.tokenizer is not None for file in files) else None


def verify_token_file(prefix: str | Path, vocab_size: int | None = None) -> list[str]:
    """Every fault of a token file, one sentence each: structure, token range, and checksums if it has a manifest."""
    try:
        file = TokenFile(prefix)
    except ArtifactError as error:
        return [str(error)]
    problems = _structure_problems(file.index.lengths, file.index.pointers, file.index.documents, file.dtype.itemsize)
    if vocab_size is not None and file.num_tokens:
        highest = max(int(tokens.max()) for tokens in file.spans(_SPAN))
        if highest >= vocab_size:
            problems.append(f"token {highest} is beyond the vocabulary of {vocab_size}")
    if manifest_path(Path(prefix)).exists():
        problems += damage(Path(prefix), load_manifest(Path(prefix)))
    return problems


def _structure_problems(
    lengths: NDArray[np.int32], pointers: NDArray[np.int64], documents: NDArray[np.int64], itemsize: int
) -> list[str]:
    problems = []
    for start in range(0, len(lengths), _SPAN):
        span = slice(start, start + _SPAN)
        if (lengths[span] < 0).any():
            problems.append(f"a length after sequence {start} is negative")
        ends = pointers[span] + lengths[span].astype(np.int64) * itemsize
        following = pointers[start + 1 : start + _SPAN + 1]
        if (ends[: len(following)] != following).any():
            problems.append(f"sequences after number {start} do not follow one another in the .bin")
    for start in range(0, len(documents), _SPAN):
        if (np.diff(documents[start : start + _SPAN + 1]) < 0).any():
            problems.append(f"document boundaries after document {start} fall")
    return problems
