"""Checksums of a large file in blocks, so that a part of it can be verified without reading the rest.

A manifest holds one digest over the list of block checksums; whoever reads parts holds the list itself, in a file
beside it where nothing else has it. CRC-32 is
for damage (every burst of up to 32 bits is found) and keeps up with disks that SHA-256 would slow down: ISA-L computes
zlib's values ten times as fast as zlib does, so that a block is checked on the way and needs no thread of its own.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megatron_retro.errors import DamagedArtifact

BLOCK_BYTES = 1 << 22
PREFIX = "crc32-blocks:"
_MAGIC = b"CRCBLOCK"
_HEADER = struct.Struct("<8sQQ")


def checksum_of(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32 of some bytes that follow others."""
    return isal_zlib.crc32(data, before)


class RunningBlocks:
    """Checksums of the blocks of a stream that is fed in order, in pieces of any size."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.size, self._block_bytes = 0, block_bytes
        self.finished: list[int] = []
        self.current = 0  # of the block that is not full

    @classmethod
    def after(cls, size: int, finished: list[int], current: int) -> RunningBlocks:
        """Going on behind `size` bytes whose full blocks have these checksums."""
        running = cls()
        running.size, running.finished, running.current = size, finished, current
        return running

    def feed(self, data: memoryview) -> None:
        """Add the next bytes."""
        start = 0
        while start < len(data):
            piece = data[start : start + self._block_bytes - self.size % self._block_bytes]
            self.current = checksum_of(piece, self.current)
            self.size += len(piece)
            start += len(piece)
            if self.size % self._block_bytes == 0:
                self.finished.append(self.current)
                self.current = 0

    def checksums(self) -> list[int]:
        """One checksum per block so far, the last one perhaps of a short block."""
        return [*self.finished, self.current] if self.size % self._block_bytes else list(self.finished)


def blocks_digest(checksums: Sequence[int]) -> str:
    """What a manifest records instead of a SHA-256 of the content."""
    values = array("I", checksums)
    return PREFIX + hashlib.sha256(values.tobytes()).hexdigest()


def read_block_checksums(path: Path) -> list[int]:
    """The block checksums of a file on disk."""
    return _read(path).checksums()


def checksums_of(path: Path) -> ChecksumList:
    """The same, for a file of their own."""
    return ChecksumList.of(_read(path))


def _read(path: Path) -> RunningBlocks:
    running = RunningBlocks()
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            running.feed(memoryview(buffer)[:count])
    return running


@dataclass(frozen=True)
class ChecksumList:
    """The checksums of a file's blocks, as they stand in a file of their own: 24 bytes of header, 4 bytes a block."""

    block_bytes: int
    num_bytes: int
    checksums: NDArray[np.uint32]

    @classmethod
    def of(cls, running: RunningBlocks, block_bytes: int = BLOCK_BYTES) -> ChecksumList:
        """The blocks of a stream that has ended."""
        return cls(block_bytes, running.size, np.array(running.checksums(), "<u4"))

    @classmethod
    def parse(cls, content: NDArray[np.uint8], path: Path) -> ChecksumList:
        """The list in the content of a file."""
        magic, block_bytes, num_bytes = _HEADER.unpack(content[: _HEADER.size].tobytes().ljust(_HEADER.size))
        count = -(-num_bytes // block_bytes) if block_bytes else -1
        if magic != _MAGIC or len(content) != _HEADER.size + 4 * count:
            raise DamagedArtifact(f"{path} is no list of checksums, or is cut", fix="write it again")
        return cls(block_bytes, num_bytes, content[_HEADER.size :].view("<u4"))

    def to_bytes(self) -> bytes:
        """What stands in the file."""
        return _HEADER.pack(_MAGIC, self.block_bytes, self.num_bytes) + self.checksums.astype("<u4").tobytes()


class CheckedContent:
    """A mapped file of which each block is verified when it is first read. Threads may share it."""

    def __init__(self, path: Path, content: NDArray[np.uint8], checksums: NDArray[np.uint32], block_bytes: int) -> None:
        self.path, self.content = path, content
        self._checksums, self.block_bytes = checksums, block_bytes
        self._seen = np.zeros(len(checksums), np.bool_)

    @property
    def num_blocks(self) -> int:
        """Blocks that have a checksum."""
        return len(self._checksums)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes [start, stop), verified, as a view."""
        self.require(start, stop)
        return self.content[start:stop]

    def require(self, start: int, stop: int) -> None:
        """Refuse bytes that have changed since they were written."""
        first = start // self.block_bytes
        for number in np.flatnonzero(~self._seen[first : -(-stop // self.block_bytes)]) + first:
            self.require_block(int(number))
            self._seen[number] = True

    def require_block(self, number: int) -> None:
        """The same of one block, whatever was verified before."""
        block = self.content[number * self.block_bytes : (number + 1) * self.block_bytes]
        if checksum_of(block.data) != self._checksums[number]:
            first = number * self.block_bytes
            raise DamagedArtifact(
                f"{self.path} has changed since it was written: the checksum of block {number} is wrong",
                got=f"bytes {first} to {first + len(block)}",
                fix="write it again, or put back the file that was written; `megatron-retro inspect` checks all of it",
            )
