"""The same samples with other neighbours, to see whether a model uses them.

`real` as retrieved; `none`; `random`: those of another sample, a chunk drawn for each; `shuffled`: those of another
chunk of the same sample. Random and shuffled neighbours come from the same distribution as the real ones, so a model
that does as well with them uses no retrieval. What a sample gets depends on the seed and its number alone, so every
layout of ranks measures the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.microbatch import Array, Microbatch, Neighbors

VARIANTS = ("real", "none", "random", "shuffled")
ReadSamples = Callable[[Sequence[int]], Microbatch[Array]]


def with_variant(
    batches: Sequence[Microbatch[Array]],
    variant: str,
    seed: int,
    *,
    num_samples: int = 0,
    read: ReadSamples | None = None,
) -> list[Microbatch[Array]]:
    """All batches under one variant; a pure function of the batches and the seed.

    Random neighbours are those of another of `batches`' samples; or, where these are one rank's share of the samples
    0 to `num_samples`, of any other, which `read` gives.
    """
    if variant == "real":
        return list(batches)
    if variant == "none":
        return [replace(batch, neighbors=None) for batch in batches]
    own = _NeighborsOfSamples.of(batches)
    if variant == "random":
        everyone = range(num_samples) if num_samples else own.ids.tolist()
        donors, chunks = _drawn(own.ids, everyone, own.num_chunks, seed)
        absent = np.setdiff1d(donors, own.ids)
        if len(absent) and read is not None:
            own = _NeighborsOfSamples.of([*batches, read(absent.tolist())])
        rows = own.rows_of(donors)
    else:
        rows, chunks = np.arange(len(own.ids)), _shuffled(own.ids, own.num_chunks, seed)
    return _split(batches, own.tokens[rows[:, None], chunks], own.mask[rows[:, None], chunks])


class _NeighborsOfSamples:
    """The neighbours of many samples, found by the sample's number."""

    def __init__(self, ids: NDArray[np.int64], tokens: NDArray[Any], mask: NDArray[Any]) -> None:
        self.ids, self.tokens, self.mask = ids, tokens, mask

    @classmethod
    def of(cls, batches: Sequence[Microbatch[Array]]) -> _NeighborsOfSamples:
        found = [batch.neighbors for batch in batches if batch.neighbors is not None]
        if len(found) != len(batches):
            raise ValueError("variants of neighbours need batches with neighbours")
        return cls(
            np.concatenate([batch.sample_ids_B for batch in batches]),
            np.concatenate([neighbors.tokens_BCKR for neighbors in found]),
            np.concatenate([neighbors.mask_BCKR for neighbors in found]),
        )

    @property
    def num_chunks(self) -> int:
        return int(self.tokens.shape[1])

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        order = np.argsort(self.ids, kind="stable")
        found: NDArray[np.int64] = order[np.searchsorted(self.ids, ids, sorter=order)]
        return found


def _drawn(
    ids: NDArray[np.int64], everyone: Sequence[int], num_chunks: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each sample another one, and a chunk of it for each chunk. Work is that of the samples asked for: a range of
    all samples is never walked through."""
    donors, chunks = [], []
    for number in ids.tolist():
        random = np.random.default_rng((seed, number))
        own = everyone.index(number) if number in everyone else len(everyone)
        others = len(everyone) - (number in everyone)
        drawn = int(random.integers(0, others)) if others else own
        donors.append(everyone[drawn + (others > 0 and drawn >= own)])
        chunks.append(random.integers(0, num_chunks, num_chunks))
    return np.array(donors, np.int64), np.array(chunks, np.int64)


def _shuffled(ids: NDArray[np.int64], num_chunks: int, seed: int) -> NDArray[np.int64]:
    """For each chunk of each sample another chunk of it."""
    if num_chunks == 1:
        return np.zeros((len(ids), 1), np.int64)
    steps = [np.random.default_rng((seed, number)).integers(1, num_chunks, num_chunks) for number in ids.tolist()]
    return (np.arange(num_chunks) + np.array(steps, np.int64).reshape(-1, num_chunks)) % num_chunks


def _split(batches: Sequence[Microbatch[Array]], tokens: NDArray[Any], mask: NDArray[Any]) -> list[Microbatch[Array]]:
    result, start = [], 0
    for batch in batches:
        stop = start + batch.num_samples
        result.append(replace(batch, neighbors=Neighbors(tokens[start:stop], mask[start:stop])))
        start = stop
    return result
