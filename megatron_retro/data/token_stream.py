"""The one way to read the tokens of a file: by spans, by rows, one by one.

Only a stream that lies in a mapped file has an `array`. Whoever reads through these calls reads any stream.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.stored_artifact import StoredBlocks


class TokenStream(Protocol):
    """Tokens by their offsets, which must lie in the stream."""

    count: int

    def span(self, start: int, stop: int) -> NDArray[Any]:
        """The tokens [start, stop)."""
        ...

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Tokens [N, length] from each place on; what lies behind the end of the stream is 0."""
        ...

    def at(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        """The token at each place."""
        ...


class MappedTokens:
    """The stream of a file in memory or on a disk."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.count = array, len(array)

    def span(self, start: int, stop: int) -> NDArray[Any]:
        return self.array[start:stop]

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        found = np.zeros((len(starts), length), self.array.dtype)
        for row, start in zip(found, starts.tolist(), strict=True):
            piece = self.array[start : start + length]
            row[: len(piece)] = piece
        return found

    def at(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = self.array[offsets]
        return found


class StoredTokens:
    """The stream of a file in an object store; there is no array."""

    def __init__(self, blocks: StoredBlocks, dtype: np.dtype[Any]) -> None:
        self.blocks, self.count = blocks, blocks.num_bytes // dtype.itemsize
        self._dtype = dtype

    def span(self, start: int, stop: int) -> NDArray[Any]:
        size = self._dtype.itemsize
        return self.blocks.read(start * size, stop * size).view(self._dtype)

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        size = self._dtype.itemsize
        return self.blocks.rows(starts * size, length * size).view(self._dtype)

    def at(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        return self.blocks.at(offsets, self._dtype)
