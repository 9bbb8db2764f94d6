"""Where the neighbours of a chunk come from while text is generated: a live index, given passages, or at random.

A source answers for whole chunks, several at once, with tokens in the model's shape and what a reader wants to know
of them. `None` in place of a source means: no neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.runtime.seeds import derived_seed


@dataclass(frozen=True)
class Found:
    """The neighbours of one chunk, nearest first. Chunk id -1: absent, or not from a database."""

    tokens_KR: NDArray[np.int64]
    mask_KR: NDArray[np.bool_]
    chunk_ids: tuple[int, ...]
    distances: tuple[float, ...]

    def token_lists(self) -> list[list[int]]:
        """The tokens that exist, by neighbour."""
        return [tokens[mask].tolist() for tokens, mask in zip(self.tokens_KR, self.mask_KR, strict=True)]


class NeighborSource(Protocol):
    """Finds neighbours. A chunk is its words alone: one of nothing but virtual tokens is empty."""

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Found]:
        """One answer per chunk."""


class ChunkSearch(Protocol):
    """What of a live index is used here."""

    database: ChunkDatabase

    def search(self, chunks: Sequence[Sequence[int]], num_neighbors: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids [n, k] (-1 = none) and distances."""


class LiveNeighbors:
    """The nearest chunks of a database, searched when they are needed."""

    def __init__(self, index: ChunkSearch, num_neighbors: int, retrieved_length: int) -> None:
        self.index, self.num_neighbors, self.retrieved_length = index, num_neighbors, retrieved_length

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Found]:
        """Embed, search, gather."""
        ids, distances = self.index.search(chunks, self.num_neighbors)
        ids[[not len(chunk) for chunk in chunks]] = -1  # there is nothing to search for
        return gathered(self.index.database, ids, distances, self.retrieved_length)


class RandomNeighbors:
    """Chunks of the database drawn by a hash of the query: the control that real neighbours must beat."""

    def __init__(self, database: ChunkDatabase, num_neighbors: int, retrieved_length: int, seed: int = 0) -> None:
        self.database, self.num_neighbors, self.retrieved_length = database, num_neighbors, retrieved_length
        self.seed = seed

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Found]:
        """The same chunk gets the same neighbours."""
        rows = [self._draw(chunk) for chunk in chunks]
        ids = np.array(rows, np.int64).reshape(len(chunks), self.num_neighbors)
        return gathered(self.database, ids, np.full(ids.shape, np.nan), self.retrieved_length)

    def _draw(self, chunk: Sequence[int]) -> list[int]:
        draws = np.random.default_rng(derived_seed(self.seed, "random neighbors", *chunk))
        return [int(draws.integers(self.database.num_chunks)) for _ in range(self.num_neighbors)]


class GivenPassages:
    """The same passages for every chunk: the published protocol of question answering with the encoder on."""

    def __init__(self, passages: Sequence[Sequence[int]], num_neighbors: int, retrieved_length: int) -> None:
        tokens_KR = np.zeros((num_neighbors, retrieved_length), np.int64)
        mask_KR = np.zeros((num_neighbors, retrieved_length), np.bool_)
        for row, passage in enumerate(passages[:num_neighbors]):
            cut = list(passage)[:retrieved_length]
            tokens_KR[row, : len(cut)] = cut
            mask_KR[row, : len(cut)] = True
        self.found = Found(tokens_KR, mask_KR, (-1,) * num_neighbors, (float("nan"),) * num_neighbors)

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Found]:
        """What was given."""
        return [self.found] * len(chunks)


def gathered(
    database: ChunkDatabase, ids_XK: NDArray[Any], distances_XK: NDArray[Any], retrieved_length: int
) -> list[Found]:
    """Tokens of found chunks."""
    tokens_XKR, mask_XKR = database.gather(np.asarray(ids_XK, np.int64), retrieved_length)
    return [
        Found(tokens.astype(np.int64), mask, tuple(ids.tolist()), tuple(map(float, distances)))
        for tokens, mask, ids, distances in zip(tokens_XKR, mask_XKR, ids_XK, distances_XK, strict=True)
    ]
