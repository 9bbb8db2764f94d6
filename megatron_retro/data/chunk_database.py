"""The chunk database: what neighbours are made of, as arithmetic over token files.

Chunks are cut from each document's start, never across documents, a trailing end-of-document id left out. The only
array is the number of chunks before each document; an id is found by binary search in it, and its tokens are read
from the token file. Several corpora make one space of 64-bit ids, in the order given.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import Manifest, read_manifest, require_same, write_manifest
from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.artifacts.object_store import is_url
from megatron_retro.artifacts.stored_artifact import StoredArtifact
from megatron_retro.artifacts.verified import open_artifact
from megatron_retro.data.native import REMEDY, extension, named_damage
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.token_index import last_at_or_before
from megatron_retro.errors import ArtifactError, ConfigError, DamagedArtifact, DataError
from megatron_retro.runtime.console import warn
from megatron_retro.runtime.strict_json import json_text

KIND = "chunk-database"
VERSION = 1
COUNTS_FILE = "chunks-before-document.i64"
_SPAN = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """The documents [first_document, last_document) of a token file; `prefix` is relative to the database."""

    prefix: str
    fingerprint: str
    first_document: int
    last_document: int

    @property
    def num_documents(self) -> int:
        """Documents of this corpus in the database."""
        return self.last_document - self.first_document


class ChunkDatabase:
    """An open database. Documents are numbered globally, corpus after corpus."""

    def __init__(self, path: Path, manifest: Manifest, url: str = "") -> None:
        """`url`: where the database is stored, if it was copied to `path`."""
        self.path, self.manifest = path, manifest
        self.chunk_length: int = manifest.config["chunk_length"]
        self.eod: int | None = manifest.config["eod"]
        self.left_out: str | None = manifest.config.get("left_out")
        self.corpora = tuple(Corpus(**corpus) for corpus in manifest.config["corpora"])
        self.files = tuple(_open_corpus(url if is_url(url) else str(path), corpus) for corpus in self.corpora)
        self.chunks_before: NDArray[np.int64] = map_file(path / COUNTS_FILE).view("<i8")
        self.documents_before = np.cumsum([0, *(corpus.num_documents for corpus in self.corpora)], dtype=np.int64)
        if len(self.chunks_before) != self.documents_before[-1] + 1:
            raise ArtifactError(f"{path / COUNTS_FILE} is cut", fix="create the database again")
        if (self.chunks_before[0], self.chunks_before[-1]) != (0, manifest.counts["chunks"]):
            got = f"{self.chunks_before[0]} to {self.chunks_before[-1]}"
            expected = f"0 to {manifest.counts['chunks']}"
            raise DamagedArtifact(f"{path / COUNTS_FILE} is damaged", got=got, expected=expected, fix=REMEDY)

    @classmethod
    def open(cls, path: str | Path) -> ChunkDatabase:
        """Open a finished database; its token files must be the ones it was made from."""
        where = Path(path)
        if is_url(path):
            stored = StoredArtifact(str(path))
            where = stored.copy
            stored.copied(COUNTS_FILE, read_manifest(where, kind=KIND, version=VERSION).files.get(COUNTS_FILE))
        return cls(where, open_artifact(where, kind=KIND, version=VERSION, fix=REMEDY), str(path))

    @classmethod
    def create(
        cls,
        path: str | Path,
        token_prefixes: Sequence[str | Path],
        chunk_length: int,
        *,
        eod: int | None,
        document_ranges: Sequence[tuple[int, int]] | None = None,
        left_out: NDArray[np.int64] | None = None,
        replace: bool = False,
    ) -> ChunkDatabase:
        """Count the chunks of each document. `eod=None` says that documents end without an end-of-document id.

        The documents `left_out`, global numbers in ascending order, have no chunks.
        """
        where = Path(path)
        files = [TokenFile(prefix) for prefix in token_prefixes]
        ranges = list(document_ranges or [(0, file.num_documents) for file in files])
        _check_creation(files, ranges, chunk_length, eod)
        with new_directory(where, replace=replace) as directory:
            corpora = [
                Corpus(_relative(file.prefix, where), file.fingerprint, first, last)
                for file, (first, last) in zip(files, ranges, strict=True)
            ]
            chunks = _write_counts(directory / COUNTS_FILE, files, ranges, chunk_length, eod, left_out)
            without = {} if left_out is None else {"left_out": digest_of(left_out)}
            write_manifest(
                directory,
                kind=KIND,
                version=VERSION,
                inputs={f"corpus {number}": corpus.fingerprint for number, corpus in enumerate(corpora)},
                config={
                    "chunk_length": chunk_length,
                    "eod": eod,
                    "corpora": [asdict(corpus) for corpus in corpora],
                    **without,
                },
                counts={"chunks": chunks, "documents": sum(corpus.num_documents for corpus in corpora)},
            )
        return cls.open(where)

    @property
    def num_chunks(self) -> int:
        """Chunks of all corpora; ids are 0 to this less one."""
        return int(self.chunks_before[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all corpora."""
        return int(self.documents_before[-1])

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The type that holds the tokens of every corpus."""
        return np.result_type(*(file.dtype for file in self.files)) if len(self.files) > 1 else self.files[0].dtype

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the ids and their tokens, wherever the files lie."""
        corpora = [{**asdict(corpus), "prefix": ""} for corpus in self.corpora]
        content: dict[str, Any] = {"chunk_length": self.chunk_length, "eod": self.eod, "corpora": corpora}
        if self.left_out is not None:
            content["left_out"] = self.left_out
        return hashlib.sha256(json_text(content, sort_keys=True).encode()).hexdigest()

    def document_of(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The global document of each chunk; every id must exist."""
        ids = np.asarray(chunk_ids, np.int64)
        self._require(ids, lowest=0)
        if self.native is None:
            return self._documents(ids)
        found: NDArray[np.int64] = self.native.documents(np.ascontiguousarray(ids).reshape(-1))
        return found.reshape(ids.shape)

    def map_documents(
        self, corpus_fingerprint: str, first: NDArray[np.int64], last: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Intervals of a corpus's own documents as intervals of global ones; empty where the database has none."""
        for number, corpus in enumerate(self.corpora):
            if corpus.fingerprint == corpus_fingerprint:
                base = self.documents_before[number] - corpus.first_document
                low = np.clip(first, corpus.first_document, corpus.last_document)
                high = np.clip(last, corpus.first_document, corpus.last_document)
                return low + base, high + base
        return np.zeros_like(first), np.zeros_like(last)

    def gather(
        self, chunk_ids: NDArray[np.int64], retrieved_length: int, threads: int = 1
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Tokens [..., r] of chunks and what follows them in their document, and where there are any.

        Id -1 is "none": nothing but padding. Padding is zero under a False mask.
        """
        ids = np.ascontiguousarray(chunk_ids, np.int64)
        self._require(ids, lowest=-1)
        shape = (*ids.shape, retrieved_length)
        if self.native is None or not all(file.is_mapped for file in self.files):
            tokens, mask = self.gather_plainly(ids.reshape(-1), retrieved_length)
        else:
            with named_damage():
                tokens, mask = self.native.gather(ids.reshape(-1), retrieved_length, self.token_dtype.itemsize, threads)
        return tokens.reshape(shape), mask.reshape(shape)

    @cached_property
    def native(self) -> Any:
        """The C++ view of this database, or None where it is not built."""
        native = extension()
        if native is None or self.token_dtype not in (np.uint16, np.int32) or self.num_chunks == 0:
            return None
        corpora = [
            (*file.native_arrays, corpus.first_document, int(before))
            for file, corpus, before in zip(self.files, self.corpora, self.documents_before[:-1], strict=True)
        ]
        eod = -1 if self.eod is None else self.eod
        return native.ChunkDatabase(str(self.path), corpora, self.chunks_before, self.chunk_length, eod)

    def gather_plainly(self, flat: NDArray[np.int64], retrieved_length: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """`gather` of a flat array in NumPy: what the C++ is compared with, and what works without it."""
        corpus, start, stop = self.token_ranges(np.maximum(flat, 0))
        length = np.where(flat >= 0, np.minimum(stop - start, retrieved_length), 0)
        mask = np.arange(retrieved_length) < length[:, None]
        tokens = np.zeros(mask.shape, self.token_dtype)
        for number, file in enumerate(self.files):
            chosen = np.flatnonzero((corpus == number) & (length > 0))
            tokens[chosen] = np.where(mask[chosen], file.rows(start[chosen], retrieved_length), 0)
        return tokens, mask

    def token_ranges(
        self, chunk_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each chunk: its corpus, its first token in that stream, and the end of its document (without eod)."""
        if self.num_chunks == 0:
            nothing = np.zeros(chunk_ids.shape, np.int64)
            return nothing, nothing, nothing
        documents = self._documents(chunk_ids)
        within = chunk_ids - self.chunks_before[documents]
        corpus = np.searchsorted(self.documents_before, documents, side="right") - 1
        start, stop = np.empty_like(documents), np.empty_like(documents)
        for number, (file, owner) in enumerate(zip(self.files, self.corpora, strict=True)):
            chosen = corpus == number
            local = documents[chosen] - self.documents_before[number] + owner.first_document
            begin, stop[chosen] = document_text(file, local, self.eod)
            # Every chunk of a document has a token, so its number within the document is smaller than that is long.
            wrong = (within[chosen] < 0) | (within[chosen] >= stop[chosen] - begin)
            start[chosen] = begin + np.where(wrong, 0, within[chosen]) * self.chunk_length
            wrong |= start[chosen] >= stop[chosen]
            if wrong.any():
                chunk = chunk_ids[chosen][wrong][0]
                raise DamagedArtifact(
                    f"{self.path}: chunk {chunk} does not lie in its document of {file.prefix}", fix=REMEDY
                )
        return corpus, start, stop

    def _documents(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return last_at_or_before(lambda documents: self.chunks_before[documents], self.num_documents, ids)

    def _require(self, ids: NDArray[np.int64], lowest: int) -> None:
        if ids.size and (int(ids.min()) < lowest or int(ids.max()) >= self.num_chunks):
            raise DataError(
                f"{self.path} has no such chunk",
                got=f"ids from {ids.min()} to {ids.max()}",
                expected=f"{lowest} to {self.num_chunks - 1}",
                fix="the neighbour table belongs to another database",
            )


def document_text(
    file: TokenFile, documents: NDArray[np.int64], eod: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the documents start and end in the stream, a trailing eod left out."""
    start, stop = file.document_starts(documents), file.document_starts(documents + 1)
    if eod is not None and file.num_tokens:
        stop = stop - ((stop > start) & (file.at(np.maximum(stop - 1, 0)) == eod))
    return start, stop


def digest_of(documents: NDArray[np.int64]) -> str:
    """What tells one list of documents from another."""
    return hashlib.sha256(documents.astype("<i8").tobytes()).hexdigest()


def _relative(prefix: str, database: Path) -> str:
    return prefix if is_url(prefix) else os.path.relpath(prefix, database)


def _open_corpus(database: str, corpus: Corpus) -> TokenFile:
    """`database`: its folder or URL, to which the prefix of a corpus is relative if it is no URL itself."""
    scheme, separator, folder = database.rpartition("://")
    prefix = f"{scheme}{separator}{os.path.normpath(os.path.join(folder, corpus.prefix))}"
    file = TokenFile(corpus.prefix if is_url(corpus.prefix) else prefix)
    require_same(
        Path(database),
        f"the token file {file.prefix}",
        file.fingerprint,
        corpus.fingerprint,
        "put back the file that the database was made from, or create the database again",
    )
    return file


def _check_creation(
    files: Sequence[TokenFile], ranges: Sequence[tuple[int, int]], chunk_length: int, eod: int | None
) -> None:
    if not files or chunk_length < 1 or len(ranges) != len(files):
        raise ConfigError(
            "a chunk database needs token files, a chunk length of at least 1 and one document range per file",
            got=f"{len(files)} files, chunk length {chunk_length}, {len(ranges)} ranges",
        )
    for file, (first, last) in zip(files, ranges, strict=True):
        if not 0 <= first <= last <= file.num_documents:
            raise DataError(
                f"{file.prefix} has no documents {first} to {last}", expected=f"within 0 to {file.num_documents}"
            )
    fingerprints = [file.fingerprint for file in files]
    if len(set(fingerprints)) < len(fingerprints):
        raise DataError("a token file is listed twice", got=", ".join(file.prefix for file in files))
    if eod is None:
        warn("documents are taken to end without an end-of-document id; if they have one, it will be in the chunks")


def _write_counts(
    path: Path,
    files: Sequence[TokenFile],
    ranges: Sequence[tuple[int, int]],
    chunk_length: int,
    eod: int | None,
    left_out: NDArray[np.int64] | None,
) -> int:
    total = seen = 0
    with path.open("wb") as stream:
        stream.write(np.zeros(1, "<i8").tobytes())
        for file, (first, last) in zip(files, ranges, strict=True):
            ended = 0
            for start in range(first, last, _SPAN):
                documents = np.arange(start, min(start + _SPAN, last))
                begin, end = document_text(file, documents, eod)
                ended += int((file.document_starts(documents + 1) > end).sum())
                chunks = -(-(end - begin) // chunk_length)
                if left_out is not None:
                    low, high = np.searchsorted(left_out, [seen, seen + len(chunks)])
                    chunks[left_out[low:high] - seen] = 0
                seen += len(chunks)
                before = np.cumsum(chunks, dtype=np.int64) + total
                stream.write(before.astype("<i8").tobytes())
                total = int(before[-1])
            if eod is not None and not ended and last > first:
                raise DataError(
                    f"no document of {file.prefix} ends with the end-of-document id {eod}",
                    fix="name its tokenizer, preprocess with --append-eod, or say --no-retro-database-eod",
                )
    return total
