"""The `.idx` half of a token file: Megatron's `MMIDIDX` version 1, read by memory map and written byte for byte.

Only the layout lives here; what the numbers mean for tokens and documents is `token_file.py`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_retro.errors import ArtifactError, DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
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
SMALL_VOCABULARY = 65500


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


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


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file as bytes that the system reads when they are touched."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise ArtifactError(
            f"there is no file {path}",
            fix="give the prefix without .bin and .idx, or make the file with `megatron-retro preprocess`",
        ) from None


def read_index(path: Path) -> TokenIndex:
    """Map an `.idx`; its size must be exactly what its header says."""
    content = map_file(path)
    if len(content) < HEADER_BYTES or content[: len(MAGIC)].tobytes() != MAGIC:
        raise ArtifactError(f"{path} is no token file index", expected="a file that starts with MMIDIDX")
    version, code, sequences, boundaries = _HEADER.unpack(content[len(MAGIC) : HEADER_BYTES].tobytes())
    if version != VERSION or code not in _DTYPE_OF_CODE:
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
    """The first 34 bytes."""
    kind = np.dtype(dtype)
    if kind not in _CODE_OF_DTYPE:
        raise DataError(f"tokens of type {kind} cannot be stored", expected="uint16 or int32")
    return MAGIC + _HEADER.pack(VERSION, _CODE_OF_DTYPE[kind], sequences, boundaries)


class Sink(Protocol):
    """Where bytes go."""

    def write(self, content: bytes) -> object:
        """Append."""


def write_pointers(stream: Sink, lengths: NDArray[np.int32], itemsize: int, start: int) -> int:
    """Write the byte offsets of a run of sequences that begins at byte `start`; returns where it ends."""
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize + start
    if not len(ends):
        return start
    pointers = np.empty(len(ends), "<i8")
    pointers[0] = start
    pointers[1:] = ends[:-1]
    stream.write(pointers.tobytes())
    return int(ends[-1])
