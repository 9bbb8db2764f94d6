"""Token files: a corpus as one stream of tokens (`PREFIX.bin`) and where its documents lie (`PREFIX.idx`).

Byte for byte Megatron's format (`MMIDIDX`, version 1), so files go both ways. Ours have a manifest beside them, and the
checksums of the `.bin`'s blocks; files made by others are read without. Opening maps the files, verifies what is small
and, of what is large, sizes, ends and a few blocks; `token_verification.py` verifies the rest while a run reads.
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

from megatron_retro.artifacts.block_checksums import CheckedContent, ChecksumList
from megatron_retro.artifacts.manifest import Manifest, manifest_path
from megatron_retro.artifacts.mapped_files import expect_random_reads, map_file
from megatron_retro.artifacts.verified import open_artifact, unread
from megatron_retro.data.native import REMEDY, extension, named_damage
from megatron_retro.data.token_index import HEADER_BYTES, TokenIndex, last_at_or_before, read_index
from megatron_retro.data.token_stream import MappedTokens, TokenStream
from megatron_retro.errors import ArtifactError, DamagedArtifact, DataError

_SMALL_VOCABULARY = 65500
KIND = "tokens"
MANIFEST_VERSION = 1
_SAMPLED_WINDOWS, _WINDOW_BYTES = 256, 4096
_FEW_OFFSETS = 1024  # of more, NumPy finds the documents faster: it waits for memory once for all of them
_REPLACED = (
    "put back what was written or write it again; if you replaced it, describe what is there now: "
    "`megatron-retro preprocess --checksum-token-files PREFIX`"
)


@dataclass(frozen=True)
class StoredTokenizer:
    """What the manifest of a token file says of the tokenizer that it was made with."""

    fingerprint: str
    kind: str
    vocab_size: int | None


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of lengths and boundaries."""
    return Path(f"{prefix}.idx")


def checksums_path(prefix: str | Path) -> Path:
    """The checksums of the blocks of the `.bin`."""
    return Path(f"{prefix}.bin.blocks")


class TokenFile:
    """A mapped token file. Offsets count tokens from the start of the stream; nothing is inserted into it."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = _opened_manifest(Path(prefix))
        self.index: TokenIndex = read_index(idx_path(prefix))
        self._bytes = map_file(bin_path(prefix))
        self._check_ends()
        self._tokens: TokenStream = MappedTokens(self._bytes.view(self.index.dtype))
        if self.manifest is not None and bin_path(prefix).name in unread(self.manifest):
            self._check_some_blocks()

    @cached_property
    def checked(self) -> CheckedContent | None:
        """The tokens with the checksums of their blocks; None where nobody wrote these."""
        path = checksums_path(self.prefix)
        if self.manifest is None or path.name not in self.manifest.files or not path.exists():
            return None
        sums = ChecksumList.parse(map_file(path), path)
        return CheckedContent(bin_path(self.prefix), self._bytes, sums.checksums, sums.block_bytes)

    def _check_some_blocks(self) -> None:
        """Notice another `.bin` of the same size in the place of a large one: it differs in nearly every block."""
        if self.checked is not None:
            for number in {0, self.checked.num_blocks // 2, self.checked.num_blocks - 1}:
                self.checked.require_block(number)

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
    def stream(self) -> NDArray[Any]:
        """All tokens as one array, which only a file on a disk has."""
        if not isinstance(self._tokens, MappedTokens):
            raise DataError(
                f"{self.prefix} is not mapped", fix="read its `tokens`, `rows` or `at`, or copy it to a disk"
            )
        return self._tokens.array

    def expect_random_reads(self) -> None:
        """Say that few tokens at a time will be read, here and there, as neighbours are."""
        expect_random_reads(self._bytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type, uint16 or int32 in files of ours."""
        return self.index.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""
        return self._tokens.count

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.index.documents) - 1

    def document_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offset of the first token of each document; `num_documents` gives the end of the stream."""
        sequences, itemsize = self.index.documents[documents], self.dtype.itemsize
        self._require_within(sequences, self.index.num_sequences, "a document begins at sequence")
        if self.index.num_sequences == 0:
            return np.zeros(np.shape(documents), np.int64)
        at_end = sequences == self.index.num_sequences
        pointers = self.index.pointers[np.where(at_end, 0, sequences)]
        self._require_within(pointers, self.num_tokens * itemsize, "a sequence begins at byte")
        return np.where(at_end, self.num_tokens, pointers // itemsize)

    def _require_within(self, numbers: NDArray[np.int64], most: int, what: str) -> None:
        """Refuse numbers of the index that lead outside the file."""
        outside = (numbers < 0) | (numbers > most)
        if outside.any():
            raise DamagedArtifact(f"{self.prefix}.idx: {what} {numbers[outside][0]} of {most}", fix=REMEDY)

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
        return self._tokens.span(start, stop)

    def spans(self, length: int) -> Iterator[NDArray[Any]]:
        """The whole stream, so many tokens at a time."""
        return (self.tokens(start, min(start + length, self.num_tokens)) for start in range(0, self.num_tokens, length))

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Tokens [N, length] from each place of the stream on; what lies behind its end is 0."""
        return self._tokens.rows(starts, length)

    def at(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        """The token at each place of the stream."""
        return self._tokens.at(offsets)

    def documents_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document that each token of the stream lies in."""
        wanted = np.ascontiguousarray(offsets, np.int64)
        native = extension()
        if native is None or self.dtype.itemsize not in (2, 4) or wanted.size > _FEW_OFFSETS:
            return last_at_or_before(self.document_starts, self.num_documents, wanted)
        with named_damage():
            found: NDArray[np.int64] = native.token_documents(*self.native_arrays, wanted.reshape(-1))
        return found.reshape(wanted.shape)

    @property
    def native_arrays(self) -> tuple[str, NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """The prefix, the stream, byte offsets of sequences and document boundaries, as `csrc/host` reads them."""
        return self.prefix, self.stream, self.index.pointers, self.index.documents

    @cached_property
    def tokenizer(self) -> StoredTokenizer | None:
        """The tokenizer of the file; None where no manifest says it, as beside files of other programs."""
        if self.manifest is None:
            return None
        fingerprint, config = self.manifest.inputs.get("tokenizer"), self.manifest.config
        if fingerprint is None:
            return None
        return StoredTokenizer(fingerprint, config.get("tokenizer_type", "tokenizer"), config.get("vocab_size"))

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
        for content in map(map_file, (idx_path(self.prefix), bin_path(self.prefix))):
            expect_random_reads(content)  # else each window reads megabytes around it
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content[:HEADER_BYTES].tobytes())
            for window in _windows(len(content)):
                digest.update(content[window].tobytes())
        return digest.hexdigest()


def _opened_manifest(prefix: Path) -> Manifest | None:
    if not manifest_path(prefix).exists():
        return None
    # Whoever copies .bin, .idx and manifest alone loses nothing but the place of a damage.
    optional = (checksums_path(prefix).name,)
    return open_artifact(prefix, kind=KIND, version=MANIFEST_VERSION, fix=_REPLACED, optional=optional)


def _windows(size: int) -> Sequence[slice]:
    if size <= _SAMPLED_WINDOWS * _WINDOW_BYTES:
        return [slice(0, size)]
    starts = [(size - _WINDOW_BYTES) * number // (_SAMPLED_WINDOWS - 1) for number in range(_SAMPLED_WINDOWS)]
    return [slice(start, start + _WINDOW_BYTES) for start in starts]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)
