"""Search of the index: query by query through faiss, or list by list, the queries' own documents left out.

Query by query, faiss reads a list once per query that probes it. List by list, it is read, decoded and multiplied once
for all queries that probe it, in one matrix product. The order of scores is that of squared distances:
score = q.x - |x|^2 / 2. On processors that multiply bfloat16 faster the product is taken in it, and the scores that may
be among the best are computed again, exactly. A query's own documents are an interval of ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.faiss_index import InvertedParts, inverted_parts, list_content, set_search_effort
from megatron_retro.retrieval.gpu_index import MOST_SELECTED, GpuIndex
from megatron_retro.retrieval.native import Candidates, keep_other_documents, native_module, top_candidates
from megatron_retro.runtime.console import Advance
from megatron_retro.runtime.environment import processor_flags

_TILE_VECTORS = 1024
_TILE_SCORES = 1 << 18
_SIZE_STEP = 64
_SCORES_PER_KEPT = 100
SEARCHABLE_BY_LISTS = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")


@dataclass(frozen=True)
class SearchResult:
    """Candidates of queries: squared distances and ids, nearest first; infinite and -1 where there are too few."""

    distances_QK: NDArray[np.float32]
    ids_QK: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[SearchResult], axis: int = 0) -> SearchResult:
        """The results of several groups of queries, or (axis 1) several results of the same queries."""
        return cls(
            np.concatenate([part.distances_QK for part in parts], axis=axis),
            np.concatenate([part.ids_QK for part in parts], axis=axis),
        )

    def sorted_by(self, keys: NDArray[Any]) -> SearchResult:
        """Candidates sorted by keys, smallest first, ties as they were."""
        order = np.argsort(keys, axis=1, kind="stable")
        distances_QK = np.take_along_axis(self.distances_QK, order, axis=1)
        return SearchResult(distances_QK, np.take_along_axis(self.ids_QK, order, axis=1))


@dataclass(frozen=True)
class ExcludedIds:
    """Ids [first, last) that are never candidates of a query, one interval per query."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]


def search_by_lists(
    parts: InvertedParts,
    vectors: NDArray[np.float32],
    keep: int,
    excluded: ExcludedIds | None = None,
    advance: Advance | None = None,
) -> SearchResult:
    """The nearest `keep` vectors of each query in the lists that it probes (`nprobe` of the index)."""
    queries = torch.from_numpy(parts.transformed(vectors))
    candidates = top_candidates(len(queries), keep)
    if excluded is not None:
        candidates.exclude(excluded.first, excluded.last)
    halves = queries.bfloat16() if has_fast_bfloat16() and _scans_much(parts, keep) else None
    with torch.inference_mode():
        for number, rows in _queries_by_list(parts, queries.numpy()):
            _score_list(parts, number, queries, halves, rows, candidates)
            if advance is not None:
                advance(len(rows) / min(int(parts.inverted.nprobe), parts.num_lists))
    scores, ids = candidates.best()
    squares = torch.linalg.vecdot(queries, queries).numpy()[:, None]
    return SearchResult(np.maximum(squares - 2 * scores, 0).astype(np.float32), ids)


def _queries_by_list(parts: InvertedParts, queries: NDArray[np.float32]) -> Any:
    """Every probed list with the queries that probe it, both in ascending order."""
    nprobe = min(int(parts.inverted.nprobe), parts.num_lists)
    if nprobe == parts.num_lists:
        everyone = np.arange(len(queries))
        yield from ((number, everyone) for number in range(parts.num_lists))
        return
    _, probed = parts.inverted.quantizer.search(queries, nprobe)
    order = np.argsort(probed.reshape(-1), kind="stable")
    lists = probed.reshape(-1)[order]
    present, starts = np.unique(lists, return_index=True)
    rows = order // nprobe
    for number, start, stop in zip(present, starts, [*starts[1:], len(rows)], strict=True):
        if number >= 0:
            yield int(number), rows[start:stop]


def _score_list(
    parts: InvertedParts,
    number: int,
    queries: torch.Tensor,
    halves: torch.Tensor | None,
    rows: NDArray[np.int64],
    candidates: Candidates,
) -> None:
    with list_content(parts.inverted.invlists, number) as (ids, codes):
        for first in range(0, len(ids), _TILE_VECTORS):
            tile = slice(first, first + _TILE_VECTORS)
            vectors = torch.from_numpy(parts.decoded(number, codes[tile]))
            offsets = vectors.square().sum(1).mul_(-0.5).numpy()
            if halves is None:
                for chosen, tile_queries in _query_tiles(queries, rows, max(1, _TILE_SCORES // len(vectors))):
                    candidates.offer(chosen, (tile_queries @ vectors.T).numpy(), offsets, ids[tile])
                continue
            others = torch.zeros(_padded(len(vectors)), vectors.shape[1], dtype=torch.bfloat16)
            others[: len(vectors)] = vectors
            for chosen, tile_queries in _query_tiles(halves, rows, _padded(_TILE_SCORES // len(others))):
                bits = (tile_queries @ others.T).view(torch.int16).numpy().view(np.uint16)
                candidates.offer_rounded(chosen, bits, offsets, ids[tile], queries.numpy(), vectors.numpy())


def _query_tiles(
    queries: torch.Tensor, rows: NDArray[np.int64], step: int
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Groups of queries with their vectors; in bfloat16 some are repeated, to fill up a size that recurs."""
    if len(rows) == len(queries):
        yield from ((rows[start : start + step], queries[start : start + step]) for start in range(0, len(rows), step))
        return
    rounded = queries.dtype == torch.bfloat16
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        places = np.resize(chosen, _padded(len(chosen))) if rounded else chosen
        yield chosen, queries.index_select(0, torch.from_numpy(places))


def _padded(size: int) -> int:
    """The next multiple of a step: the bfloat16 engine compiles a kernel for every size that it meets."""
    return -(-size // _SIZE_STEP) * _SIZE_STEP


def _scans_much(parts: InvertedParts, keep: int) -> bool:
    """Whether a query sees so many scores that computing the best of them twice costs little."""
    nprobe = min(int(parts.inverted.nprobe), parts.num_lists)
    return int(parts.inverted.ntotal) * nprobe >= _SCORES_PER_KEPT * keep * parts.num_lists


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; without that it is slower than float32."""
    flags = processor_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


_WIDENING = 4
_WIDE_CANDIDATES = 1 << 24


@dataclass(frozen=True)
class Searcher:
    """A searchable index and how it is searched; with a copy on GPUs it is searched there, query by query."""

    index: Any
    nprobe: int
    ef_search: int
    by_lists: bool
    memory_bytes: float
    gpus: GpuIndex | None = None

    def __post_init__(self) -> None:
        set_search_effort(self.index, self.nprobe, self.ef_search)
        if self.gpus is not None and inverted_parts(self.index) is not None:
            self.gpus.set_lists(self.nprobe)

    def search(
        self,
        vectors: NDArray[np.float32],
        keep: int,
        excluded: ExcludedIds,
        enough: int,
        advance: Advance | None = None,
    ) -> SearchResult:
        """The nearest `keep` vectors of each query that are not excluded; `advance` is told of queries that are done.

        Query by query, `keep` are searched for and the excluded ones dropped; a query that is left with fewer than
        `enough` is searched again, wider.
        """
        if not self.by_lists:
            found = self._search_by_queries(vectors, keep, excluded, min(enough, keep))
            if advance is not None:
                advance(len(vectors))
            return found
        parts = inverted_parts(self.index)
        if parts is None:
            raise ValueError("only an inverted file is searched list by list")
        step = self._rows_at_once(keep, parts.dimension)
        return SearchResult.joined(
            [
                search_by_lists(
                    parts, vectors[start : start + step], keep, _slice(excluded, start, start + step), advance
                )
                for start in range(0, max(len(vectors), 1), step)
            ]
        )

    def nearest(self, vectors: NDArray[np.float32], keep: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and ids of the nearest of all chunks; more than a GPU can select are searched for on the CPU."""
        wanted = np.ascontiguousarray(vectors, np.float32)
        if self.gpus is not None and keep <= MOST_SELECTED:
            return self.gpus.search(wanted, keep)
        distances, ids = self.index.search(wanted, keep)
        return distances, ids

    def _search_by_queries(
        self, vectors: NDArray[np.float32], keep: int, excluded: ExcludedIds, enough: int
    ) -> SearchResult:
        distances, ids = self.nearest(vectors, keep)
        found = _drop_excluded(distances, ids, excluded, keep)
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
        found: SearchResult,
        rows: NDArray[np.int64],
        wide: int,
        excluded: ExcludedIds,
        enough: int,
    ) -> NDArray[np.int64]:
        """Search some queries again and replace their results; returns those that still have too few."""
        distances, ids = self.nearest(vectors[rows], wide)
        again = _drop_excluded(
            distances, ids, ExcludedIds(excluded.first[rows], excluded.last[rows]), found.ids_QK.shape[1]
        )
        found.distances_QK[rows], found.ids_QK[rows] = again.distances_QK, again.ids_QK
        still: NDArray[np.int64] = rows[(again.ids_QK[:, :enough] < 0).any(axis=1) & (ids[:, -1] >= 0)]
        return still

    def _rows_at_once(self, keep: int, dimension: int) -> int:
        row_bytes = dimension * 8 + keep * 40 + min(self.nprobe, 1 << 20) * 48
        return max(256, int(self.memory_bytes / 2 / row_bytes))


def can_search_by_lists(index: Any) -> bool:
    """Whether an index can be searched list by list."""
    parts = inverted_parts(index)
    return parts is not None and type(parts.inverted).__name__ in SEARCHABLE_BY_LISTS and native_module() is not None


def _drop_excluded(
    distances: NDArray[np.float32], ids: NDArray[np.int64], excluded: ExcludedIds, keep: int
) -> SearchResult:
    """The first `keep` candidates that are not excluded, with their distances."""
    kept = keep_other_documents(ids, excluded.first, excluded.last, keep)
    own = (ids >= excluded.first[:, None]) & (ids < excluded.last[:, None]) | (ids < 0)
    order = np.argsort(own, axis=1, kind="stable")[:, :keep]
    ordered = np.take_along_axis(distances, order, axis=1)
    return SearchResult(np.where(kept >= 0, ordered, np.inf).astype(np.float32), kept)


def _slice(excluded: ExcludedIds, start: int, stop: int) -> ExcludedIds:
    return ExcludedIds(excluded.first[start:stop], excluded.last[start:stop])
