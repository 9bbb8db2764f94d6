"""Perplexity with context: windows slide over held-out text, and each token is scored once, in the window that gives it
the most context. Windows start on the chunk grid, so neighbours come from the same table as in training, under the
same-document rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.assembly.batch_tensors import to_tensors
from megatron_retro.assembly.single_process import neighbors_of
from megatron_retro.data.batches import Batch
from megatron_retro.data.dataset import Dataset, Source
from megatron_retro.data.neighbor_variants import with_variant
from megatron_retro.errors import ConfigError
from megatron_retro.model.retro import Retro


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


def read_windows(dataset: Dataset, windows: Sequence[Window]) -> Batch:
    """Windows of one source as a batch."""
    source = dataset.sources[windows[0].source]
    starts = np.array([window.start for window in windows], np.int64)
    positions = starts[:, None] + np.arange(windows[0].length + 1)
    tokens = source.samples.file.stream[positions]
    scored = positions[:, 1:] >= np.array([window.first_scored for window in windows])[:, None]
    neighbor_tokens, neighbor_mask = _neighbors(source, starts)
    return Batch(tokens[:, :-1], tokens[:, 1:], scored, starts, None, None, neighbor_tokens, neighbor_mask)


def _neighbors(source: Source, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
    if source.neighbors is None:
        return None, None
    chunks = starts // source.samples.chunk_length
    tokens, mask = source.neighbors.read(chunks, source.samples.chunks_per_sample)
    return tokens, mask


@torch.no_grad()
def measure(
    module: Retro, dataset: Dataset, windows: Sequence[Window], variant: str, *, batch_size: int, seed: int = 0
) -> Measured:
    """Losses of all scored tokens under a variant of neighbours."""
    device = next(module.parameters()).device
    losses, sources, offsets, numbers = [], [], [], []
    for first, group in _groups(windows, batch_size):
        batch = read_windows(dataset, group)
        (changed,) = with_variant([batch], variant, seed + first)
        tensors = to_tensors(changed, device)
        found = module(tensors.tokens_BS, neighbors_of(tensors), labels_BS=tensors.labels_BS).float().cpu().numpy()
        places = batch.sample_ids_B[:, None] + 1 + np.arange(found.shape[1])
        losses.append(found[batch.loss_mask_BS])
        offsets.append(places[batch.loss_mask_BS])
        sources.append(np.full(losses[-1].shape, group[0].source, np.int64))
        rows = np.broadcast_to(first + np.arange(len(group))[:, None], found.shape)
        numbers.append(rows[batch.loss_mask_BS])
    return Measured(np.concatenate(losses), np.concatenate(sources), np.concatenate(offsets), np.concatenate(numbers))


def _groups(windows: Sequence[Window], batch_size: int) -> list[tuple[int, Sequence[Window]]]:
    """Runs of windows of one source, with the number of the first."""
    groups = []
    first = 0
    while first < len(windows):
        last = first
        while last < len(windows) and last - first < batch_size and windows[last].source == windows[first].source:
            last += 1
        groups.append((first, windows[first:last]))
        first = last
    return groups
