"""The leak guard: what a share of a chunk keeps out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.token_file import TokenFile
from megatron_retro.retrieval.index_search import SearchResult
from megatron_retro.retrieval.reranking import MaskedTokens, drop_leaks
from megatron_retro.testing.corpora import write_documents


def test_below_half_a_chunk_nothing_with_its_next_half_stays(tmp_path: Path) -> None:
    """A chunk of 8 that carries 3, 4 or 5 tokens of the successor: 0.5 keeps the run of 4, 0.49 does not."""
    following = np.arange(1, 9)
    documents = [[*following[:shared].tolist(), *range(100, 108 - shared)] for shared in (3, 4, 5)]
    write_documents(tmp_path / "corpus", documents)
    file = TokenFile(tmp_path / "corpus")
    database = ChunkDatabase.create(tmp_path / "database", [file.prefix], 8, eod=None)
    successors = MaskedTokens(following[None], np.ones((1, 8), np.bool_))
    for share, kept in ((0.5, [0, 1]), (0.49, [0])):
        found = SearchResult(np.arange(3, dtype=np.float32)[None], np.arange(3)[None])
        ids = drop_leaks(found, successors, database, 8, share).ids_QK[0]
        assert ids[ids >= 0].tolist() == kept
