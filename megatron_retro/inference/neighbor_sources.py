"""Where the neighbours of a chunk come from while text is generated: a live index, given passages, or random chunks.

A source finds neighbours of several chunks at once and returns their tokens in the model's shape, with chunk ids and
distances. `None` in place of a source means that no neighbours are read.
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
class RetrievedNeighbors:
    """The neighbours of one chunk, nearest first. Chunk id -1: absent, or not from a database."""

    tokens_KR: NDArray[np.int64]
    mask_KR: NDArray[np.bool_]
    chunk_ids: tuple[int, ...]
    distances: tuple[float, ...]

    def token_lists(self) -> list[list[int]]:
        """The tokens that exist, by neighbour."""
        return [tokens[mask].tolist() for tokens, mask in zip(self.tokens_KR, self.mask_KR, strict=True)]


@dataclass(frozen=True)
class ChunkReading:
    """What a finished text made of one chunk's neighbours: the attention that each of their tokens got, and the nats
    that it loses without each of them."""

    attention_KR: NDArray[np.float32]
    worth_K: NDArray[np.float32]


class NeighborSource(Protocol):
    """Finds neighbours. A chunk has no virtual tokens: one that held nothing else is empty."""

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        """The neighbours of each chunk."""


class ChunkSearch(Protocol):
    """The part of a live index that is used here."""

    database: ChunkDatabase

    def search(self, chunks: Sequence[Sequence[int]], num_neighbors: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids [n, k], -1 for none, and squared distances."""

    def embed(self, chunks: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors that are searched for."""


class LiveNeighbors:
    """The nearest chunks of a database, searched during generation."""

    def __init__(self, index: ChunkSearch, num_neighbors: int, retrieved_length: int) -> None:
        self.index, self.num_neighbors, self.retrieved_length = index, num_neighbors, retrieved_length

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        """Embed the chunks, search the index, gather the tokens."""
        ids, distances = self.index.search(chunks, self.num_neighbors)
        ids[[not len(chunk) for chunk in chunks]] = -1  # there is nothing to search for
        return gather_neighbors(self.index.database, ids, distances, self.retrieved_length)


class RandomNeighbors:
    """Chunks of the database drawn by a hash of the query: the baseline that real neighbours must beat."""

    def __init__(self, database: ChunkDatabase, num_neighbors: int, retrieved_length: int, seed: int = 0) -> None:
        self.database, self.num_neighbors, self.retrieved_length = database, num_neighbors, retrieved_length
        self.seed = seed

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        """Random chunks; the same query gets the same ones."""
        rows = [self._draw(chunk) for chunk in chunks]
        ids = np.array(rows, np.int64).reshape(len(chunks), self.num_neighbors)
        return gather_neighbors(self.database, ids, np.full(ids.shape, np.nan), self.retrieved_length)

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
        self.found = RetrievedNeighbors(tokens_KR, mask_KR, (-1,) * num_neighbors, (float("nan"),) * num_neighbors)

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        """The given passages, for every chunk."""
        return [self.found] * len(chunks)


def gather_neighbors(
    database: ChunkDatabase, ids_XK: NDArray[Any], distances_XK: NDArray[Any], retrieved_length: int
) -> list[RetrievedNeighbors]:
    """The tokens of chunk ids, with ids and distances."""
    tokens_XKR, mask_XKR = database.gather(np.asarray(ids_XK, np.int64), retrieved_length)
    return [
        RetrievedNeighbors(tokens.astype(np.int64), mask, tuple(ids.tolist()), tuple(map(float, distances)))
        for tokens, mask, ids, distances in zip(tokens_XKR, mask_XKR, ids_XK, distances_XK, strict=True)
    ]
