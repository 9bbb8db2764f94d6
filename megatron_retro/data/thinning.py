"""A smaller database without building one: a part of its documents, or of its chunks, counts, chosen by a hash.

What is kept is a pure function of the number of the document (or the chunk), so a smaller share is part of a larger
one, and one neighbour table serves them all. Each corpus may have a share of its own: composition by source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.order import mix_array
from megatron_retro.errors import ConfigError

# Hashes are compared without their last bit, so that "all" (2^63) is a number too.
_ALL = 1 << 63


@dataclass(frozen=True)
class Thinning:
    """The share that is kept, of documents or of chunks; times one share per corpus, where those are given."""

    fraction: float = 1.0
    by_chunk: bool = False
    corpus_fractions: tuple[float, ...] = ()

    def check(self, database: ChunkDatabase) -> None:
        """Refuse shares that are not one per corpus."""
        corpora = [file.prefix for file in database.files]
        if self.corpus_fractions and len(self.corpus_fractions) != len(corpora):
            raise ConfigError(
                "--database-corpus-fractions must name one share per corpus of the database",
                got=len(self.corpus_fractions),
                expected=f"{len(corpora)}: {', '.join(corpora)}",
            )

    def limits(self, database: ChunkDatabase) -> NDArray[np.uint64]:
        """Per corpus, the number below which halved hashes are kept; empty when everything is."""
        shares = [self.fraction * share for share in self.corpus_fractions or (1.0,) * len(database.corpora)]
        whole = all(share >= 1.0 for share in shares)
        return np.array([] if whole else [int(min(share, 1.0) * _ALL) for share in shares], np.uint64)

    def keeps(
        self, database: ChunkDatabase, chunks: NDArray[np.int64], documents: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether chunks of the given documents count."""
        limits = self.limits(database)
        if not len(limits):
            return np.ones(chunks.shape, np.bool_)
        corpora = np.searchsorted(database.documents_before, documents, side="right") - 1
        hashes = mix_array((chunks if self.by_chunk else documents).astype(np.uint64))
        return np.asarray((hashes >> np.uint64(1)) < limits[corpora])
