"""Sketches of documents: a key of the whole text, and keys of bands of a MinHash, by which near ones meet.

MinHash is rensa's. A band's key is a hash of some of its values: two documents whose n-grams have Jaccard similarity j
agree in a band of r values with probability j^r, and in one of b bands with 1 - (1 - j^r)^b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import has_size, write_file
from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.data.window_hashes import window_hashes
from megatron_retro.retrieval.document_spans import DocumentSpans
from megatron_retro.retrieval.work_blocks import WorkBlock

_VALUES = 128  # of a MinHash
_LEAST_RECALL = 0.98  # of pairs that are as similar as asked
_SEED = 1
_EMPTY = 0
_KEY_BYTES = 8
_SORT_BYTES = 40  # of a key while it is sorted


@dataclass(frozen=True)
class Bands:
    """How the values of a MinHash are cut."""

    count: int
    rows: int

    @classmethod
    def of(cls, jaccard: float) -> Bands:
        """The longest bands, which the fewest other pairs agree in, that miss few as similar as this."""
        choices = (cls(_VALUES // rows, rows) for rows in range(_VALUES, 0, -1))
        return next(bands for bands in choices if bands.rows == 1 or bands.recall(jaccard) >= _LEAST_RECALL)

    def recall(self, jaccard: float) -> float:
        """The probability that two documents of this similarity meet."""
        return float(1 - (1 - jaccard**self.rows) ** self.count)


def sketch(spans: DocumentSpans, block: WorkBlock, ngram: int, bands: Bands) -> NDArray[np.uint64]:
    """Keys [document, 1 + band]: of the text (0: there is none), then of its bands.

    A text shorter than an n-gram agrees in all bands with its equals alone.
    """
    parts = [np.zeros((0, 1 + bands.count), np.uint64)]
    for tokens, starts, stops in spans.pieces(block.first, block.last):
        keys = np.empty((len(starts), 1 + bands.count), np.uint64)
        keys[:, 0] = [_text_key(tokens[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        keys[:, 1:] = keys[:, :1]
        long = np.flatnonzero(stops - starts >= ngram)
        if len(long):
            keys[long, 1:] = _band_keys(_min_hashes(tokens, starts[long], stops[long], ngram), bands)
        parts.append(keys)
    return np.concatenate(parts)


def _text_key(text: NDArray[Any]) -> int:
    if not len(text):
        return _EMPTY
    return int.from_bytes(hashlib.blake2b(text.astype("<i4").tobytes(), digest_size=8).digest(), "little") or 1


def _min_hashes(
    tokens: NDArray[Any], starts: NDArray[np.int64], stops: NDArray[np.int64], ngram: int
) -> NDArray[np.uint64]:
    import rensa

    counts = stops - starts - ngram + 1
    offsets = np.cumsum([0, *counts], dtype=np.int64)
    places = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    hashes = window_hashes(tokens, ngram)[places]
    found = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), _VALUES, _SEED)
    return np.array(found.to_rows(), np.uint64)


def _band_keys(values: NDArray[np.uint64], bands: Bands) -> NDArray[np.uint64]:
    cut = values[:, : bands.count * bands.rows].reshape(len(values), bands.count, bands.rows)
    keys = np.zeros(cut.shape[:2], np.uint64)
    for row in range(bands.rows):
        keys = (keys ^ cut[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def write_sketches(path: Path, keys: NDArray[np.uint64]) -> None:
    """Write the sketches of a block."""
    write_file(path, keys.astype("<u8").tobytes())


def is_whole(path: Path, num_documents: int, bands: Bands) -> bool:
    """Whether the sketches of a block are there, all of them."""
    return has_size(path, num_documents * (1 + bands.count) * _KEY_BYTES)


@dataclass(frozen=True)
class Sketches:
    """The sketches of all blocks, mapped."""

    paths: Sequence[Path]
    bands: Bands

    @cached_property
    def blocks(self) -> list[NDArray[np.uint64]]:
        """Keys [document, 1 + band] of each block."""
        return [map_file(path).view("<u8").reshape(-1, 1 + self.bands.count) for path in self.paths]

    def column(self, number: int) -> NDArray[np.uint64]:
        """One key of every document."""
        return np.concatenate([block[:, number] for block in self.blocks])

    def rows(self, documents: NDArray[np.int64]) -> NDArray[np.uint64]:
        """All keys of some documents."""
        before = np.cumsum([0, *(len(block) for block in self.blocks)])
        which = np.searchsorted(before, documents, side="right") - 1
        found = [self.blocks[one][number - before[one]] for one, number in zip(which, documents, strict=True)]
        return np.array(found, np.uint64).reshape(len(documents), 1 + self.bands.count)


def buckets(keys: NDArray[np.uint64], documents: NDArray[np.int64], memory_bytes: float) -> Iterator[NDArray[np.int64]]:
    """The documents, ascending, of each key that several have. Keys are sorted in parts that fit into memory."""
    num_parts = int(len(keys) * _SORT_BYTES // memory_bytes) + 1
    part_of = (keys >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32)
    for part in range(num_parts):
        chosen = np.flatnonzero(part_of == part)
        chosen = chosen[np.argsort(keys[chosen], kind="stable")]
        ends = np.flatnonzero(np.diff(keys[chosen])) + 1
        bounds = np.concatenate([[0], ends, [len(chosen)]])
        for crowd in np.flatnonzero(np.diff(bounds) > 1):
            yield documents[chosen[bounds[crowd] : bounds[crowd + 1]]]
