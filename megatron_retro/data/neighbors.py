"""Neighbours of samples as they are read: transforms -> saved ids -> same-document rule -> first k -> tokens, mask.

The documents of a sample's inputs and labels are an interval; a saved neighbour from one of them is dropped and the
next saved one moves up. What is missing in the end is absent, under a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import require_same
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NONE, NeighborTable, unpack_ids
from megatron_retro.data.neighbor_transforms import NeighborLookup, NeighborTransform, ThinnedDatabase
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import DataError


@dataclass(frozen=True)
class NeighborReader:
    """Neighbours of one corpus's samples."""

    file: TokenFile
    table: NeighborTable
    database: ChunkDatabase
    chunk_length: int
    num_neighbors: int
    retrieved_length: int
    transforms: tuple[NeighborTransform, ...] = ()

    def __post_init__(self) -> None:
        query = "run `megatron-retro build-retrieval` for this corpus and database"
        table = self.table.path
        require_same(table, "the corpus", self.table.corpus_fingerprint, self.file.fingerprint, query)
        require_same(table, "the database", self.table.database_fingerprint, self.database.fingerprint, query)
        require_same(
            self.database.path, "the chunk length", self.database.chunk_length, self.chunk_length, "set it to the same"
        )
        for transform in self.transforms:
            if isinstance(transform, ThinnedDatabase):
                transform.check(self.database)
        if self.num_neighbors > self.table.num_saved:
            raise DataError(
                f"{table} has too few neighbours per chunk", got=self.table.num_saved, expected=self.num_neighbors
            )

    def read(
        self, first_chunks: NDArray[np.int64], chunks_per_sample: int, sample_ids: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Neighbour tokens [B, C, K, R] and mask of samples that start at the given query chunks."""
        ids = self.select(first_chunks, chunks_per_sample, sample_ids)
        return self.database.gather(ids, self.retrieved_length)

    def select(
        self, first_chunks: NDArray[np.int64], chunks_per_sample: int, sample_ids: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The chosen neighbours [B, C, K], -1 where there is none."""
        lookup = NeighborLookup.of_samples(first_chunks, chunks_per_sample, sample_ids)
        for transform in self.transforms:
            lookup = transform.apply(lookup)
        chosen = self._select_legal(lookup)
        chosen[lookup.absent_BC] = NONE
        return chosen

    def _packed(self, rows_BC: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Saved ids as they are stored, [B, C, bytes]."""
        chunks = rows_BC.shape[1]
        successive = (rows_BC == rows_BC[:, :1] + np.arange(chunks)).all(axis=1)
        parts = []
        for rows, is_range in zip(rows_BC.tolist(), successive.tolist(), strict=True):
            ranges = [(rows[0], rows[0] + chunks)] if is_range else [(row, row + 1) for row in rows]
            parts += [self.table.packed_rows(*span) for span in ranges]
        return np.concatenate(parts).reshape(*rows_BC.shape, -1)

    def _select_legal(self, lookup: NeighborLookup) -> NDArray[np.int64]:
        packed, chunks = self._packed(lookup.rows_BC), lookup.rows_BC.shape[1]
        first, last = self._own_documents(lookup.first_chunks_B, chunks)
        if self.database.native is None:
            return self.select_plainly(unpack_ids(packed), first, last, lookup.database)
        excluded = np.stack([first, last], axis=1)
        limits, by_chunk = lookup.database.limits(self.database), lookup.database.by_chunk
        rows = packed.reshape(-1, packed.shape[-1])
        chosen: NDArray[np.int64] = self.database.native.select(rows, excluded, self.num_neighbors, limits, by_chunk, 1)
        return chosen.reshape(*packed.shape[:2], self.num_neighbors)

    def select_plainly(
        self,
        saved: NDArray[np.int64],
        first: NDArray[np.int64],
        last: NDArray[np.int64],
        thinned: ThinnedDatabase | None = None,
    ) -> NDArray[np.int64]:
        """The rule in NumPy: `saved` [B, C, saved], and the documents [first, last) of each sample."""
        documents = self.database.document_of(np.maximum(saved, 0)) if self.database.num_chunks else saved
        own = (documents >= first[:, None, None]) & (documents < last[:, None, None])
        kept = (thinned or ThinnedDatabase()).keeps(self.database, saved, documents)
        legal = (saved != NONE) & ~own & kept
        nearest_first = np.argsort(~legal, axis=-1, kind="stable")[..., : self.num_neighbors]
        chosen = np.take_along_axis(saved, nearest_first, -1)
        return np.where(np.take_along_axis(legal, nearest_first, -1), chosen, NONE)

    def _own_documents(
        self, first_chunks: NDArray[np.int64], chunks_per_sample: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents of the database that a sample's inputs and labels touch."""
        start = first_chunks * self.chunk_length
        label = np.minimum(start + chunks_per_sample * self.chunk_length, self.file.num_tokens - 1)
        first, last = self.file.documents_of(start), self.file.documents_of(label) + 1
        return self.database.map_documents(self.file.fingerprint, first, last)
