"""The query chunks of a corpus: tokens, the text after them, vectors, and the chunks of their own documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.query_chunks import QueryChunks
from megatron_retro.data.token_file import TokenFile
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS
from megatron_retro.retrieval.index_search import ExcludedIds
from megatron_retro.retrieval.project import Project, QueryCorpus
from megatron_retro.retrieval.reranking import MaskedTokens
from megatron_retro.runtime.console import Advance, unseen


@dataclass(frozen=True)
class QueryTexts:
    """The query chunks of one corpus of a project."""

    project: Project
    corpus: QueryCorpus
    chunks: QueryChunks

    def vectors(self, first: int, last: int, advance: Advance = unseen) -> NDArray[np.float32]:
        """Vectors of query chunks; the end-of-document id is no text. `advance` is told of chunks that are done."""
        vectors = np.empty((last - first, self.project.embedder.dimension), np.float32)
        for start in range(first, last, BATCH_CHUNKS):
            stop = min(start + BATCH_CHUNKS, last)
            texts = self.texts(start, stop)
            found = self.project.embedder.embed(texts.tokens_NM, texts.present_NM, advance)
            vectors[start - first : stop - first] = found
        return vectors

    def texts(self, first: int, last: int) -> MaskedTokens:
        """Tokens of query chunks; the end-of-document id is masked."""
        return self._masked(self.chunks.tokens(first, last))

    def successors(self, first: int, last: int) -> MaskedTokens:
        """Tokens that follow each query chunk: the next chunk, as far as the stream goes."""
        length, file = self.chunks.chunk_length, self.chunks.file
        stop = min((last + 1) * length, file.num_tokens)
        stream = file.tokens((first + 1) * length, max(stop, (first + 1) * length))
        padded = np.zeros((last - first) * length, stream.dtype)
        padded[: len(stream)] = stream
        texts = self._masked(padded.reshape(-1, length))
        there = np.arange(padded.size).reshape(-1, length) < len(stream)
        return MaskedTokens(texts.tokens_NM, texts.present_NM & there)

    def own_chunks(self, numbers: NDArray[np.int64], following: int = 1) -> ExcludedIds:
        """The database chunks of the documents of each query chunk and of so many that follow, as an interval of ids.

        Whoever reads a chunk's neighbours predicts the next chunk, so the documents of that are the query's own, too.
        """
        database, file = self.project.database, self.chunks.file
        first, _ = self.chunks.documents(numbers)
        end = np.minimum((np.asarray(numbers, np.int64) + 1 + following) * self.chunks.chunk_length, file.num_tokens)
        last = file.documents_of(end - 1) + 1
        low, high = database.map_documents(self.chunks.file.fingerprint, first, last)
        return ExcludedIds(np.asarray(database.chunks_before[low]), np.asarray(database.chunks_before[high]))

    def _masked(self, tokens: NDArray[Any]) -> MaskedTokens:
        eod = self.project.eod
        return MaskedTokens(tokens, np.ones(tokens.shape, np.bool_) if eod is None else tokens != eod)


def query_chunks(project: Project, corpus: QueryCorpus) -> QueryChunks:
    """The packed stream of a corpus, cut as the database is."""
    return QueryChunks(TokenFile(corpus.prefix), project.database.chunk_length)
