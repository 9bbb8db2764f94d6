"""The truth that an index is compared with: every query against every chunk, a batch of chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.encoding import BATCH_CHUNKS, database_vectors, from_bfloat16
from megatron_retro.retrieval.layout import Span
from megatron_retro.retrieval.list_join import Excluded, Found
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.reordering import in_order
from megatron_retro.runtime.console import Progress


@dataclass(frozen=True)
class Truth:
    """The nearest chunks by exact distances, and vectors of queries to measure others with."""

    vectors: NDArray[np.float32]
    found: Found


def exact_neighbors(project: Project, vectors: NDArray[np.float32], excluded: Excluded, keep: int) -> Truth:
    """The nearest `keep` foreign chunks of each query among all that the index holds."""
    best = Found(np.full((len(vectors), keep), np.inf, np.float32), np.full((len(vectors), keep), -1, np.int64))
    queries = torch.from_numpy(vectors)
    squares = torch.linalg.vecdot(queries, queries)[:, None]
    total = sum(span.size for span in project.blocks)
    with Progress("verify: exact search", total, "chunks") as progress:
        for first, chunks in _all_vectors(project):
            there = torch.from_numpy(chunks)
            distances = squares + torch.linalg.vecdot(there, there) - 2 * queries @ there.T
            best = _nearer(best, distances.clamp_(min=0), first, excluded)
            progress.advance(len(chunks))
    return Truth(vectors, best)


def _all_vectors(project: Project) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First id and vectors of batches of chunks: the kept ones, or embedded again."""
    for span in project.blocks:
        if project.kept_vectors is not None:
            kept = project.kept_vectors.mapped()
            for first in range(span.first, span.last, BATCH_CHUNKS):
                yield first, from_bfloat16(kept[first : min(first + BATCH_CHUNKS, span.last)])
            continue
        first = span.first
        for vectors in database_vectors(project.database, project.embedder, Span(span.first, span.last)):
            yield first, vectors
            first += len(vectors)


def _nearer(best: Found, distances: torch.Tensor, first: int, excluded: Excluded) -> Found:
    """The best so far and a batch's best, together."""
    keep = best.ids_QK.shape[1]
    ids = torch.arange(first, first + distances.shape[1])
    own = (ids >= torch.from_numpy(excluded.first)[:, None]) & (ids < torch.from_numpy(excluded.last)[:, None])
    distances = distances.masked_fill_(own, float("inf"))
    near = distances.topk(min(keep, distances.shape[1]), largest=False)
    values, numbers = near.values.numpy(), near.indices.numpy() + first
    joined = Found(
        np.concatenate([best.distances_QK, values], axis=1),
        np.concatenate([best.ids_QK, np.where(np.isfinite(values), numbers, -1)], axis=1),
    )
    ordered = in_order(joined, joined.distances_QK)
    return Found(ordered.distances_QK[:, :keep], ordered.ids_QK[:, :keep])


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
    return project.embedder.embed(*project.database.gather(ids, project.database.chunk_length))
