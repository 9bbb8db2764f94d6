"""The grid of query chunks: chunk u of a corpus is its tokens [u*m, (u+1)*m).

The grid belongs to the corpus, before any split; a rest shorter than m at the end of the stream is no chunk.
A split owns the chunks that lie wholly inside its documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.token_file import TokenFile


@dataclass(frozen=True)
class QueryChunks:
    """The chunks of one corpus."""

    file: TokenFile
    chunk_length: int

    @property
    def num_chunks(self) -> int:
        """Whole chunks of the stream."""
        return self.file.num_tokens // self.chunk_length

    def tokens(self, first: int, last: int) -> NDArray[Any]:
        """Tokens of the chunks [first, last) as a view [last - first, m]."""
        length = self.chunk_length
        return self.file.tokens(first * length, last * length).reshape(-1, length)

    def documents(self, chunks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first document of each chunk and the one after its last."""
        starts = np.asarray(chunks, np.int64) * self.chunk_length
        return self.file.documents_of(starts), self.file.documents_of(starts + self.chunk_length - 1) + 1

    def within_documents(self, first_document: int, last_document: int) -> tuple[int, int]:
        """The chunks [first, last) that lie wholly inside the documents [first_document, last_document)."""
        start, stop = self.file.document_starts(np.array([first_document, last_document]))
        first, last = -(-int(start) // self.chunk_length), int(stop) // self.chunk_length
        return first, max(first, last)
