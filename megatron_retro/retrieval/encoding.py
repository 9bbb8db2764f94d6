"""The encode stage: chunks -> vectors -> codes sorted by inverted list, one file per block.

Vectors live for a batch only, unless they are to be kept. What a block holds depends on the block alone, so any
number of workers in any order write the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.files import make_folder, named_disk_errors
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.block_files import write_arrays
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.faiss_index import InvertedParts, inverted_parts
from megatron_retro.retrieval.layout import Span

BATCH_CHUNKS = 8192


@dataclass(frozen=True)
class ChunkEncoder:
    """All that turns chunks of a database into codes of a trained index."""

    database: ChunkDatabase
    embedder: Embedder
    trained: Any
    facts: dict[str, Any]

    def vectors(self, span: Span) -> Iterator[NDArray[np.float32]]:
        """Vectors of a span's chunks, a batch at a time."""
        return database_vectors(self.database, self.embedder, span)

    def write_block(self, span: Span, path: Path, kept: KeptVectors | None) -> None:
        """Encode a block; its codes are written last, so that their presence means all of it is there."""
        parts = inverted_parts(self.trained)
        encoded: list[dict[str, NDArray[Any]]] = []
        first, checksum = span.first, 0
        for vectors in self.vectors(span):
            encoded.append(_encoded(parts, vectors))
            if kept is not None:
                checksum = checksum_of(kept.write(first, vectors), checksum)
            first += len(vectors)
        joined = {name: np.concatenate([part[name] for part in encoded]) for name in encoded[0]}
        facts = self.facts
        if kept is not None:
            facts = {**facts, "first": span.first, "last": span.last, "vectors_crc32": checksum}
        write_arrays(path, _by_list(joined, span) if parts else joined, facts)


def database_vectors(database: ChunkDatabase, embedder: Embedder, span: Span) -> Iterator[NDArray[np.float32]]:
    """Vectors of the chunks of a span, a batch at a time."""
    for first in range(span.first, span.last, BATCH_CHUNKS):
        ids = np.arange(first, min(first + BATCH_CHUNKS, span.last))
        yield embedder.embed(*database.gather(ids, database.chunk_length))


@dataclass(frozen=True)
class KeptVectors:
    """Vectors of all chunks in bfloat16, one file that workers fill in parts."""

    path: Path
    num_chunks: int
    dimension: int

    def write(self, first: int, vectors: NDArray[np.float32]) -> bytes:
        """Put vectors in the place of the chunks from `first` on; returns the bytes that they have there."""
        content = as_bfloat16(vectors).tobytes()
        with named_disk_errors(self.path):
            make_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size != self.num_chunks * self.dimension * 2:
                    os.ftruncate(descriptor, self.num_chunks * self.dimension * 2)
                os.pwrite(descriptor, content, first * self.dimension * 2)
            finally:
                os.close(descriptor)
        return content

    def verify(self, facts: dict[str, Any]) -> None:
        """Refuse vectors that are not those of the block that noted `facts`."""
        rows = np.ascontiguousarray(self.mapped()[facts["first"] : facts["last"]])
        if checksum_of(rows.data) != facts["vectors_crc32"]:
            raise ArtifactError(
                f"{self.path} is damaged at the vectors of the chunks {facts['first']} to {facts['last']}",
                fix="remove the codes of these chunks and encode again",
            )

    def mapped(self) -> NDArray[np.uint16]:
        """All vectors [chunks, dimension], as bits."""
        if not self.path.is_file() or self.path.stat().st_size != self.num_chunks * self.dimension * 2:
            raise ArtifactError(
                f"{self.path} does not hold the vectors of all chunks",
                fix="build the index with --retro-keep-embeddings",
            )
        return np.memmap(self.path, np.uint16, mode="r", shape=(self.num_chunks, self.dimension))


def as_bfloat16(vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of vectors in bfloat16, which NumPy does not know."""
    bits: NDArray[np.uint16] = torch.from_numpy(vectors).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The reverse of `as_bfloat16`."""
    wide: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _encoded(parts: InvertedParts | None, vectors: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    if parts is None:
        return {"vectors": vectors}
    lists, codes = parts.encoded(vectors)
    return {"lists": lists, "codes": codes}


def _by_list(encoded: dict[str, NDArray[Any]], span: Span) -> dict[str, NDArray[Any]]:
    """Codes in the order of their lists (ids ascend within one), which lists there are, and where each starts."""
    order = np.argsort(encoded["lists"], kind="stable")
    present, starts = np.unique(encoded["lists"][order], return_index=True)
    return {
        "lists": present,
        "starts": np.append(starts, len(order)).astype(np.int64),
        "ids": order + span.first,
        "codes": encoded["codes"][order],
    }
