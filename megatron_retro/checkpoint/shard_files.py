"""One shard on disk: a safetensors file written in one pass and read in verified blocks.

torch's own safetensors writer builds the whole file in memory and knows no checksum; here tensors stream from where
they lie, and every block is checksummed on the way. The files are plain safetensors, with the offsets of each slice in
the place where torch's `HuggingFaceStorageReader` looks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.artifacts.block_checksums import BLOCK_BYTES, RunningBlocks, checksum_of
from megatron_retro.errors import DamagedArtifact
from megatron_retro.runtime.strict_json import json_text

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_HEADER_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a tensor: its type, its shape, and where it begins in the whole tensor."""

    name: str
    dtype: str
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredSlice:
    """A slice and where it lies in its file."""

    spec: TensorSlice
    file: str
    begin: int


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().reshape(-1)
    octets: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(octets)


def _entry_names(slices: Sequence[TensorSlice]) -> list[str]:
    """The tensor's name, made unique where one shard holds several slices of one tensor."""
    count: dict[str, int] = {}
    for part in slices:
        count[part.name] = count.get(part.name, 0) + 1
    return [
        part.name if count[part.name] == 1 else f"{part.name}@{','.join(map(str, part.offsets))}" for part in slices
    ]


def shard_header(slices: Sequence[TensorSlice]) -> tuple[bytes, list[int]]:
    """The head of the file, and where each slice begins behind it."""
    entries: dict[str, object] = {}
    offsets: dict[str, object] = {}
    begins, position = [], 0
    for name, part in zip(_entry_names(slices), slices, strict=True):
        end = position + part.num_bytes
        entries[name] = {"dtype": part.dtype, "shape": list(part.sizes), "data_offsets": [position, end]}
        offsets[name] = {"saved_offsets": list(part.offsets)}
        begins.append(position)
        position = end
    entries["__metadata__"] = {"DCP_SHARDING_INFO": json_text(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json_text(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + begin for begin in begins]


@dataclass(frozen=True)
class WrittenShard:
    """What was written: slices with their places, size and block checksums of the file."""

    slices: tuple[StoredSlice, ...]
    num_bytes: int
    checksums: tuple[int, ...]


def write_shard(path: Path, slices: Sequence[TensorSlice], load: Callable[[int], Tensor]) -> WrittenShard:
    """Write a shard and force it to disk; `load(i)` gives slice i, contiguous or not, on any device."""
    head, begins = shard_header(slices)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        stream = _ChecksummedStream(descriptor)
        stream.write(memoryview(head))
        for number in range(len(slices)):
            tensor = load(number).detach().to("cpu").contiguous()
            stream.write(tensor_bytes(tensor))
            del tensor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    stored = tuple(StoredSlice(part, path.name, begin) for part, begin in zip(slices, begins, strict=True))
    return WrittenShard(stored, stream.blocks.size, tuple(stream.blocks.checksums()))


class _ChecksummedStream:
    """A file that is written from its beginning."""

    def __init__(self, descriptor: int) -> None:
        self.blocks = RunningBlocks()
        self._descriptor = descriptor

    def write(self, data: memoryview) -> None:
        """Append, in blocks that are checksummed while the processor still has them at hand."""
        while len(data):
            written = os.write(self._descriptor, data[:BLOCK_BYTES])
            self.blocks.feed(data[:written])
            data = data[written:]


@dataclass(frozen=True)
class Range:
    """Bytes of a file that somebody wants: a maker of the place to put them, and what to do when they are there."""

    begin: int
    num_bytes: int
    open_target: Callable[[], memoryview]
    finish: Callable[[], None]

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.begin + self.num_bytes


def read_ranges(path: Path, num_bytes: int, checksums: Sequence[int], ranges: Sequence[Range]) -> None:
    """Fill ranges from one file in a single pass; only blocks that are touched are read, and each is verified.

    A target is opened when the pass reaches it, so memory holds only what is being filled.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedArtifact(f"{path} is missing", fix="load another checkpoint of this run") from None
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise DamagedArtifact(f"{path} has another size than was written", got=size, expected=num_bytes)
        _fill(_VerifiedBlocks(path, descriptor, num_bytes, checksums), ranges)
    finally:
        os.close(descriptor)


@dataclass
class _Open:
    """A range that the pass has reached, and how much of it is there."""

    wanted: Range
    target: memoryview
    done: int = 0

    def part(self, begin: int, length: int) -> memoryview:
        """The room for what these bytes of the file hold of the range."""
        start, end = max(begin, self.wanted.begin), min(begin + length, self.wanted.end)
        return self.target[start - self.wanted.begin : end - self.wanted.begin]

    def take(self, begin: int, block: memoryview) -> None:
        """Copy what a block holds of the range, unless it was read straight into place; the last part finishes it."""
        room = self.part(begin, len(block))
        if len(room) != len(block) or room.obj is not block.obj:
            start = max(begin, self.wanted.begin) - begin
            room[:] = block[start : start + len(room)]
        self.done += len(room)
        if self.done == self.wanted.num_bytes:
            self.wanted.finish()


@dataclass(frozen=True)
class _Planned:
    """One block to read, and the ranges that it touches."""

    number: int
    ranges: tuple[_Open, ...]


def _fill(blocks: _VerifiedBlocks, ranges: Sequence[Range]) -> None:
    for wanted in ranges:
        if wanted.num_bytes == 0:
            wanted.open_target()
            wanted.finish()
    for begin, block, touched in blocks.of([wanted for wanted in ranges if wanted.num_bytes]):
        for item in touched:
            item.take(begin, block)


class _VerifiedBlocks:
    """The blocks of a file, in order, each verified as soon as it is read.

    A block that lies inside a single range is read straight into place; others go through a buffer.
    """

    def __init__(self, path: Path, descriptor: int, num_bytes: int, checksums: Sequence[int]) -> None:
        self._path, self._descriptor, self._num_bytes, self._checksums = path, descriptor, num_bytes, checksums
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def of(self, ranges: Sequence[Range]) -> Iterator[tuple[int, memoryview, tuple[_Open, ...]]]:
        """Begin, content and ranges of every block that is touched, each valid until the next is asked for."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for planned in self._opened(_touched(ranges)):
            yield planned.number * BLOCK_BYTES, self._verified(planned.number, self._read(planned)), planned.ranges

    def _opened(self, plan: Sequence[tuple[int, list[Range]]]) -> Iterator[_Planned]:
        """Opens a target when its first block is about to be read."""
        is_open: dict[int, _Open] = {}
        for number, touched in plan:
            for wanted in touched:
                if id(wanted) not in is_open:
                    is_open[id(wanted)] = _Open(wanted, wanted.open_target())
            yield _Planned(number, tuple(is_open[id(wanted)] for wanted in touched))
            for wanted in touched:
                if wanted.end <= (number + 1) * BLOCK_BYTES:
                    del is_open[id(wanted)]

    def _read(self, planned: _Planned) -> memoryview:
        begin = planned.number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self._num_bytes - begin)
        buffer = self._buffer[:length]
        if len(planned.ranges) == 1 and len(room := planned.ranges[0].part(begin, length)) == length:
            buffer = room
        done = 0
        while done < length:
            count = os.preadv(self._descriptor, [buffer[done:]], begin + done)
            if count == 0:
                raise DamagedArtifact(f"{self._path} became shorter while it was read")
            done += count
        return buffer

    def _verified(self, number: int, block: memoryview) -> memoryview:
        if checksum_of(block) != self._checksums[number]:
            begin = number * BLOCK_BYTES
            raise DamagedArtifact(
                f"{self._path}: bytes {begin} to {begin + len(block)} have changed since they were written (checksum)",
                fix="load another checkpoint of this run",
            )
        return block


def _touched(ranges: Sequence[Range]) -> list[tuple[int, list[Range]]]:
    """Every block that some range touches, in order, with those ranges."""
    found: dict[int, list[Range]] = {}
    for wanted in sorted(ranges, key=lambda wanted: wanted.begin):
        for number in range(wanted.begin // BLOCK_BYTES, -(-wanted.end // BLOCK_BYTES)):
            found.setdefault(number, []).append(wanted)
    return sorted(found.items())
