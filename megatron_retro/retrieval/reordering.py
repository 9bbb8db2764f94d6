"""What may be done to candidates after the search: order them by better distances or shared tokens, drop leaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.encoding import BATCH_CHUNKS, as_bfloat16
from megatron_retro.retrieval.list_join import Found
from megatron_retro.retrieval.native import bm25_scores, candidate_distances, longest_common_runs, token_overlaps

BATCH_ROWS = 4096
_SAMPLED_CHUNKS = 200_000
_HALF_BYTES = 2
_K1, _B = 1.2, 0.75


@dataclass(frozen=True)
class Texts:
    """Tokens of queries, and where there are any."""

    tokens_NM: NDArray[Any]
    present_NM: NDArray[np.bool_]


@dataclass(frozen=True)
class TokenStatistics:
    """How rare the tokens of a database are, from a sample of its chunks."""

    database: ChunkDatabase
    sample: NDArray[np.int64]

    @cached_property
    def inverse_frequencies(self) -> NDArray[np.float32]:
        """BM25's weight of each token id; unseen ids weigh as much as the rarest."""
        counts = np.zeros(1, np.int64)
        for start in range(0, len(self.sample), BATCH_ROWS):
            tokens, present = self.database.gather(self.sample[start : start + BATCH_ROWS], self.database.chunk_length)
            once = np.concatenate([np.unique(row[mask]) for row, mask in zip(tokens, present, strict=True)])
            counted = np.bincount(once.astype(np.int64), minlength=len(counts))
            counts = np.pad(counts, (0, len(counted) - len(counts))) + counted
        total = len(self.sample)
        weights: NDArray[np.float32] = np.log1p((total - counts + 0.5) / (counts + 0.5)).astype(np.float32)
        return np.append(weights, np.full(1 << 16, np.log1p(2 * total + 1), np.float32))


def statistics_of(database: ChunkDatabase, sample: NDArray[np.int64]) -> TokenStatistics:
    """Statistics from at most a fixed number of the sampled chunks."""
    return TokenStatistics(database, sample[:: max(1, len(sample) // _SAMPLED_CHUNKS)])


def refined(found: Found, queries: NDArray[np.float32], vectors: NDArray[np.uint16]) -> Found:
    """Candidates ordered by their kept vectors instead of their codes; distances are those of the kept vectors."""
    distances = candidate_distances(queries, found.ids_QK, vectors)
    return in_order(Found(distances, found.ids_QK), distances)


def refined_anew(
    found: Found, queries: NDArray[np.float32], database: ChunkDatabase, embedder: Embedder, memory_bytes: float
) -> Found:
    """The same where no vectors were kept: every candidate of a few rows is embedded again, once for all of them."""
    step = max(1, int(memory_bytes / (found.ids_QK.shape[1] * embedder.dimension * _HALF_BYTES)))
    parts = []
    for start in range(0, max(len(queries), 1), step):
        ids = found.ids_QK[start : start + step]
        wanted, places = np.unique(np.maximum(ids, 0), return_inverse=True)
        distances = candidate_distances(
            queries[start : start + step],
            np.where(ids >= 0, places.reshape(ids.shape), -1),
            _half_vectors(wanted, database, embedder),
        )
        parts.append(in_order(Found(distances, ids), distances))
    return Found(np.concatenate([part.distances_QK for part in parts]), np.concatenate([part.ids_QK for part in parts]))


def _half_vectors(chunks: NDArray[np.int64], database: ChunkDatabase, embedder: Embedder) -> NDArray[np.uint16]:
    """Vectors of chunks as they would have been kept."""
    vectors = np.empty((len(chunks), embedder.dimension), np.uint16)
    for start in range(0, len(chunks), BATCH_CHUNKS):
        part = chunks[start : start + BATCH_CHUNKS]
        vectors[start : start + len(part)] = as_bfloat16(embedder.embed(*database.gather(part, database.chunk_length)))
    return vectors


def reranked(found: Found, texts: Texts, database: ChunkDatabase, kind: str, statistics: TokenStatistics) -> Found:
    """Candidates ordered by the tokens they share with the query chunk, ties by distance."""
    tokens, there = database.gather(found.ids_QK, database.chunk_length)
    if kind == "overlap":
        scores = token_overlaps(texts.tokens_NM, texts.present_NM, tokens, there)
    else:
        weights = statistics.inverse_frequencies
        mean = float(database.chunk_length)
        scores = bm25_scores(texts.tokens_NM, texts.present_NM, tokens, there, weights, k1=_K1, b=_B, mean_length=mean)
    return in_order(found, np.where(found.ids_QK >= 0, -scores, np.inf))


def without_leaks(
    found: Found, successors: Texts, database: ChunkDatabase, retrieved_length: int, share: float
) -> Found:
    """Candidates without those that, continuation included, share too long a run with the query's successor."""
    tokens, there = database.gather(found.ids_QK, retrieved_length)
    runs = longest_common_runs(successors.tokens_NM, successors.present_NM, tokens, there)
    leaks = runs > share * database.chunk_length
    kept = Found(np.where(leaks, np.inf, found.distances_QK).astype(np.float32), np.where(leaks, -1, found.ids_QK))
    return in_order(kept, (kept.ids_QK < 0).astype(np.int8))


def in_order(found: Found, keys: NDArray[Any]) -> Found:
    """Candidates sorted by keys, smallest first, ties as they were."""
    order = np.argsort(keys, axis=1, kind="stable")
    return Found(np.take_along_axis(found.distances_QK, order, axis=1), np.take_along_axis(found.ids_QK, order, axis=1))
