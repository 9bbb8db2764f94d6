"""Which index for how many chunks: the choice behind `--retro-index-str auto`, and what an index string demands.

Small databases are searched exhaustively (one inverted list is a flat index). Middle ones keep whole vectors in
inverted lists as long as those fit the memory allowed; larger ones keep product-quantized codes. The number of lists
is sqrt(N) for whole vectors, whose lists then make products large enough to be fast, and follows the published ones
for codes: 30 sqrt(N) (2^22 at 19 billion chunks).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_retro.errors import ConfigError

FLAT_LIMIT = 65_536
POINTS_PER_LIST = 39
_COMFORTABLE_POINTS_PER_LIST = 64
_QUANTIZER_CHUNKS = 100_000
_ID_BYTES = 8
_PART_CHUNKS = 65_536


@dataclass(frozen=True)
class IndexChoice:
    """An index string, the chunks that train it, and how it is searched unless the user says."""

    index_str: str
    train_chunks: int
    nprobe: int
    ef_search: int


def choose_index(
    asked: str,
    num_chunks: int,
    dimension: int,
    memory_bytes: float,
    train_chunks: int | None,
    dimension_in_lists: Callable[[str], int],
) -> IndexChoice:
    """The index to build; an impossible request is refused with what would fit."""
    if num_chunks == 0:
        raise ConfigError("the database has no chunks", fix="give token files that hold text")
    index_str = "IVF1,Flat" if asked == "Flat" else asked
    if asked == "auto":
        index_str = automatic_index(num_chunks, dimension, memory_bytes)
        index_str = _trainable_within(index_str, dimension_in_lists(index_str), memory_bytes)
    lists = number_of_lists(index_str)
    quantizer_chunks = _QUANTIZER_CHUNKS if re.search(r"PQ|SQ|PCA|RaBitQ|RQ", index_str) else 1024
    wanted = train_chunks or max(_COMFORTABLE_POINTS_PER_LIST * lists, quantizer_chunks)
    sample = min(wanted, num_chunks)
    _refuse_too_few(index_str, lists, sample, num_chunks)
    _refuse_too_large(index_str, lists, sample, dimension_in_lists(index_str), memory_bytes)
    return IndexChoice(index_str, sample, nprobe=max(1, min(lists, lists // 16 + 8)), ef_search=64)


def automatic_index(num_chunks: int, dimension: int, memory_bytes: float) -> str:
    """The factory string for a number of chunks."""
    if num_chunks <= FLAT_LIMIT:
        return "IVF1,Flat"
    if num_chunks * (4 * dimension + _ID_BYTES) <= memory_bytes * 0.8:
        return f"IVF{_power_of_two(math.sqrt(num_chunks), num_chunks)}{_finder(math.sqrt(num_chunks))},Flat"
    lists = _power_of_two(30 * math.sqrt(num_chunks) if num_chunks > 10**7 else 8 * math.sqrt(num_chunks), num_chunks)
    parts = next(size for size in (64, 32, 16, 8, 4, 2, 1) if dimension >= 2 * size or size == 1)
    return f"OPQ{parts}_{2 * parts if dimension >= 2 * parts else parts},IVF{lists}_HNSW32,PQ{parts}"


def chunks_of_part(lists: int) -> int:
    """Chunks of a sample that a worker clusters at a time: enough that sums of lists are smaller than vectors."""
    return max(_PART_CHUNKS, 2 * lists)


def is_clustered_in_parts(lists: int, sample: int) -> bool:
    """Whether workers share the training of so many lists; a smaller sample one of them holds and trains alone."""
    return lists > 1 and sample > chunks_of_part(lists)


def training_bytes(lists: int, sample: int, width: int) -> int:
    """The most that one worker holds: vectors in lists, half as much again to work with, and centroids and sums."""
    held = chunks_of_part(lists) if is_clustered_in_parts(lists, sample) else sample
    return 6 * held * width + (8 * lists * width if lists > 1 else 0)


def _trainable_within(index_str: str, width: int, memory_bytes: float) -> str:
    """The same index with as many lists as a worker can train comfortably in its memory."""
    lists = number_of_lists(index_str)
    while lists > 1 and training_bytes(lists, lists * _COMFORTABLE_POINTS_PER_LIST, width) > memory_bytes:
        lists //= 2
    return re.sub(r"IVF\d+", f"IVF{lists}", index_str)


def number_of_lists(index_str: str) -> int:
    """The K of `IVFK`, or 1."""
    match = re.search(r"IVF(\d+)", index_str)
    return int(match[1]) if match else 1


def _power_of_two(value: float, num_chunks: int) -> int:
    """The nearest power of two that the chunks can train comfortably."""
    lists = 1 << round(math.log2(max(value, 1)))
    while lists > 1 and lists * _COMFORTABLE_POINTS_PER_LIST > num_chunks:
        lists //= 2
    return lists


def _finder(lists: float) -> str:
    return "_HNSW32" if lists >= 50_000 else ""


def _refuse_too_few(index_str: str, lists: int, sample: int, num_chunks: int) -> None:
    quantizer = re.search(r"(?<!O)PQ\d+(?:x(\d+))?", index_str)
    centroids = max(lists if lists > 1 else 0, 1 << int(quantizer[1] or 8) if quantizer else 0)
    needed = max(1, POINTS_PER_LIST * centroids)
    if sample >= needed:
        return
    fitting = 2 ** int(math.log2(max(1, num_chunks // POINTS_PER_LIST)))
    raise ConfigError(
        f"too few chunks to train {index_str}",
        got=f"{sample} training chunks of {num_chunks}",
        expected=f"at least {needed}",
        fix=f"give --retro-index-str auto, or at most IVF{fitting} without PQ, or a larger --retro-index-ntrain",
    )


def _refuse_too_large(index_str: str, lists: int, sample: int, width: int, memory_bytes: float) -> None:
    needed = training_bytes(lists, sample, width)
    if needed <= memory_bytes:
        return
    fix = "fewer lists, or more memory"
    if not is_clustered_in_parts(lists, sample):
        fix = f"--retro-index-ntrain {int(sample * memory_bytes / needed)} or less, {fix}"
    raise ConfigError(
        f"training {index_str} on {sample} chunks does not fit the memory allowed",
        got=f"{needed / 1e9:.2f} GB",
        expected=f"at most {memory_bytes / 1e9:.2f} GB (--retro-memory-gb)",
        fix=f"give {fix}",
    )
