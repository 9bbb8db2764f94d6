"""Search list by list: every inverted list meets all queries that probe it in one matrix product.

Searching query by query reads a list once per query; here it is read, decoded and multiplied once for all. The order
of scores is that of squared distances: score = q.x - |x|^2 / 2. A query's own documents are an interval of ids and
are passed over while candidates are collected, so they take no place from others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.faiss_index import InvertedParts, list_content
from megatron_retro.retrieval.native import Candidates, top_candidates

_TILE_VECTORS = 1024
_TILE_SCORES = 1 << 18
JOINABLE = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")


@dataclass(frozen=True)
class Found:
    """Candidates of queries: squared distances and ids, nearest first; infinite and -1 where there are too few."""

    distances_QK: NDArray[np.float32]
    ids_QK: NDArray[np.int64]


@dataclass(frozen=True)
class Excluded:
    """Ids [first, last) that are no candidates of a query, one interval per query."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]


def search_by_lists(
    parts: InvertedParts, vectors: NDArray[np.float32], keep: int, excluded: Excluded | None = None
) -> Found:
    """The nearest `keep` vectors of each query in the lists it probes (the index says how many)."""
    queries = torch.from_numpy(parts.transformed(vectors))
    candidates = top_candidates(len(queries), keep)
    if excluded is not None:
        candidates.exclude(excluded.first, excluded.last)
    with torch.inference_mode():
        for number, rows in _rows_by_list(parts, queries.numpy()):
            _join_list(parts, number, queries, rows, candidates)
    scores, ids = candidates.best()
    squares = torch.linalg.vecdot(queries, queries).numpy()[:, None]
    return Found(np.maximum(squares - 2 * scores, 0).astype(np.float32), ids)


def _rows_by_list(parts: InvertedParts, queries: NDArray[np.float32]) -> Any:
    """Each list that is probed, ascending, and the queries that probe it, ascending."""
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


def _join_list(
    parts: InvertedParts, number: int, queries: torch.Tensor, rows: NDArray[np.int64], candidates: Candidates
) -> None:
    with list_content(parts.inverted.invlists, number) as (ids, codes):
        for first in range(0, len(ids), _TILE_VECTORS):
            tile = slice(first, first + _TILE_VECTORS)
            vectors = torch.from_numpy(parts.decoded(number, codes[tile]))
            halves = vectors.square().sum(1).mul_(-0.5).numpy()
            step = max(1, _TILE_SCORES // len(vectors))
            for start in range(0, len(rows), step):
                chosen = rows[start : start + step]
                whole = len(rows) == len(queries)
                asking = queries[start : start + step] if whole else queries.index_select(0, torch.from_numpy(chosen))
                candidates.offer(chosen, (asking @ vectors.T).numpy(), halves, ids[tile])
