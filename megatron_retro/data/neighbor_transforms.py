"""Worse neighbours on purpose: some chunks read others' or none, or only a part of the database counts.

`NeighborReader.select` applies a source's transforms one after another to a `NeighborLookup`, then reads the table.
Which samples and chunks are changed is drawn by hashes of their numbers, so it is the same at every visit, and those of
a smaller share are among those of a larger one.

`with_variant` changes the neighbours of microbatches that were read, of any dataset, to see whether a model uses them:
`none`; `random`, those of another sample, a chunk drawn for each; `shuffled`, those of another chunk of its sample.
Random and shuffled neighbours come from the same distribution as the `real` ones, so a model that does as well with
them uses no retrieval. What a sample gets depends on the seed and its number alone, whatever the layout of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.order import key_of, mix_array
from megatron_retro.data.samples import CorpusSamples
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Array, Microbatch, Neighbors

_ABSENT_SAMPLE_KEY, _RANDOM_SAMPLE_KEY, _OTHER_SAMPLE_KEY = 11, 12, 13
_CHUNK_KEY, _OTHER_CHUNK_KEY = 21, 22
# Hashes are compared without their last bit, so that "all" (2^63) is a number too.
_ALL = 1 << 63
VARIANTS = ("real", "none", "random", "shuffled")
ReadSamples = Callable[[Sequence[int]], Microbatch[Array]]


@dataclass(frozen=True)
class ThinnedDatabase:
    """A smaller database without building one: the share of documents (or chunks) that count, chosen by a hash.

    Each corpus may have a share of its own, which is multiplied with the whole one.
    """

    fraction: float = 1.0
    by_chunk: bool = False
    corpus_fractions: tuple[float, ...] = ()

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """The same lookup in the smaller database."""
        return replace(lookup, database=self)

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


@dataclass(frozen=True)
class NeighborLookup:
    """The rows of a table that the chunks of samples read.

    The same-document rule is that of the samples which start at `first_chunks_B`. `sample_ids_B` is None for windows
    that are no samples of the global order.
    """

    sample_ids_B: NDArray[np.int64] | None
    first_chunks_B: NDArray[np.int64]
    rows_BC: NDArray[np.int64]
    absent_BC: NDArray[np.bool_]
    database: ThinnedDatabase = ThinnedDatabase()

    @classmethod
    def of_samples(
        cls, first_chunks: NDArray[np.int64], chunks_per_sample: int, sample_ids: NDArray[np.int64] | None = None
    ) -> NeighborLookup:
        """The lookup in which every chunk reads its own row."""
        rows = _own_rows(first_chunks, chunks_per_sample)
        return cls(sample_ids, first_chunks, rows, np.zeros(rows.shape, np.bool_))


class NeighborTransform(Protocol):
    """Changes what chunks read; a pure function of the numbers of samples and chunks."""

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """The changed lookup."""


@dataclass(frozen=True)
class AbsentSamples:
    """A share of samples reads no neighbours."""

    share: float
    seed: int

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """Drawn by sample."""
        if lookup.sample_ids_B is None:
            return lookup
        absent_B = _uniform(lookup.sample_ids_B, key_of(self.seed, _ABSENT_SAMPLE_KEY)) < self.share
        return replace(lookup, absent_BC=lookup.absent_BC | absent_B[:, None])


@dataclass(frozen=True)
class RandomSamples:
    """A share of samples reads the neighbours of another sample."""

    share: float
    seed: int
    samples: CorpusSamples

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """Drawn by sample; the same-document rule is then the other sample's."""
        if lookup.sample_ids_B is None:
            return lookup
        other_B = _uniform(lookup.sample_ids_B, key_of(self.seed, _RANDOM_SAMPLE_KEY)) < self.share
        if not other_B.any():
            return lookup
        draws = _uniform(lookup.sample_ids_B, key_of(self.seed, _OTHER_SAMPLE_KEY)) * self.samples.num_samples
        others = self.samples.first_chunks(draws.astype(np.int64))
        first_chunks = np.where(other_B, others, lookup.first_chunks_B)
        rows = np.where(other_B[:, None], _own_rows(others, lookup.rows_BC.shape[1]), lookup.rows_BC)
        return replace(lookup, first_chunks_B=first_chunks, rows_BC=rows)


@dataclass(frozen=True)
class AbsentChunks:
    """A share of chunks reads no neighbours."""

    share: float

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """Drawn by chunk."""
        absent = _uniform(lookup.rows_BC, key_of(_CHUNK_KEY)) >= 1.0 - self.share
        return replace(lookup, absent_BC=lookup.absent_BC | absent)


@dataclass(frozen=True)
class RandomChunks:
    """A share of chunks reads the row of another chunk, any of the table."""

    share: float
    row_ranges: Sequence[tuple[int, int]]

    def apply(self, lookup: NeighborLookup) -> NeighborLookup:
        """Drawn by chunk, other chunks than `AbsentChunks` draws; the same-document rule stays the own sample's."""
        random = _uniform(lookup.rows_BC, key_of(_CHUNK_KEY)) < self.share
        return replace(lookup, rows_BC=np.where(random, self._other_rows(lookup.rows_BC), lookup.rows_BC))

    def _other_rows(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = np.array([last - first for first, last in self.row_ranges], np.int64)
        drawn = (_uniform(chunks, key_of(_OTHER_CHUNK_KEY)) * int(sizes.sum())).astype(np.int64)
        ends = np.cumsum(sizes)
        place = np.searchsorted(ends, drawn, side="right")
        firsts = np.array([first for first, _ in self.row_ranges], np.int64)
        found: NDArray[np.int64] = drawn - (ends - sizes)[place] + firsts[place]
        return found


@dataclass(frozen=True)
class TransformSettings:
    """All shares, as flags set them; where they are composed, and what they add to a dataset's fingerprint."""

    absent_samples: float = 0.0
    random_samples: float = 0.0
    absent_chunks: float = 0.0
    random_chunks: float = 0.0
    database: ThinnedDatabase = ThinnedDatabase()

    def transforms(
        self, samples: CorpusSamples, row_ranges: Sequence[tuple[int, int]], seed: int
    ) -> tuple[NeighborTransform, ...]:
        """In the order of application: chunks are drawn by the rows that they read after samples were changed."""
        found: list[NeighborTransform] = [self.database]
        if self.absent_samples:
            found.append(AbsentSamples(self.absent_samples, seed))
        if self.random_samples:
            found.append(RandomSamples(self.random_samples, seed, samples))
        if self.absent_chunks:
            found.append(AbsentChunks(self.absent_chunks))
        if self.random_chunks:
            found.append(RandomChunks(self.random_chunks, row_ranges))
        return tuple(found)

    def source_facts(self) -> list[object]:
        """What a fingerprint holds of a source's transforms; the texts stay, so that saved positions stay valid."""
        database = self.database
        facts: list[object] = [database.fraction]
        if database != ThinnedDatabase(database.fraction):
            units = f"by_chunk={database.by_chunk}, corpus_fractions={database.corpus_fractions}"
            facts.append(_Verbatim(f"Thinning(fraction={database.fraction}, {units})"))
        if self.absent_chunks or self.random_chunks:
            facts.append(_Verbatim(f"Degradation(random={self.random_chunks}, absent={self.absent_chunks})"))
        return facts

    def sample_fact(self) -> object:
        """The same of what is drawn by sample."""
        return _Verbatim(f"RetrievalNoise(none={self.absent_samples}, random={self.random_samples})")


class _Verbatim(str):
    """A text whose representation has no quotes."""

    def __repr__(self) -> str:
        return str(self)


def _own_rows(first_chunks: NDArray[np.int64], chunks_per_sample: int) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = first_chunks[:, None] + np.arange(chunks_per_sample)
    return rows


def _uniform(numbers: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    """A number in [0, 1) per number."""
    mixed = mix_array(numbers.astype(np.uint64) ^ np.uint64(key))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


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
