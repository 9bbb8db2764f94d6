"""Exact search, which an index is compared with: every query against every chunk, a batch of chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS, from_bfloat16
from megatron_retro.retrieval.index_search import ExcludedIds, SearchResult
from megatron_retro.retrieval.project import Project
from megatron_retro.runtime.console import Progress


@dataclass(frozen=True)
class ExactNeighbors:
    """The nearest chunks by exact distances, and the queries' vectors, to measure other chunks with."""

    vectors: NDArray[np.float32]
    found: SearchResult


def exact_neighbors(project: Project, vectors: NDArray[np.float32], excluded: ExcludedIds, keep: int) -> ExactNeighbors:
    """The nearest `keep` foreign chunks of each query among all that the index holds."""
    best = SearchResult(np.full((len(vectors), keep), np.inf, np.float32), np.full((len(vectors), keep), -1, np.int64))
    queries = torch.from_numpy(vectors)
    squares = torch.linalg.vecdot(queries, queries)[:, None]
    total = sum(block.size for block in project.blocks)
    with Progress("verify: exact search", total, "chunks") as progress:
        for first, chunks in _all_vectors(project):
            there = torch.from_numpy(chunks)
            distances = squares + torch.linalg.vecdot(there, there) - 2 * queries @ there.T
            best = _merge_nearest(best, distances.clamp_(min=0), first, excluded)
            progress.advance(len(chunks))
    return ExactNeighbors(vectors, best)


def _all_vectors(project: Project) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First id and vectors of batches of chunks: the kept ones, or embedded again."""
    for block in project.blocks:
        for first in range(block.first, block.last, BATCH_CHUNKS):
            yield first, _vectors_of(project, np.arange(first, min(first + BATCH_CHUNKS, block.last)))


def _merge_nearest(best: SearchResult, distances: torch.Tensor, first: int, excluded: ExcludedIds) -> SearchResult:
    """The nearest of those found so far and of one more batch of chunks."""
    keep = best.ids_QK.shape[1]
    ids = torch.arange(first, first + distances.shape[1])
    own = (ids >= torch.from_numpy(excluded.first)[:, None]) & (ids < torch.from_numpy(excluded.last)[:, None])
    distances = distances.masked_fill_(own, float("inf"))
    near = distances.topk(min(keep, distances.shape[1]), largest=False)
    values, numbers = near.values.numpy(), near.indices.numpy() + first
    joined = SearchResult.joined([best, SearchResult(values, np.where(np.isfinite(values), numbers, -1))], axis=1)
    ordered = joined.sorted_by(joined.distances_QK)
    return SearchResult(ordered.distances_QK[:, :keep], ordered.ids_QK[:, :keep])


def distances_to(project: Project, vectors: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Exact squared distances of queries to given chunks; infinite for an absent one."""
    wanted, places = np.unique(np.maximum(ids, 0), return_inverse=True)
    chunks = np.empty((len(wanted), vectors.shape[1]), np.float32)
    for start in range(0, len(wanted), BATCH_CHUNKS):
        part = wanted[start : start + BATCH_CHUNKS]
        chunks[start : start + len(part)] = _vectors_of(project, part)
    result = np.full(ids.shape, np.inf, np.float32)
    for row, (vector, columns) in enumerate(zip(vectors, places.reshape(ids.shape), strict=True)):
        result[row] = np.square(chunks[columns] - vector).sum(axis=1)
    return np.where(ids >= 0, result, np.inf).astype(np.float32)


def _vectors_of(project: Project, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    if project.kept_vectors is not None:
        return from_bfloat16(project.kept_vectors.mapped()[ids])
    return project.chunk_vectors.of(ids)
