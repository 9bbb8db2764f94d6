"""The samples of a run: sources blended, each with its neighbours, read as whole batches.

`read(k)` is a pure function of the settings and the numbers k, whatever process asks and in whatever order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.stored_artifact import Traffic
from megatron_retro.data.blends import Blend
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_transforms import TransformSettings
from megatron_retro.data.neighbors import NeighborReader
from megatron_retro.data.samples import CorpusSamples
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import DataError
from megatron_retro.microbatch import Array, Microbatch, Neighbors


@dataclass(frozen=True)
class Boundaries:
    """What happens at document borders inside a sample, as Megatron's three flags say."""

    eod: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False


@dataclass(frozen=True)
class Source:
    """One corpus of a blend."""

    samples: CorpusSamples
    neighbors: NeighborReader | None = None


@dataclass(frozen=True)
class Dataset:
    """All samples of one split of a run."""

    sources: tuple[Source, ...]
    blend: Blend
    seed: int
    boundaries: Boundaries = Boundaries()
    transforms: TransformSettings = field(default_factory=TransformSettings)
    vocab_size: int | None = None

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""
        return self.sources[0].samples.seq_length

    @property
    def num_samples(self) -> int:
        """Samples of all sources, each counted once."""
        return sum(source.samples.num_samples for source in self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that the k-th sample depends on."""
        facts: list[object] = [self.seed, self.seq_length, self.blend.weights]
        for source in self.sources:
            samples, neighbors = source.samples, source.neighbors
            facts += [samples.file.fingerprint, samples.chunk_length, samples.chunk_ranges, samples.stop]
            facts += [samples.shift_epochs]
            if neighbors is not None:
                facts += [neighbors.table.fingerprint, neighbors.num_neighbors, neighbors.retrieved_length]
                facts += self.transforms.source_facts()
        facts += [self.boundaries, self.transforms.sample_fact()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the corpora, their neighbour tables and the database."""
        found = {}
        for number, source in enumerate(self.sources):
            found[f"corpus {number}"] = source.samples.file.fingerprint
            if source.neighbors is not None:
                found[f"neighbours {number}"] = source.neighbors.table.fingerprint
                found["database"] = source.neighbors.database.fingerprint
        return found

    @property
    def token_files(self) -> list[TokenFile]:
        """The files that tokens of samples and of neighbours are read from."""
        files = [source.samples.file for source in self.sources]
        return files + [file for source in self.sources if source.neighbors for file in source.neighbors.database.files]

    @property
    def traffic(self) -> Traffic:
        """What was read from object stores."""
        of_files = {id(file): file.traffic for file in self.token_files}
        of_tables = [source.neighbors.table.traffic for source in self.sources if source.neighbors]
        return sum((*of_files.values(), *of_tables), Traffic())

    @property
    def databases(self) -> list[ChunkDatabase]:
        """The chunk databases of the neighbours."""
        return [source.neighbors.database for source in self.sources if source.neighbors]

    def epochs(self, num_samples: int) -> list[float]:
        """How often each source is read by a run of so many samples."""
        counts = self.blend.counts(num_samples)
        return [count / source.samples.num_samples for count, source in zip(counts, self.sources, strict=True)]

    def read(self, numbers: Sequence[int]) -> Microbatch[Array]:
        """The samples of the given numbers of the global order."""
        ids = np.asarray(numbers, np.int64)
        located = self._located(ids)
        parts = []
        places = []
        for number, source in enumerate(self.sources):
            chosen = np.flatnonzero(located[:, 0] == number)
            if len(chosen):
                parts.append(self._read_source(source, ids[chosen], located[chosen, 1]))
                places.append(chosen)
        return parts[0] if len(parts) == 1 else _interleave(parts, np.concatenate(places))

    def documents(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The document in the middle of each sample; samples of one document are no independent observations."""
        located = self._located(np.asarray(numbers, np.int64))
        found = np.empty(len(located), np.int64)
        for number, source in enumerate(self.sources):
            chosen = located[:, 0] == number
            starts = source.samples.first_chunks(located[chosen, 1]) * source.samples.chunk_length
            found[chosen] = self.documents_at(number, starts + self.seq_length // 2)
        return found

    def documents_at(self, source: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document of each token of a source, numbered through all sources."""
        before = sum(other.samples.file.num_documents for other in self.sources[:source])
        return before + self.sources[source].samples.file.documents_of(offsets)

    def _located(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Source and draw of each sample: [N, 2]."""
        return np.array([self.blend.locate(int(number)) for number in ids], np.int64).reshape(-1, 2)

    def _read_source(self, source: Source, ids: NDArray[np.int64], draws: NDArray[np.int64]) -> Microbatch[Array]:
        samples = source.samples
        chunks = samples.first_chunks(draws)
        starts = chunks * samples.chunk_length
        tokens = samples.file.rows(starts, self.seq_length + 1)
        require_known_tokens(samples.file, starts, tokens, self.vocab_size)
        positions, documents = self.borders(samples, starts)
        return Microbatch(
            tokens_BS=tokens[:, :-1],
            labels_BS=tokens[:, 1:],
            loss_mask_BS=self.loss_mask(tokens[:, :-1]),
            position_ids_BS=positions,
            document_ids_BS=documents,
            neighbors=self._read_neighbors(source, ids, chunks),
            sample_ids_B=ids,
        )

    def borders(
        self, samples: CorpusSamples, starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]:
        """Position and document ids of the tokens from `starts` on, where the flags ask for them."""
        flags = self.boundaries
        if not (flags.reset_position_ids or flags.reset_attention_mask):
            return None, None
        documents = _document_ids(samples, starts)
        positions = _restarting_positions(documents) if flags.reset_position_ids else None
        return positions, documents if flags.reset_attention_mask else None

    def loss_mask(self, tokens: NDArray[Any]) -> NDArray[np.bool_]:
        """As in Megatron, the prediction made AT an end-of-document token is the one left out."""
        if self.boundaries.eod_mask_loss and self.boundaries.eod is not None:
            return np.asarray(tokens != self.boundaries.eod)
        return np.ones(tokens.shape, np.bool_)

    def _read_neighbors(
        self, source: Source, ids: NDArray[np.int64], chunks: NDArray[np.int64]
    ) -> Neighbors[Array] | None:
        if source.neighbors is None:
            return None
        return read_neighbors(source.neighbors, chunks, source.samples.chunks_per_sample, ids, self.vocab_size)


def read_neighbors(
    reader: NeighborReader,
    first_chunks: NDArray[np.int64],
    chunks_per_sample: int,
    sample_ids: NDArray[np.int64] | None,
    vocab_size: int | None,
) -> Neighbors[Array]:
    """The neighbours of samples; a token that the model does not know is an error that names where it stands."""
    tokens, mask = reader.read(first_chunks, chunks_per_sample, sample_ids)
    if vocab_size is not None and _holds_unknown(tokens, vocab_size):
        wrong = ((tokens < 0) | (tokens >= vocab_size)).any(-1)
        chunk = reader.select(first_chunks, chunks_per_sample, sample_ids)[wrong][:1]
        corpus, start, _ = reader.database.token_ranges(chunk)
        require_known_tokens(reader.database.files[int(corpus[0])], start, tokens[wrong][:1], vocab_size)
    return Neighbors(tokens, mask)


def require_known_tokens(
    file: TokenFile, starts: NDArray[np.int64], tokens: NDArray[Any], vocab_size: int | None
) -> None:
    """Refuse rows of tokens, read from the offsets `starts` on, that hold an id beyond the vocabulary."""
    if vocab_size is None or not _holds_unknown(tokens, vocab_size):
        return
    row, column = (int(one[0]) for one in np.nonzero((tokens < 0) | (tokens >= vocab_size)))
    offset = int(starts[row]) + column
    document = file.document_of(offset)
    raise DataError(
        f"{file.prefix}: document {document} holds a token beyond the vocabulary, at its position "
        f"{offset - file.document_bounds(document)[0]}",
        got=int(tokens[row, column]),
        expected=f"0 to {vocab_size - 1}",
        fix="give the tokenizer and --vocab-size of the corpus; `megatron-retro inspect` finds damage",
    )


def _holds_unknown(tokens: NDArray[Any], vocab_size: int) -> bool:
    return bool(tokens.size) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0)


def short_rows(source: Source, most_samples: int) -> tuple[int, int]:
    """Counts of rows with fewer than k legal neighbours, and of all rows, in at most `most_samples` samples."""
    if source.neighbors is None:
        return 0, 0
    samples = source.samples
    drawn = np.arange(min(samples.num_samples, most_samples), dtype=np.int64)
    chosen = source.neighbors.select(samples.first_chunks(drawn), samples.chunks_per_sample)
    short = (chosen < 0).any(-1)
    return int(short.sum()), int(short.size)


def _document_ids(samples: CorpusSamples, starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Documents of each sample's tokens, counted from 0."""
    documents = samples.file.documents_of(starts[:, None] + np.arange(samples.seq_length))
    steps = np.diff(documents, axis=1, prepend=documents[:, :1]) > 0
    return np.cumsum(steps, axis=1, dtype=np.int32)


def _restarting_positions(documents: NDArray[np.int32]) -> NDArray[np.int32]:
    places = np.arange(documents.shape[1], dtype=np.int32)
    starts = np.diff(documents, axis=1, prepend=-1) > 0
    restart: NDArray[np.int32] = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return (places - restart).astype(np.int32)


def _interleave(parts: Sequence[Microbatch[Array]], places: NDArray[np.int64]) -> Microbatch[Array]:
    """Samples of several sources as one microbatch, row i of the joined parts going to `places[i]`."""
    order = np.argsort(places)
    if len({part.neighbors is None for part in parts}) > 1:
        raise DataError("some sources of the blend have neighbours and some have none")
    joined = Microbatch.joined(parts, np.concatenate)
    arrays = {name: array[order] for name, array in joined.arrays().items()}
    return Microbatch.of_arrays(arrays, joined.sample_ids_B[order])


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
