"""Perplexity with context: windows slide over held-out text, and each token is scored once, in the window that gives it
the most context. Windows start on the chunk grid, so neighbours come from the same table as in training, under the
same-document rule.

Many workers share a measurement: losses are kept in blocks, and worker i of N does every N-th block that nobody has
done yet. A block's file is written whole or not at all and its name carries what the losses depend on, so a measurement
that is killed, or started again with more or fewer workers, goes on; losses of another model, corpus or protocol are
never mixed in.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.artifacts.files import write_file
from megatron_retro.assembly.replica_losses import Losses
from megatron_retro.data.dataset import Dataset, Source, read_neighbors, require_known_tokens
from megatron_retro.data.neighbor_transforms import with_variant
from megatron_retro.errors import ConfigError, DamagedArtifact, Requeue
from megatron_retro.microbatch import Array, Microbatch, Neighbors
from megatron_retro.runtime.console import Progress
from megatron_retro.runtime.launch import Worker
from megatron_retro.runtime.strict_json import json_text

BLOCK = 8  # groups; what a kill loses at most


@dataclass(frozen=True)
class Window:
    """Inputs [start, start + length) of the stream; the labels from `first_scored` on count."""

    source: int
    start: int
    length: int
    first_scored: int

    @property
    def stop(self) -> int:
        """One past the last label."""
        return self.start + self.length + 1


@dataclass(frozen=True)
class Measured:
    """Loss of each scored token, in nats, with where it stands: source, offset in the stream, window."""

    losses: NDArray[np.float32]
    sources: NDArray[np.int64]
    offsets: NDArray[np.int64]
    windows: NDArray[np.int64]


def window_documents(dataset: Dataset, found: Measured) -> NDArray[np.int64]:
    """The document in the middle of what each window scored."""
    _, firsts, counts = np.unique(found.windows, return_index=True, return_counts=True)
    middles = firsts + counts // 2
    sources, offsets = found.sources[middles], found.offsets[middles]
    documents = np.empty(len(middles), np.int64)
    for source in np.unique(sources):
        documents[sources == source] = dataset.documents_at(int(source), offsets[sources == source])
    return documents


def sliding_windows(dataset: Dataset, stride: int) -> list[Window]:
    """Windows over every stretch of the split. What is left of a stretch after the last whole window is not scored."""
    length = dataset.seq_length
    windows = []
    for number, source in enumerate(dataset.sources):
        samples = source.samples
        if stride % samples.chunk_length or not 0 < stride <= length:
            raise ConfigError(
                f"--perplexity-stride {stride} does not fit the chunk grid",
                expected=f"a multiple of {samples.chunk_length}, at most {length}",
            )
        for first_chunk, last_chunk in samples.chunk_ranges:
            begin = first_chunk * samples.chunk_length
            stop = min(last_chunk * samples.chunk_length, samples.stop - 1)
            starts = range(begin, stop - length + 1, stride)
            windows += [
                Window(number, start, length, start + 1 if start == begin else start + 1 + length - stride)
                for start in starts
            ]
    return windows


def spread(windows: Sequence[Window], most: int | None) -> list[Window]:
    """At most so many of them, evenly over the text: the first ones would be of the first documents alone."""
    count = len(windows) if most is None else min(most, len(windows))
    return [windows[number * len(windows) // count] for number in range(count)]


def read_windows(dataset: Dataset, windows: Sequence[Window]) -> Microbatch[Array]:
    """Windows of one source as a batch, with the borders of documents that training has."""
    source = dataset.sources[windows[0].source]
    starts = np.array([window.start for window in windows], np.int64)
    positions = starts[:, None] + np.arange(windows[0].length + 1)
    tokens = source.samples.file.rows(starts, windows[0].length + 1)
    require_known_tokens(source.samples.file, starts, tokens, dataset.vocab_size)
    scored = positions[:, 1:] >= np.array([window.first_scored for window in windows])[:, None]
    neighbors = _neighbors(source, starts, dataset.vocab_size)
    ids = dataset.borders(source.samples, starts)
    return Microbatch(tokens[:, :-1], tokens[:, 1:], scored, *ids, neighbors=neighbors, sample_ids_B=starts)


def _neighbors(source: Source, starts: NDArray[np.int64], vocab_size: int | None) -> Neighbors[Array] | None:
    if source.neighbors is None:
        return None
    chunks = starts // source.samples.chunk_length
    return read_neighbors(source.neighbors, chunks, source.samples.chunks_per_sample, None, vocab_size)


@dataclass(frozen=True)
class Group:
    """Windows of one source that share a forward; `first` is the number of the first of them, over all sources."""

    first: int
    of_source: Sequence[Window]
    numbers: range

    @property
    def windows(self) -> Sequence[Window]:
        """Those of the group, among those of its source."""
        return self.of_source[self.numbers.start : self.numbers.stop]


def grouped(windows: Sequence[Window], batch_size: int) -> list[Group]:
    """Runs of windows of one source."""
    groups: list[Group] = []
    first = 0
    for _, run in itertools.groupby(windows, key=lambda window: window.source):
        of_source = tuple(run)
        whole = range(len(of_source))
        groups += [Group(first + at, of_source, whole[at : at + batch_size]) for at in whole[::batch_size]]
        first += len(of_source)
    return groups


def led(batch: Microbatch[Array], lead: Sequence[int], chunk_length: int) -> Microbatch[Array]:
    """Virtual tokens in front of each window, never scored; the chunks that they fill read no neighbours."""
    if not lead:
        return batch
    front = np.tile(np.array(lead, np.int64), (batch.num_samples, 1))
    neighbors = batch.neighbors
    if neighbors is not None:
        chunks = ((0, 0), (len(lead) // chunk_length, 0), (0, 0), (0, 0))
        neighbors = Neighbors(np.pad(neighbors.tokens_BCKR, chunks), np.pad(neighbors.mask_BCKR, chunks))
    return replace(
        batch,
        tokens_BS=np.concatenate([front, batch.tokens_BS.astype(np.int64)], axis=1),
        labels_BS=np.concatenate([np.full_like(front, -1), batch.labels_BS.astype(np.int64)], axis=1),
        loss_mask_BS=np.concatenate([np.zeros(front.shape, np.bool_), batch.loss_mask_BS], axis=1),
        neighbors=neighbors,
    )


def losses_of_group(
    losses: Losses,
    dataset: Dataset,
    group: Group,
    variants: Sequence[str],
    device: torch.device,
    *,
    lead: Sequence[int] = (),
    seed: int = 0,
) -> NDArray[np.float32] | None:
    """[variants, tokens] of the scored tokens, where `losses` gives them to this process; its replica calls it.

    Random neighbours are those of any window of the source, so they do not depend on who shares the forward.
    """

    def read(numbers: Sequence[int]) -> Microbatch[Array]:
        batch = read_windows(dataset, [group.of_source[number] for number in numbers])
        return replace(batch, sample_ids_B=np.array(numbers, np.int64))

    batch = read(group.numbers)
    chunk_length = dataset.sources[group.windows[0].source].samples.chunk_length
    rows = []
    for variant in variants:
        (changed,) = with_variant([batch], variant, seed, num_samples=len(group.of_source), read=read)
        found = losses(led(changed, lead, chunk_length).to(device))
        rows.append(None if found is None else found[:, len(lead) :][batch.loss_mask_BS])
    present = [row for row in rows if row is not None]
    return np.stack(present) if present else None


def measured(
    dataset: Dataset, groups: Sequence[Group], losses: Sequence[NDArray[np.float32]], variants: Sequence[str]
) -> dict[str, Measured]:
    """All scored tokens of each variant that training counts, with where they stand."""
    sources, offsets, numbers = [], [], []
    for group in groups:
        for number, window in enumerate(group.windows):
            places = np.arange(window.first_scored, window.stop)
            offsets.append(places)
            sources.append(np.full(len(places), window.source, np.int64))
            numbers.append(np.full(len(places), group.first + number, np.int64))
    places_of, joined = [np.concatenate(one) for one in (sources, offsets, numbers)], np.concatenate(losses, axis=1)
    if dataset.boundaries.eod_mask_loss:
        kept = _counted(dataset, *places_of[:2])
        places_of, joined = [one[kept] for one in places_of], joined[:, kept]
        places_of[2] = np.unique(places_of[2], return_inverse=True)[1]  # a window may have lost every token
    return {variant: Measured(joined[row], *places_of) for row, variant in enumerate(variants)}


def _counted(dataset: Dataset, sources: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether training has a loss for each token, which the one before it predicts."""
    kept = np.empty(len(offsets), np.bool_)
    for number, source in enumerate(dataset.sources):
        mine = sources == number
        kept[mine] = dataset.loss_mask(source.samples.file.at(offsets[mine] - 1))
    return kept


def measure(
    losses: Losses,
    dataset: Dataset,
    windows: Sequence[Window],
    variants: Sequence[str],
    *,
    batch_size: int,
    device: torch.device,
    lead: Sequence[int] = (),
) -> dict[str, Measured]:
    """Losses of all scored tokens under each variant of neighbours, by one process that has them all."""
    groups = grouped(windows, batch_size)
    found = [losses_of_group(losses, dataset, group, variants, device, lead=lead) for group in groups]
    return measured(dataset, groups, [one for one in found if one is not None], variants)


@dataclass(frozen=True)
class PerplexityParts:
    """The blocks of one measurement. `identity` is everything that losses depend on."""

    directory: Path
    groups: Sequence[Group]
    num_variants: int
    identity: Mapping[str, Any]

    @property
    def num_blocks(self) -> int:
        """Blocks of `BLOCK` groups."""
        return -(-len(self.groups) // BLOCK)

    def open_blocks(self, worker: Worker) -> list[int]:
        """This worker's blocks that are not there yet."""
        return [block for block in range(worker.index, self.num_blocks, worker.count) if not self._path(block).exists()]

    def fill(
        self,
        blocks: Sequence[int],
        measure: Callable[[Group], NDArray[np.float32] | None],
        writes: bool,
        stop: Callable[[], str | None],
    ) -> None:
        """Measure these blocks; the ranks of a replica call it together and one of them writes.

        `stop` is asked between blocks, by all ranks alike.
        """
        with Progress("perplexity", len(blocks), "blocks") as bar:
            for block in blocks:
                found = [measure(group) for group in self._groups(block)]
                if writes:
                    whole = np.concatenate([one for one in found if one is not None], axis=1)
                    write_file(self._path(block), whole.astype("<f4").tobytes())
                bar.advance(1)
                if (reason := stop()) is not None:
                    raise Requeue(f"the measurement stopped early: {reason}", fix="run the same command again to go on")

    def losses(self) -> list[NDArray[np.float32]] | None:
        """[variants, tokens] of each block; None as long as one is missing."""
        if not all(self._path(block).exists() for block in range(self.num_blocks)):
            return None
        return [self._read(block) for block in range(self.num_blocks)]

    def _groups(self, block: int) -> Sequence[Group]:
        return self.groups[block * BLOCK : (block + 1) * BLOCK]

    def _path(self, block: int) -> Path:
        content = json_text({**self.identity, "variants": self.num_variants}, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.directory / f"{fingerprint}.{block}-of-{self.num_blocks}.f32"

    def _read(self, block: int) -> NDArray[np.float32]:
        path, tokens = self._path(block), 0
        for group in self._groups(block):
            tokens += sum(window.stop - window.first_scored for window in group.windows)
        content = path.read_bytes()
        if len(content) != 4 * self.num_variants * tokens:
            raise DamagedArtifact(
                f"{path} holds other losses",
                got=f"{len(content)} bytes",
                expected=f"{4 * self.num_variants * tokens}",
                fix="remove it: it is measured again",
            )
        return np.frombuffer(content, "<f4").reshape(self.num_variants, tokens)
