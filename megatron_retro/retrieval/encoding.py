"""The encode stage: chunks -> vectors -> codes sorted by inverted list, one file per block.

Vectors live for a batch only, unless they are to be kept. What a block holds depends on the block alone, so any
number of workers in any order write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
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

    def write_block(self, span: Span, path: Path, keep_vectors_at: Path | None) -> None:
        """Encode a block; its codes are written last, so that their presence means all of it is there."""
        parts = inverted_parts(self.trained)
        kept: list[NDArray[np.uint16]] = []
        encoded: list[dict[str, NDArray[Any]]] = []
        for vectors in self.vectors(span):
            encoded.append(_encoded(parts, vectors))
            if keep_vectors_at is not None:
                kept.append(as_bfloat16(vectors))
        facts = {**self.facts, "first": span.first, "last": span.last}
        if keep_vectors_at is not None:
            write_arrays(keep_vectors_at, {"vectors": np.concatenate(kept)}, facts)
        joined = {name: np.concatenate([part[name] for part in encoded]) for name in encoded[0]}
        write_arrays(path, _by_list(joined, span) if parts else joined, facts)


def database_vectors(database: ChunkDatabase, embedder: Embedder, span: Span) -> Iterator[NDArray[np.float32]]:
    """Vectors of the chunks of a span, a batch at a time."""
    for first in range(span.first, span.last, BATCH_CHUNKS):
        ids = np.arange(first, min(first + BATCH_CHUNKS, span.last))
        yield embedder.embed(*database.gather(ids, database.chunk_length))


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
