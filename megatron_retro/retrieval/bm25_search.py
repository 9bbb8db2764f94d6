"""The nearest chunks of the whole database by BM25 over tokens, instead of by vectors and an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS
from megatron_retro.retrieval.index_search import ExcludedIds, SearchResult
from megatron_retro.retrieval.reranking import K1, B, MaskedTokens
from megatron_retro.runtime.console import Advance, Progress, readable_bytes, unseen
from megatron_retro.runtime.environment import require

_BYTES_PER_TOKEN = 80  # of the database, while bm25s makes its matrix; 62 and 70 were measured


@dataclass(frozen=True)
class Bm25Search:
    """All chunks in memory; a query meets each that shares a token with it."""

    scores: Any  # bm25s.BM25
    num_chunks: int

    @classmethod
    def of(cls, database: ChunkDatabase, memory_bytes: float) -> Bm25Search:
        """Read the database; refused where it does not fit."""
        require("bm25s", "--retro-candidates bm25")
        import bm25s

        needed = database.num_chunks * database.chunk_length * _BYTES_PER_TOKEN
        if needed > memory_bytes:
            raise ConfigError(
                "--retro-candidates bm25 holds the whole database in memory",
                got=f"about {readable_bytes(needed)}, with --retro-memory-gb {memory_bytes / 1e9:g}",
                fix="raise --retro-memory-gb, or let the index find candidates and --retro-rerank bm25 order them",
            )
        texts: list[list[int]] = []
        with Progress("bm25: the database", database.num_chunks, "chunks") as progress:
            for first in range(0, database.num_chunks, BATCH_CHUNKS):
                ids = np.arange(first, min(first + BATCH_CHUNKS, database.num_chunks))
                tokens, present = database.gather(ids, database.chunk_length)
                texts += [row[there].tolist() for row, there in zip(tokens, present, strict=True)]
                progress.advance(len(ids))
        last = max((max(text) for text in texts if text), default=0)
        vocabulary = {str(token): token for token in range(last + 1)}
        scores = bm25s.BM25(k1=K1, b=B)
        scores.index(bm25s.tokenization.Tokenized(ids=texts, vocab=vocabulary), show_progress=False)
        return cls(scores, database.num_chunks)

    def search(self, texts: MaskedTokens, keep: int, excluded: ExcludedIds, advance: Advance = unseen) -> SearchResult:
        """The best of each query, ties by number; what shares no token with it is no candidate."""
        ids_QK = np.full((len(texts.tokens_NM), keep), -1, np.int64)
        distances_QK = np.full(ids_QK.shape, np.inf, np.float32)
        for row, (tokens, there) in enumerate(zip(texts.tokens_NM, texts.present_NM, strict=True)):
            scores = self._scores(tokens[there])
            scores[excluded.first[row] : excluded.last[row]] = 0
            found = _best(scores, keep)
            ids_QK[row, : len(found)], distances_QK[row, : len(found)] = found, -scores[found]
            advance(1)
        return SearchResult(distances_QK, ids_QK)

    def _scores(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        known = tokens[tokens < len(self.scores.vocab_dict)].astype(np.int32)
        if not len(known):
            return np.zeros(self.num_chunks, np.float32)
        found: NDArray[np.float32] = self.scores.get_scores_from_ids(known.tolist())
        return found


def _best(scores: NDArray[np.float32], keep: int) -> NDArray[np.int64]:
    """The places of the highest scores above zero, highest first, ties by place."""
    above = np.flatnonzero(scores > 0)
    if len(above) > keep:
        least = np.partition(scores[above], len(above) - keep)[len(above) - keep]
        above = above[scores[above] >= least]
    order = np.argsort(-scores[above], kind="stable")[:keep]
    chosen: NDArray[np.int64] = above[order]
    return chosen
