"""Search list by list: every inverted list meets all queries that probe it in one matrix product.

Searching query by query reads a list once per query; here it is read, decoded and multiplied once for all. The order
of scores is that of squared distances: score = q.x - |x|^2 / 2. On processors that multiply bfloat16 faster, the
product is taken in it, and the scores that may be among the best are computed again, exactly. A query's own documents
are an interval of ids and are passed over while candidates are collected, so they take no place from others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.faiss_index import InvertedParts, list_content
from megatron_retro.retrieval.native import Candidates, top_candidates
from megatron_retro.runtime.environment import processor_flags

_TILE_VECTORS = 1024
_TILE_SCORES = 1 << 18
_SIZE_STEP = 64
_SCORES_PER_KEPT = 100
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
    halves = queries.bfloat16() if multiplies_bfloat16() and _scans_much(parts, keep) else None
    with torch.inference_mode():
        for number, rows in _rows_by_list(parts, queries.numpy()):
            _join_list(parts, number, queries, halves, rows, candidates)
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
                for chosen, asking in _askers(queries, rows, max(1, _TILE_SCORES // len(vectors))):
                    candidates.offer(chosen, (asking @ vectors.T).numpy(), offsets, ids[tile])
                continue
            others = torch.zeros(_padded(len(vectors)), vectors.shape[1], dtype=torch.bfloat16)
            others[: len(vectors)] = vectors
            for chosen, asking in _askers(halves, rows, _padded(_TILE_SCORES // len(others))):
                bits = (asking @ others.T).view(torch.int16).numpy().view(np.uint16)
                candidates.offer_rounded(chosen, bits, offsets, ids[tile], queries.numpy(), vectors.numpy())


def _askers(
    queries: torch.Tensor, rows: NDArray[np.int64], step: int
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Some rows at a time with their vectors; in bfloat16 some may be there twice, for a size that recurs."""
    if len(rows) == len(queries):
        yield from ((rows[start : start + step], queries[start : start + step]) for start in range(0, len(rows), step))
        return
    rounded = queries.dtype == torch.bfloat16
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        places = np.resize(chosen, _padded(len(chosen))) if rounded else chosen
        yield chosen, queries.index_select(0, torch.from_numpy(places))


def _padded(size: int) -> int:
    """The next of a few sizes: the engine of bfloat16 compiles a kernel for every size that it meets."""
    return -(-size // _SIZE_STEP) * _SIZE_STEP


def _scans_much(parts: InvertedParts, keep: int) -> bool:
    """Whether so many scores are passed over that computing the best of them twice does not matter."""
    nprobe = min(int(parts.inverted.nprobe), parts.num_lists)
    return int(parts.inverted.ntotal) * nprobe >= _SCORES_PER_KEPT * keep * parts.num_lists


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them they are slower than float32's."""
    flags = processor_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags
