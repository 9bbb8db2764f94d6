"""Token files: a corpus as one stream of tokens (`PREFIX.bin`) and where its documents lie (`PREFIX.idx`).

Byte for byte Megatron's format (`MMIDIDX`, version 1), so files go both ways. Ours have a manifest beside them, and the
checksums of the `.bin`'s blocks; files made by others are read without. Opening maps the files, verifies what is small
and, of what is large, sizes, ends and a few blocks; `token_verification.py` verifies the rest while a run reads. Behind
a URL only the index is copied; tokens are fetched and verified in blocks as they are read (`stored_artifact.py`).
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
from megatron_retro.artifacts.files import write_file
from megatron_retro.artifacts.manifest import Manifest, manifest_path, read_manifest
from megatron_retro.artifacts.mapped_files import expect_random_reads, map_file
from megatron_retro.artifacts.object_store import is_url
from megatron_retro.artifacts.stored_artifact import StoredArtifact, StoredBlocks, Traffic
from megatron_retro.artifacts.verified import open_artifact, unread
from megatron_retro.data.native import REMEDY, extension, named_damage
from megatron_retro.data.token_index import HEADER_BYTES, TokenIndex, last_at_or_before, read_index
from megatron_retro.data.token_stream import MappedTokens, StoredTokens, TokenStream
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
    """A token file, mapped or behind a URL. Offsets count tokens of the stream; nothing is inserted into it."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._stored = StoredArtifact(self.prefix, endings=(".idx", ".bin")) if is_url(prefix) else None
        self._place = Path(prefix) if self._stored is None else self._stored.copy
        self.manifest = _opened_manifest(self._place, self._stored)
        self.index: TokenIndex = read_index(idx_path(self._place))
        self._bytes = map_file(bin_path(prefix)) if self._stored is None else np.zeros(0, np.uint8)
        if self._stored is not None:
            blocks = self._opened_blocks(self._stored)
            self._check_ends(blocks.num_bytes)
            self._tokens: TokenStream = StoredTokens(blocks, self.index.dtype)
            return
        self._check_ends(len(self._bytes))
        self._tokens = MappedTokens(self._bytes.view(self.index.dtype))
        if self.manifest is not None and bin_path(prefix).name in unread(self.manifest):
            self._check_some_blocks()

    def _opened_blocks(self, stored: StoredArtifact) -> StoredBlocks:
        name, sums = bin_path(self._place).name, self._checksums
        if sums is not None and self.manifest is not None:
            pieces = sums.block_bytes
            return StoredBlocks(stored, name, self.manifest.files[name].bytes, sums.checksums, pieces, pieces)
        return StoredBlocks(stored, name, stored.state(name)[0])

    @property
    def is_mapped(self) -> bool:
        """Whether all of the stream can be had as one array."""
        return self._stored is None

    @property
    def traffic(self) -> Traffic:
        """What was read from an object store."""
        return self._tokens.blocks.traffic if isinstance(self._tokens, StoredTokens) else Traffic()

    @cached_property
    def checked(self) -> CheckedContent | None:
        """The mapped tokens with the checksums of their blocks; None where nobody wrote these."""
        sums = self._checksums
        if sums is None:
            return None
        return CheckedContent(bin_path(self.prefix), self._bytes, sums.checksums, sums.block_bytes)

    @property
    def _checksums(self) -> ChecksumList | None:
        path = checksums_path(self._place)
        if self.manifest is None or path.name not in self.manifest.files or not path.exists():
            return None
        return ChecksumList.parse(map_file(path), path)

    def _check_some_blocks(self) -> None:
        """Notice another `.bin` of the same size in the place of a large one: it differs in nearly every block."""
        if self.checked is not None:
            for number in {0, self.checked.num_blocks // 2, self.checked.num_blocks - 1}:
                self.checked.require_block(number)

    def _check_ends(self, num_bytes: int) -> None:
        """What can be checked without touching every document."""
        index, itemsize = self.index, self.index.dtype.itemsize
        end = int(index.pointers[-1]) + int(index.lengths[-1]) * itemsize if index.num_sequences else 0
        if end != num_bytes or end % itemsize or (index.num_sequences and index.pointers[0] != 0):
            raise ArtifactError(
                f"{self.prefix}.idx does not belong to {self.prefix}.bin",
                got=f"a .bin of {num_bytes} bytes",
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
    def native_arrays(self) -> tuple[str, NDArray[Any] | tuple[int, int], NDArray[np.int64], NDArray[np.int64]]:
        """The prefix, the stream, byte offsets of sequences and document boundaries, as `csrc/host` reads them.

        Of a stream that is not mapped `csrc/host` knows the number of tokens and the bytes of one.
        """
        stream = self.stream if self.is_mapped else (self.num_tokens, self.dtype.itemsize)
        return self.prefix, stream, self.index.pointers, self.index.documents

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
        if self._stored is None:
            return _fingerprint(_mapped_windows(idx_path(self.prefix)), _mapped_windows(bin_path(self.prefix)))
        known = self._place.with_name(f"{self._place.name}.fingerprint")
        if not known.exists():
            size = self.num_tokens * self.dtype.itemsize
            windows = self._stored.store.read_ranges(self._stored.url_of(bin_path(self._place).name), _windows(size))
            write_file(known, _fingerprint(_mapped_windows(idx_path(self._place)), (size, windows)))
        return known.read_text()


def _opened_manifest(prefix: Path, stored: StoredArtifact | None) -> Manifest | None:
    # Whoever copies .bin, .idx and manifest alone loses nothing but the place of a damage.
    optional = [checksums_path(prefix).name]
    has_manifest = manifest_path(prefix).exists()
    if stored is not None:
        files = read_manifest(prefix, kind=KIND, version=MANIFEST_VERSION).files if has_manifest else {}
        stored.copied(idx_path(prefix).name, files.get(idx_path(prefix).name))
        if optional[0] in files:
            stored.copied(optional[0], files[optional[0]])
        optional.append(bin_path(prefix).name)  # stays where it is
    if not has_manifest:
        return None
    return open_artifact(prefix, kind=KIND, version=MANIFEST_VERSION, fix=_REPLACED, optional=optional)


def _mapped_windows(path: Path) -> tuple[int, list[bytes]]:
    content = map_file(path)
    expect_random_reads(content)  # else each window reads megabytes around it
    return len(content), [content[window].tobytes() for window in _windows(len(content))]


def _fingerprint(*files: tuple[int, list[bytes]]) -> str:
    digest = hashlib.sha256(b"token file 1")
    for size, windows in files:
        digest.update(size.to_bytes(8, "little"))
        for window in windows:
            digest.update(window)
    return digest.hexdigest()


def _windows(size: int) -> Sequence[slice]:
    header = slice(0, min(size, HEADER_BYTES))
    if size <= _SAMPLED_WINDOWS * _WINDOW_BYTES:
        return [header, slice(0, size)]
    starts = [(size - _WINDOW_BYTES) * number // (_SAMPLED_WINDOWS - 1) for number in range(_SAMPLED_WINDOWS)]
    return [header, *(slice(start, start + _WINDOW_BYTES) for start in starts)]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)
