"""Files that are not finished: written on from a place that is known to be good, counted, hashed, then published."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.files import fresh_name
from megatron_retro.artifacts.manifest import FileRecord
from megatron_retro.errors import DamagedArtifact

_SPAN = 1 << 20


class UnfinishedFile:
    """An unfinished file, written on from byte `start`; what lies behind it is overwritten, never cut.

    Two writers of one file write the same bytes at the same places, so neither may cut what the other has written.
    """

    def __init__(self, path: Path, start: int = 0, *, is_kept: bool = False) -> None:
        self.path, self.size, self._is_kept = path, start, is_kept
        self.stream: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | (0 if start else os.O_CREAT), 0o666), "rb+")
        if self.stream.seek(0, os.SEEK_END) < start:
            raise DamagedArtifact(
                f"{path} is cut: {start} bytes of it were written",
                fix=f"remove {path.parent} and run the command again",
            )
        self.stream.seek(start)

    def _changed(self) -> DamagedArtifact:
        return DamagedArtifact(
            f"{self.path} is cut or has changed since it was written",
            fix=f"remove {self.path.parent} and run the same command again" if self._is_kept else "write it again",
        )

    def write(self, content: bytes | memoryview) -> None:
        """Add bytes."""
        self.size += self.stream.write(content)

    def flush(self) -> None:
        """Force all that was written to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def publish(self, path: Path) -> None:
        """Give the file its final name."""
        self.flush()
        self.stream.close()
        if self.path != path:
            os.replace(self.path, path)

    def discard(self) -> None:
        """Close the file and, unless it is kept, remove it."""
        with suppress(OSError):  # what is buffered has no room on a full disk
            self.stream.close()
        if not self._is_kept:
            self.path.unlink(missing_ok=True)


class Spool(UnfinishedFile):
    """Numbers kept on disk until the header that precedes them is known, and their checksum."""

    def __init__(self, path: Path, dtype: str, count: int = 0, checksum: int = 0, *, is_kept: bool = False) -> None:
        self.dtype, self.checksum = np.dtype(dtype), checksum
        super().__init__(path, count * self.dtype.itemsize, is_kept=is_kept)

    @property
    def count(self) -> int:
        """Numbers so far."""
        return self.size // self.dtype.itemsize

    def extend(self, values: ArrayLike) -> None:
        """Add numbers."""
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        self.write(content)
        self.checksum = checksum_of(content, self.checksum)

    def spans(self) -> Iterator[NDArray[Any]]:
        """All of them, a million at a time; the next ones follow. Refused if they are not what was written."""
        self.stream.seek(0)
        left, found = self.size, 0
        while content := self.stream.read(min(left, _SPAN * self.dtype.itemsize)):
            left, found = left - len(content), checksum_of(content, found)
            yield np.frombuffer(content, self.dtype)
        if left or found != self.checksum:
            raise self._changed()


class HashedFile(UnfinishedFile):
    """A file that knows the SHA-256 of what went through it."""

    def __init__(self, path: Path) -> None:
        super().__init__(fresh_name(path))
        self._digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        """Add bytes."""
        super().write(content)
        self._digest.update(content)

    def record(self) -> FileRecord:
        """What a manifest says of it."""
        return FileRecord(self.size, self._digest.hexdigest())
