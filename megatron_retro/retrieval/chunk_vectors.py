"""The vector of each chunk of the database: embedded, or that of its passage in a datastore that someone published.

A published datastore is passages and one vector for each. Where the passages are the documents of the database, every
chunk takes the vector of its passage, and none is embedded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.work_blocks import uniform_sample
from megatron_retro.runtime.console import Advance, unseen

FLAG = "--retro-passage-vectors"
_FINGERPRINT_ROWS = 256
_COMPARED_PASSAGES, _LONGEST_PASSAGE = 32, 8192
_LARGEST_DIFFERENCE = 0.1
_UNPICKLE = (
    "if you trust who wrote it: python -c \"import numpy, pickle; ids, vectors = pickle.load(open('FILE.pkl', 'rb')); "
    "numpy.save('FILE.npy', vectors)\""
)


class ChunkVectors(Protocol):
    """What gives the chunks of a database their vectors."""

    @property
    def dimension(self) -> int:
        """Width of a vector."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the vectors can."""

    def of(self, ids: NDArray[np.int64], advance: Advance = unseen) -> NDArray[np.float32]:
        """Vectors of chunks [N, dimension]; `advance` is told of chunks as they are done."""


@dataclass(frozen=True)
class EmbeddedChunks:
    """Every chunk is embedded when its vector is asked for."""

    database: ChunkDatabase
    embedder: Embedder

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return self.embedder.dimension

    @property
    def fingerprint(self) -> str:
        """That of the embedder."""
        return self.embedder.fingerprint

    def of(self, ids: NDArray[np.int64], advance: Advance = unseen) -> NDArray[np.float32]:
        """Vectors of chunks."""
        return self.embedder.embed(*self.database.gather(ids, self.database.chunk_length), advance)


@dataclass(frozen=True)
class PassageVectors:
    """Every chunk has the vector of its document. `arrays` hold those of all documents of the token files, in order.

    `embedder` is the one that made them: queries are embedded by it.
    """

    database: ChunkDatabase
    embedder: Embedder
    arrays: tuple[NDArray[np.floating[Any]], ...]

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return self.embedder.dimension

    @cached_property
    def fingerprint(self) -> str:
        """Covers the embedder, the sizes of the arrays and evenly spread rows of each."""
        digest = hashlib.sha256()
        for array in self.arrays:
            rows = array[uniform_sample(len(array), min(len(array), _FINGERPRINT_ROWS))]
            digest.update(f"{array.shape} {array.dtype}".encode() + rows.tobytes())
        return f"{self.embedder.fingerprint}, of passages {digest.hexdigest()}"

    def of(self, ids: NDArray[np.int64], advance: Advance = unseen) -> NDArray[np.float32]:
        """Vectors of chunks."""
        vectors = self.of_documents(self.database.document_of(ids))
        advance(len(ids))
        return vectors

    def of_documents(self, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of documents of the database."""
        corpora = np.searchsorted(self.database.documents_before, documents, side="right") - 1
        rows = documents + self._rows_less_documents[corpora]
        vectors, first = np.empty((len(rows), self.dimension), np.float32), 0
        for array in self.arrays:
            chosen = np.flatnonzero((rows >= first) & (rows < first + len(array)))
            vectors[chosen] = array[rows[chosen] - first]
            first += len(array)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise DataError(f"{FLAG}: the vector of passage {rows[broken[0]]} is not finite", fix="embed it again")
        return vectors

    @cached_property
    def _rows_less_documents(self) -> NDArray[np.int64]:
        """What leads from a document of the database to its row, for each corpus."""
        rows_before = np.cumsum([0, *(file.num_documents for file in self.database.files[:-1])])
        first = np.array([corpus.first_document for corpus in self.database.corpora])
        shift: NDArray[np.int64] = rows_before + first - self.database.documents_before[:-1]
        return shift


def open_passage_vectors(paths: Sequence[str], database: ChunkDatabase, embedder: Embedder) -> PassageVectors:
    """The vectors in .npy files, one for each document of the database's token files, made by that embedder."""
    arrays = tuple(_mapped(Path(path), embedder.dimension) for path in paths)
    vectors, documents = sum(map(len, arrays)), sum(file.num_documents for file in database.files)
    if vectors != documents:
        raise ArtifactError(
            f"{FLAG} does not hold one vector for each document of --retro-database-corpus",
            got=f"{vectors:,} vectors, {documents:,} documents",
            fix="name the files of all passages, in the order of the token files, and leave no passage out in "
            "preprocess",
        )
    opened = PassageVectors(database, embedder, arrays)
    _require_same_embedder(opened)
    return opened


def _mapped(path: Path, dimension: int) -> NDArray[np.floating[Any]]:
    """An array of a file, of which nothing runs."""
    expected = f"a .npy file of floating-point numbers, [passages, {dimension}]"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise ArtifactError(f"{path} is no array", got=error, expected=expected, fix=_UNPICKLE) from None
    if getattr(array, "ndim", 0) != 2 or array.dtype.kind != "f" or array.shape[1] != dimension:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise ArtifactError(
            f"{path} does not hold vectors of the embedder",
            got=got,
            expected=expected,
            fix="name the encoder that made them: --retro-embedder huggingface --retro-embedder-path FOLDER",
        )
    found: NDArray[np.floating[Any]] = array
    return found


def _require_same_embedder(vectors: PassageVectors) -> None:
    """Embed some passages again: other vectors are of another encoder, or of passages in another order."""
    database = vectors.database
    documents = np.flatnonzero(np.diff(database.chunks_before))
    documents = documents[uniform_sample(len(documents), min(len(documents), _COMPARED_PASSAGES))]
    given = vectors.of_documents(documents)
    again = vectors.embedder.embed(*database.gather(database.chunks_before[documents], _LONGEST_PASSAGE))
    lengths = np.maximum(np.linalg.norm(again, axis=1), np.finfo(np.float32).tiny)
    differences = np.linalg.norm(given - again, axis=1) / lengths
    wrong = differences > _LARGEST_DIFFERENCE
    if wrong.any():
        worst = int(differences.argmax())
        raise ArtifactError(
            f"{FLAG}: {wrong.sum()} of {len(documents)} vectors are not what the embedder makes of their passages",
            got=f"a difference of {differences[worst]:.2f} of its length at document {documents[worst]}",
            expected=f"at most {_LARGEST_DIFFERENCE}",
            fix="name the encoder that made them, its --retro-embedder-pooling and --retro-bert-max-chunk-length; "
            "bring passages and vectors into one order; put a title before the text where it was embedded with it",
        )
