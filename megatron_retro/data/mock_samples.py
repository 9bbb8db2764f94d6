"""Random tokens in the shape of a run's samples (`--mock-data`): for timing, without any file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from megatron_retro.microbatch import Array, Microbatch, Neighbors


@dataclass(frozen=True)
class MockSamples:
    """Samples that are pure functions of (seed, number); every neighbour is there and full."""

    seed: int
    vocab_size: int
    seq_length: int
    chunk_length: int
    num_neighbors: int
    retrieved_length: int

    @property
    def fingerprint(self) -> str:
        """Of the settings, which are all there is."""
        return hashlib.sha256(repr(("mock", *astuple(self))).encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """No file was read; the neighbours are those of no database."""
        return {"database": "random tokens"} if self.num_neighbors else {}

    def documents(self, numbers: Sequence[int]) -> None:
        """Random tokens are of no document."""

    def read(self, numbers: Sequence[int]) -> Microbatch[Array]:
        """The samples of these numbers."""
        ids = np.asarray(numbers, np.int64)
        chunks = self.seq_length // self.chunk_length
        shape = (chunks, self.num_neighbors, self.retrieved_length)
        rows = [np.random.Generator(np.random.Philox(key=(self.seed, int(number)))) for number in ids]
        tokens = np.stack([row.integers(0, self.vocab_size, self.seq_length + 1, np.int32) for row in rows])
        neighbors: Neighbors[Array] | None = None
        if self.num_neighbors:
            found = np.stack([row.integers(0, self.vocab_size, shape, np.int32) for row in rows])
            neighbors = Neighbors(found, np.ones(found.shape, np.bool_))
        return Microbatch(
            tokens_BS=tokens[:, :-1],
            labels_BS=tokens[:, 1:],
            loss_mask_BS=np.ones((len(ids), self.seq_length), np.bool_),
            neighbors=neighbors,
            sample_ids_B=ids,
        )
