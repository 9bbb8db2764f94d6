"""Checksums of a large file in blocks, so that a part of it can be verified without reading the rest.

A manifest holds one digest over the list of block checksums; whoever reads parts holds the list itself. CRC-32 is
for damage (every burst of up to 32 bits is found) and keeps up with disks that SHA-256 would slow down: ISA-L computes
zlib's values ten times as fast as zlib does, so that a block is checked on the way and needs no thread of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

from isal import isal_zlib

BLOCK_BYTES = 1 << 22
PREFIX = "crc32-blocks:"


def checksum_of(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32 of some bytes that follow others."""
    return isal_zlib.crc32(data, before)


class RunningBlocks:
    """Checksums of the blocks of a stream that is fed in order, in pieces of any size."""

    def __init__(self) -> None:
        self.size = 0
        self._finished: list[int] = []
        self._current = 0

    def feed(self, data: memoryview) -> None:
        """Add the next bytes."""
        start = 0
        while start < len(data):
            piece = data[start : start + BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._current = checksum_of(piece, self._current)
            self.size += len(piece)
            start += len(piece)
            if self.size % BLOCK_BYTES == 0:
                self._finished.append(self._current)
                self._current = 0

    def checksums(self) -> list[int]:
        """One checksum per block so far, the last one perhaps of a short block."""
        return [*self._finished, self._current] if self.size % BLOCK_BYTES else list(self._finished)


def blocks_digest(checksums: Sequence[int]) -> str:
    """What a manifest records instead of a SHA-256 of the content."""
    values = array("I", checksums)
    return PREFIX + hashlib.sha256(values.tobytes()).hexdigest()


def read_block_checksums(path: Path) -> list[int]:
    """The block checksums of a file on disk."""
    running = RunningBlocks()
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            running.feed(memoryview(buffer)[:count])
    return running.checksums()
