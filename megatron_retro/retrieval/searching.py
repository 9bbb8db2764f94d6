"""Candidates of queries, list by list or query by query, the queries' own documents left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.retrieval.faiss_index import inverted_parts, set_search_effort
from megatron_retro.retrieval.gpu_copies import MOST_SELECTED, GpuCopy
from megatron_retro.retrieval.list_join import JOINABLE, Excluded, Found, search_by_lists
from megatron_retro.retrieval.native import keep_foreign, native_module

_WIDENING = 4
_WIDE_CANDIDATES = 1 << 24


@dataclass(frozen=True)
class Searcher:
    """A searchable index and how it is searched; with a copy on GPUs, there and query by query."""

    index: Any
    nprobe: int
    ef_search: int
    by_lists: bool
    memory_bytes: float
    gpus: GpuCopy | None = None

    def __post_init__(self) -> None:
        set_search_effort(self.index, self.nprobe, self.ef_search)
        if self.gpus is not None and inverted_parts(self.index) is not None:
            self.gpus.set_lists(self.nprobe)

    def search(self, vectors: NDArray[np.float32], keep: int, excluded: Excluded, enough: int) -> Found:
        """The nearest `keep` foreign vectors of each query.

        Query by query, `keep` are searched for and the own ones dropped; a row left with fewer than `enough` is
        searched again, wider.
        """
        if not self.by_lists:
            return self._search_by_queries(vectors, keep, excluded, min(enough, keep))
        parts = inverted_parts(self.index)
        if parts is None:
            raise ValueError("only an inverted file is searched list by list")
        step = self._rows_at_once(keep, parts.dimension)
        found = [
            search_by_lists(parts, vectors[start : start + step], keep, _part(excluded, start, start + step))
            for start in range(0, max(len(vectors), 1), step)
        ]
        return Found(np.concatenate([one.distances_QK for one in found]), np.concatenate([one.ids_QK for one in found]))

    def nearest(self, vectors: NDArray[np.float32], keep: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and ids of each query's nearest, its own among them; more than a GPU selects are selected here."""
        wanted = np.ascontiguousarray(vectors, np.float32)
        if self.gpus is not None and keep <= MOST_SELECTED:
            return self.gpus.search(wanted, keep)
        distances, ids = self.index.search(wanted, keep)
        return distances, ids

    def _search_by_queries(self, vectors: NDArray[np.float32], keep: int, excluded: Excluded, enough: int) -> Found:
        distances, ids = self.nearest(vectors, keep)
        found = _foreign(distances, ids, excluded, keep)
        short = np.flatnonzero((found.ids_QK[:, :enough] < 0).any(axis=1) & (ids[:, -1] >= 0))
        wide, total = keep, self.index.ntotal
        while len(short) and wide < total:
            wide = min(wide * _WIDENING, total)
            step = max(1, _WIDE_CANDIDATES // wide)
            parts = [short[start : start + step] for start in range(0, len(short), step)]
            short = np.concatenate([self._widened(vectors, found, rows, wide, excluded, enough) for rows in parts])
        return found

    def _widened(
        self,
        vectors: NDArray[np.float32],
        found: Found,
        rows: NDArray[np.int64],
        wide: int,
        excluded: Excluded,
        enough: int,
    ) -> NDArray[np.int64]:
        """Search some rows again, put what is found in their place; returns the rows that are still short."""
        distances, ids = self.nearest(vectors[rows], wide)
        again = _foreign(distances, ids, Excluded(excluded.first[rows], excluded.last[rows]), found.ids_QK.shape[1])
        found.distances_QK[rows], found.ids_QK[rows] = again.distances_QK, again.ids_QK
        still: NDArray[np.int64] = rows[(again.ids_QK[:, :enough] < 0).any(axis=1) & (ids[:, -1] >= 0)]
        return still

    def _rows_at_once(self, keep: int, dimension: int) -> int:
        row_bytes = dimension * 8 + keep * 40 + min(self.nprobe, 1 << 20) * 48
        return max(256, int(self.memory_bytes / 2 / row_bytes))


def can_join(index: Any) -> bool:
    """Whether an index can be searched list by list."""
    parts = inverted_parts(index)
    return parts is not None and type(parts.inverted).__name__ in JOINABLE and native_module() is not None


def _foreign(distances: NDArray[np.float32], ids: NDArray[np.int64], excluded: Excluded, keep: int) -> Found:
    """The first `keep` that are not excluded, with their distances."""
    kept = keep_foreign(ids, excluded.first, excluded.last, keep)
    own = (ids >= excluded.first[:, None]) & (ids < excluded.last[:, None]) | (ids < 0)
    order = np.argsort(own, axis=1, kind="stable")[:, :keep]
    ordered = np.take_along_axis(distances, order, axis=1)
    return Found(np.where(kept >= 0, ordered, np.inf).astype(np.float32), kept)


def _part(excluded: Excluded, start: int, stop: int) -> Excluded:
    return Excluded(excluded.first[start:stop], excluded.last[start:stop])
