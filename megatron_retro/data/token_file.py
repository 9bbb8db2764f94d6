"""Token files: a corpus as one stream of tokens (`PREFIX.bin`) and where its documents lie (`PREFIX.idx`).

Byte for byte Megatron's format, so files go both ways. Ours have a manifest beside them; files made by others are
read without one. Opening maps the files and checks sizes and ends only; `verify_token_file` checks everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.bisection import last_at_or_before
from megatron_retro.data.native import extension
from megatron_retro.data.token_index import HEADER_BYTES, TokenIndex, map_file, read_index
from megatron_retro.errors import ArtifactError, DataError

KIND = "tokens"
MANIFEST_VERSION = 1
_SAMPLED_WINDOWS = 256
_WINDOW_BYTES = 4096


__all__ = ["KIND", "MANIFEST_VERSION", "TokenFile", "bin_path", "idx_path"]


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of lengths and boundaries."""
    return Path(f"{prefix}.idx")


class TokenFile:
    """A mapped token file. Offsets count tokens from the start of the stream; nothing is inserted into it."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.index: TokenIndex = read_index(idx_path(prefix))
        self._bytes = map_file(bin_path(prefix))
        self._check_ends()
        self.stream: NDArray[Any] = self._bytes.view(self.index.dtype)

    def _check_ends(self) -> None:
        """What can be checked without touching every document."""
        index, itemsize = self.index, self.index.dtype.itemsize
        end = int(index.pointers[-1]) + int(index.lengths[-1]) * itemsize if index.num_sequences else 0
        if end != len(self._bytes) or end % itemsize or (index.num_sequences and index.pointers[0] != 0):
            raise ArtifactError(
                f"{self.prefix}.idx does not belong to {self.prefix}.bin",
                got=f"a .bin of {len(self._bytes)} bytes",
                expected=f"{end} bytes, which is where the .idx ends",
                fix="one of the two is cut or from another corpus: write both again",
            )
        bounds = index.documents
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != index.num_sequences:
            raise ArtifactError(
                f"{self.prefix}.idx: document boundaries do not cover the sequences",
                got="none" if len(bounds) == 0 else f"{bounds[0]} to {bounds[-1]}",
                expected=f"0 to {index.num_sequences}",
                fix="write the file again",
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type, uint16 or int32 in files of ours."""
        return self.index.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""
        return len(self.stream)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.index.documents) - 1

    def document_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offset of the first token of each document; `num_documents` gives the end of the stream."""
        sequences = self.index.documents[documents]
        at_end = sequences >= self.index.num_sequences
        if self.index.num_sequences == 0:
            return np.zeros(np.shape(documents), np.int64)
        starts = self.index.pointers[np.where(at_end, 0, sequences)] // self.dtype.itemsize
        return np.where(at_end, self.num_tokens, starts)

    def document_bounds(self, document: int) -> tuple[int, int]:
        """First token of a document and the one after its last."""
        if not 0 <= document < self.num_documents:
            raise DataError(f"{self.prefix} has no document {document}", expected=f"0 to {self.num_documents - 1}")
        start, stop = self.document_starts(np.array([document, document + 1]))
        return int(start), int(stop)

    def document(self, document: int) -> NDArray[Any]:
        """The tokens of a document, as a view of the file."""
        return self.tokens(*self.document_bounds(document))

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens of a range of the stream, as a view of the file."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise DataError(
                f"{self.prefix} has no tokens {start} to {stop}", expected=f"a range within 0 to {self.num_tokens}"
            )
        return self.stream[start:stop]

    def documents_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document that each token of the stream lies in."""
        wanted = np.ascontiguousarray(offsets, np.int64)
        native = extension()
        if native is None or self.dtype.itemsize not in (2, 4):
            return last_at_or_before(self.document_starts, self.num_documents, wanted)
        found: NDArray[np.int64] = native.token_documents(*self.native_arrays, wanted.reshape(-1))
        return found.reshape(wanted.shape)

    @property
    def native_arrays(self) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """The stream, byte offsets of sequences and document boundaries, as `csrc/host` reads them."""
        return self.stream, self.index.pointers, self.index.documents

    def document_of(self, token_offset: int) -> int:
        """The document that a token of the stream lies in."""
        return int(self.documents_of(np.array([token_offset]))[0])

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content: sizes, header and evenly spaced windows of both files.

        The same tokens have the same fingerprint whoever wrote them. It tells corpora apart in milliseconds;
        that no byte changed is what the manifest's checksums and `verify_token_file` are for.
        """
        digest = hashlib.sha256(b"token file 1")
        for content in (map_file(idx_path(self.prefix)), self._bytes):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content[:HEADER_BYTES].tobytes())
            for window in _windows(len(content)):
                digest.update(content[window].tobytes())
        return digest.hexdigest()


def _windows(size: int) -> Sequence[slice]:
    if size <= _SAMPLED_WINDOWS * _WINDOW_BYTES:
        return [slice(0, size)]
    starts = [(size - _WINDOW_BYTES) * number // (_SAMPLED_WINDOWS - 1) for number in range(_SAMPLED_WINDOWS)]
    return [slice(start, start + _WINDOW_BYTES) for start in starts]
