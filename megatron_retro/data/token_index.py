"""The `.idx` beside a file of tokens: their type, lengths and offsets of sequences, boundaries of documents."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.errors import ArtifactError, DataError

_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_VERSION = 1
HEADER_BYTES = 34
_HEADER = struct.Struct("<QBQQ")
_DTYPE_OF_CODE = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}


@dataclass(frozen=True)
class TokenIndex:
    """The arrays of an `.idx`; views of the mapped file, at odd addresses as the format has them."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]
    modes: NDArray[np.int8] | None

    @property
    def num_sequences(self) -> int:
        """Stored sequences; a document is one or more (or, when empty, none) of them."""
        return len(self.lengths)


def read_index(path: Path) -> TokenIndex:
    """Map an `.idx`; its size must be exactly what its header says."""
    content = map_file(path)
    if len(content) < HEADER_BYTES or content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ArtifactError(f"{path} is no token file index", expected="a file that starts with MMIDIDX")
    version, code, sequences, boundaries = _HEADER.unpack(content[len(_MAGIC) : HEADER_BYTES].tobytes())
    if version != _INDEX_VERSION or code not in _DTYPE_OF_CODE:
        raise ArtifactError(
            f"{path} is of another format", got=f"version {version}, type {code}", expected="version 1, type 1 to 8"
        )
    plain = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if len(content) not in (plain, plain + sequences):
        raise ArtifactError(
            f"{path} does not have the size that its header says",
            got=f"{len(content)} bytes",
            expected=f"{plain} for {sequences} sequences and {boundaries} document boundaries",
            fix="the file is cut or foreign: write it again",
        )
    return _views(content, np.dtype(_DTYPE_OF_CODE[code]), sequences, boundaries, has_modes=len(content) != plain)


def _views(
    content: NDArray[np.uint8], dtype: np.dtype[Any], sequences: int, boundaries: int, *, has_modes: bool
) -> TokenIndex:
    def view(kind: DTypeLike, start: int, count: int) -> NDArray[Any]:
        if not count:
            return np.zeros(0, kind)
        return np.frombuffer(content.data, kind, count, start)

    pointers_at = HEADER_BYTES + 4 * sequences
    documents_at = pointers_at + 8 * sequences
    modes_at = documents_at + 8 * boundaries
    return TokenIndex(
        dtype=dtype,
        lengths=view("<i4", HEADER_BYTES, sequences),
        pointers=view("<i8", pointers_at, sequences),
        documents=view("<i8", documents_at, boundaries),
        modes=view(np.int8, modes_at, sequences) if has_modes else None,
    )


def header(dtype: DTypeLike, sequences: int, boundaries: int) -> bytes:
    """The first 34 bytes of an `.idx`."""
    kind = np.dtype(dtype)
    if kind not in _CODE_OF_DTYPE:
        raise DataError(f"tokens of type {kind} cannot be stored", expected="uint16 or int32")
    return _MAGIC + _HEADER.pack(_INDEX_VERSION, _CODE_OF_DTYPE[kind], sequences, boundaries)


def last_at_or_before(
    read: Callable[[NDArray[np.int64]], NDArray[np.int64]], count: int, values: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each value the last i in [0, count) with read(i) <= value; `read` must not fall, and read(0) <= all."""
    low = np.zeros(values.shape, np.int64)
    high = np.full(values.shape, count, np.int64)
    for _ in range(max(count, 1).bit_length()):
        middle = (low + high) >> 1
        right = (high - low > 1) & (read(middle) <= values)
        high = np.where(right | (high - low <= 1), high, middle)
        low = np.where(right, middle, low)
    return low
