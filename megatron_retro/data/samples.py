"""The training samples of one corpus: n/m consecutive query chunks each, and the order in which they are drawn.

A sample's labels reach one token further than its inputs; both lie inside the split. An epoch visits every sample
once, in an order that is a pure function of (seed, corpus fingerprint, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.order import key_of, permuted
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ConfigError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class CorpusSamples:
    """Samples of `seq_length` tokens within chunk ranges; tokens at `stop` and after belong to others."""

    file: TokenFile
    chunk_length: int
    seq_length: int
    chunk_ranges: tuple[tuple[int, int], ...]
    stop: int
    shift_epochs: bool
    seed: int

    @property
    def chunks_per_sample(self) -> int:
        """n/m."""
        return self.seq_length // self.chunk_length

    @cached_property
    def _samples_before(self) -> NDArray[np.int64]:
        counts = [self._samples_in(first, last) for first, last in self.chunk_ranges]
        return np.cumsum([0, *counts], dtype=np.int64)

    def _samples_in(self, first: int, last: int) -> int:
        """The same number in every epoch: as many as fit behind the largest shift."""
        room = min(last * self.chunk_length, self.stop - 1) - first * self.chunk_length
        shift = (self.chunks_per_sample - 1) * self.chunk_length if self.shift_epochs else 0
        return max(0, room - shift) // self.seq_length

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(self._samples_before[-1])

    def first_chunks(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first query chunk of the j-th drawn samples, epoch after epoch."""
        epochs, positions = np.divmod(draws, self.num_samples)
        chunks = np.empty_like(draws)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples = permuted(positions[chosen], self.num_samples, self._key(int(epoch)))
            chunks[chosen] = self._chunk_of(samples) + self._shift(int(epoch))
        return chunks

    def _chunk_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        number = np.searchsorted(self._samples_before, samples, side="right") - 1
        starts = np.array([first for first, _ in self.chunk_ranges], np.int64)
        return starts[number] + (samples - self._samples_before[number]) * self.chunks_per_sample

    def _key(self, epoch: int) -> int:
        return key_of(self.seed, int(self.file.fingerprint[:16], 16), epoch)

    def _shift(self, epoch: int) -> int:
        return key_of(self._key(epoch), 1) % self.chunks_per_sample if self.shift_epochs else 0


def check_lengths(seq_length: int, chunk_length: int) -> None:
    """A sample is a whole number of chunks."""
    if seq_length % chunk_length:
        raise ConfigError(
            f"--seq-length {seq_length} is not a multiple of the chunk length {chunk_length}",
            expected=f"{seq_length // chunk_length * chunk_length or chunk_length}, for instance",
        )


def parse_split(text: str) -> tuple[float, float, float]:
    """`969,30,1` as shares that add up to 1."""
    try:
        parts = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or sum(parts) <= 0:
        raise ConfigError(f"--split {text!r} names no shares", expected="up to three numbers, as 969,30,1")
    train, valid, test = (part / sum(parts) for part in [*parts, 0.0, 0.0][:3])
    return train, valid, test


def split_documents(num_documents: int, shares: Sequence[float], split: str) -> tuple[int, int]:
    """The documents [first, last) of a split."""
    ends = np.round(np.cumsum([0.0, *shares]) * num_documents).astype(int)
    number = SPLITS.index(split)
    return int(ends[number]), int(ends[number + 1])
