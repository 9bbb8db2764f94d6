"""Compressed files in frames: where these begin, found without decompressing, and their bytes from any of them on.

zstandard's frames are walked from block header to block header, or found in the table at the end of a seekable file.
A member of a gzip file tells its length only where bgzip wrote it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megatron_retro.errors import EnvironmentProblem

_ZSTD_MAGIC, _SEEKABLE_MAGIC = 0xFD2FB528, 0x8F92EAB1
_SKIPPABLE_MAGIC, _SKIPPABLE_BITS = 0x184D2A50, 0xFFFFFFF0
_RLE_BLOCK, _BLOCK_HEADER_BYTES = 1, 3
_DICTIONARY_BYTES, _CONTENT_SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)
_FOOTER = struct.Struct("<IBI")
_BGZF_START = b"\x1f\x8b\x08\x04"
_BGZF = struct.Struct("<10xH2sHH")  # the length of what is extra, and its first part: BC, 2, length less one
_READ_BYTES = 1 << 15
Content = NDArray[np.uint8]


def zstd_frames(content: Content) -> Iterator[int]:
    """Where frames of a `.zst` begin, ascending; ends at what is none."""
    from_table = _seek_table(content)
    if from_table is not None:
        yield from from_table
        return
    place = 0
    while place + 5 <= len(content):
        magic = _number(content, place, 4)
        if magic & _SKIPPABLE_BITS == _SKIPPABLE_MAGIC:
            place += 8 + _number(content, place + 4, 4)
            continue
        if magic != _ZSTD_MAGIC:
            return
        yield place
        place = _end_of_frame(content, place)


def _end_of_frame(content: Content, place: int) -> int:
    flags = int(content[place + 4])
    single = flags >> 5 & 1
    place += 5 + (1 - single) + _DICTIONARY_BYTES[flags & 3] + (_CONTENT_SIZE_BYTES[flags >> 6] or single)
    last = 0
    while not last and place < len(content):
        block = _number(content, place, _BLOCK_HEADER_BYTES)
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        place += _BLOCK_HEADER_BYTES + (1 if kind == _RLE_BLOCK else size)
    return place + 4 * (flags >> 2 & 1)


def _seek_table(content: Content) -> list[int] | None:
    """The starts that the table of a seekable file names; None without a table that fits the file."""
    if len(content) < _FOOTER.size:
        return None
    count, flags, magic = _FOOTER.unpack(content[-_FOOTER.size :].tobytes())
    entry = 12 if flags >> 7 else 8
    table = len(content) - _FOOTER.size - count * entry
    if magic != _SEEKABLE_MAGIC or table < 8:
        return None
    sizes = content[table : table + count * entry].view(np.uint8).reshape(count, entry)[:, :4].copy().view("<u4")[:, 0]
    starts = np.cumsum([0, *sizes.tolist()])
    fits = int(starts[-1]) == table - 8 and all(_number(content, int(one), 4) == _ZSTD_MAGIC for one in starts[:-1])
    return [int(one) for one in starts[:-1]] if fits else None


def bgzf_members(content: Content) -> Iterator[int]:
    """Where members of a `.gz` begin that say their lengths; ends at one that does not."""
    place = 0
    while place + _BGZF.size <= len(content):
        head = content[place : place + _BGZF.size].tobytes()
        extra, name, size, length = _BGZF.unpack(head)
        if not head.startswith(_BGZF_START) or extra < 6 or (name, size) != (b"BC", 2):
            return
        yield place
        place += length + 1


def _number(content: Content, place: int, size: int) -> int:
    return int.from_bytes(content[place : place + size].tobytes(), "little")


def cuts_of(starts: Iterator[int], size: int, apart: int) -> tuple[int, ...]:
    """Some of the starts, at least `apart` bytes from one another and from both ends."""
    cuts = [0]
    for start in starts:
        if start - cuts[-1] >= apart and size - start >= apart:
            cuts.append(start)
    return tuple(cuts[1:])


class FrameStream(io.RawIOBase):
    """Decompressed frames one after another, from byte `start` of the file on; an unfinished last one is an error.

    `before_stop` says how many decompressed bytes stand before byte `stop` of the file, once these are read.
    """

    def __init__(self, path: str, new_frame: Callable[[], Any], errors: Any, start: int = 0, stop: int = -1) -> None:
        self._new_frame, self._errors = new_frame, errors
        self._frame: Any = None
        self._stream = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._stream.seek(start)
        self._place, self._stop = start, stop
        self._pending = self._compressed = b""
        self._produced = 0
        self.before_stop: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if not self._compressed:
                self._read()
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._decompress()
        amount = min(len(buffer), len(self._pending))
        buffer[:amount] = self._pending[:amount]
        self._pending = self._pending[amount:]
        return amount

    def _read(self) -> None:
        amount = _READ_BYTES
        if self._place == self._stop:
            if self._frame is not None:
                raise EOFError(f"no frame begins at byte {self._stop} any more")
            self.before_stop = self._produced
        elif self._place < self._stop:
            amount = min(amount, self._stop - self._place)
        self._compressed = self._stream.read(amount)
        self._place += len(self._compressed)

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._pending = self._frame.decompress(self._compressed)
        except self._errors as error:
            raise EOFError(str(error)) from None
        self._produced += len(self._pending)
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._stream.close()
        super().close()


def zstd_stream(path: str, start: int = 0, stop: int = -1) -> FrameStream:
    """The frames of a `.zst`."""
    try:
        import zstandard
    except ImportError:
        raise EnvironmentProblem("reading .zst needs zstandard", fix="pip install 'megatron-retro[formats]'") from None
    new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return FrameStream(path, new_frame, zstandard.ZstdError, start, stop)


def gzip_stream(path: str, start: int, stop: int) -> FrameStream:
    """The members of a `.gz`, from one of them on."""
    return FrameStream(path, lambda: isal_zlib.decompressobj(wbits=31), isal_zlib.error, start, stop)
