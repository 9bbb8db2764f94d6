"""Candidates after the search: refined by better distances, re-ranked by shared tokens, leaks dropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS, as_bfloat16
from megatron_retro.retrieval.chunk_vectors import ChunkVectors
from megatron_retro.retrieval.index_search import SearchResult
from megatron_retro.retrieval.native import bm25_scores, candidate_distances, longest_common_runs, token_overlaps

BATCH_ROWS = 4096
_SAMPLED_CHUNKS = 200_000
_HALF_BYTES = 2
K1, B = 1.2, 0.75


@dataclass(frozen=True)
class MaskedTokens:
    """Tokens of query chunks, and which of them are present."""

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


def refine_with_kept(found: SearchResult, queries: NDArray[np.float32], vectors: NDArray[np.uint16]) -> SearchResult:
    """Order candidates by the distances of their kept vectors instead of those of their codes."""
    distances = candidate_distances(queries, found.ids_QK, vectors)
    return SearchResult(distances, found.ids_QK).sorted_by(distances)


def refine_by_embedding(
    found: SearchResult, queries: NDArray[np.float32], chunk_vectors: ChunkVectors, memory_bytes: float
) -> SearchResult:
    """The same where no vectors were kept: the candidates of a group of queries are embedded again, each once."""
    step = max(1, int(memory_bytes / (found.ids_QK.shape[1] * chunk_vectors.dimension * _HALF_BYTES)))
    parts = []
    for start in range(0, max(len(queries), 1), step):
        ids = found.ids_QK[start : start + step]
        wanted, places = np.unique(np.maximum(ids, 0), return_inverse=True)
        distances = candidate_distances(
            queries[start : start + step],
            np.where(ids >= 0, places.reshape(ids.shape), -1),
            _half_vectors(wanted, chunk_vectors),
        )
        parts.append(SearchResult(distances, ids).sorted_by(distances))
    return SearchResult(
        np.concatenate([part.distances_QK for part in parts]), np.concatenate([part.ids_QK for part in parts])
    )


def _half_vectors(chunks: NDArray[np.int64], chunk_vectors: ChunkVectors) -> NDArray[np.uint16]:
    """Vectors of chunks in bfloat16, as they would have been kept."""
    vectors = np.empty((len(chunks), chunk_vectors.dimension), np.uint16)
    for start in range(0, len(chunks), BATCH_CHUNKS):
        part = chunks[start : start + BATCH_CHUNKS]
        vectors[start : start + len(part)] = as_bfloat16(chunk_vectors.of(part))
    return vectors


def rerank(
    found: SearchResult, texts: MaskedTokens, database: ChunkDatabase, kind: str, statistics: TokenStatistics
) -> SearchResult:
    """Order candidates by the tokens that they share with the query chunk, ties by distance."""
    tokens, there = database.gather(found.ids_QK, database.chunk_length)
    if kind == "overlap":
        scores = token_overlaps(texts.tokens_NM, texts.present_NM, tokens, there)
    else:
        weights = statistics.inverse_frequencies
        mean = float(database.chunk_length)
        scores = bm25_scores(texts.tokens_NM, texts.present_NM, tokens, there, weights, k1=K1, b=B, mean_length=mean)
    return found.sorted_by(np.where(found.ids_QK >= 0, -scores, np.inf))


def drop_leaks(
    found: SearchResult, successors: MaskedTokens, database: ChunkDatabase, retrieved_length: int, share: float
) -> SearchResult:
    """Drop candidates that, continuation included, share too long a run with the text after the query chunk."""
    tokens, there = database.gather(found.ids_QK, retrieved_length)
    runs = longest_common_runs(successors.tokens_NM, successors.present_NM, tokens, there)
    leaks = runs > share * database.chunk_length
    kept = SearchResult(
        np.where(leaks, np.inf, found.distances_QK).astype(np.float32), np.where(leaks, -1, found.ids_QK)
    )
    return kept.sorted_by((kept.ids_QK < 0).astype(np.int8))
