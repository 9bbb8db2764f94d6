"""Artifacts behind URLs: small files are copied whole to the cache, of large ones the blocks that are read.

Each version of an artifact, by its manifest or by what the store says of its files, has a folder of its own in the
cache; a newer version removes the older. A block is a file: its bytes and their CRC-32. It is verified when it is
fetched, against the artifact's checksums where it has any, and when a process first uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import BLOCK_BYTES, checksum_of
from megatron_retro.artifacts.files import make_folder, new_file, temporary_name, write_file
from megatron_retro.artifacts.manifest import MANIFEST_NAME, FileRecord, unchanged
from megatron_retro.artifacts.object_cache import BLOCK_ENDING, CacheFolder
from megatron_retro.artifacts.object_store import PARALLEL_READS, ObjectStore
from megatron_retro.errors import DamagedArtifact

_CRC_BYTES = 4
_TOUCH_SECONDS = 60.0  # a block that is in use says so this often
_AHEAD = 4  # blocks that are fetched behind the last one, where a file is read in order
_WRITE_AGAIN = "write the object again, or put back what was written"


@dataclass
class Traffic:
    """Blocks that were asked for, those of them that the disk had, and bytes that were fetched for the others."""

    asked: int = 0
    had: int = 0
    fetched_bytes: int = 0

    @property
    def share_had(self) -> str:
        """Share of the blocks that the disk had."""
        return f"{self.had / max(self.asked, 1):.1%}"

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.asked + other.asked, self.had + other.had, self.fetched_bytes + other.fetched_bytes)


class StoredArtifact:
    """One version of an artifact behind a URL. `copy` is its path in the cache, where its manifest and copies lie."""

    def __init__(self, url: str, *, endings: Sequence[str] = ()) -> None:
        """Without `endings` a directory; with them the files whose names begin with that of the URL."""
        self.url, self._is_directory = url.rstrip("/"), not endings
        self.store, cache = ObjectStore(url), CacheFolder.chosen(url)
        name = self.url.rpartition("/")[2]
        manifest = MANIFEST_NAME if self._is_directory else f"{name}.{MANIFEST_NAME}"
        text = self.store.read_if_there(self.url_of(manifest))
        states = "" if text is not None else "".join(self.state(name + ending)[1] for ending in endings)
        version = hashlib.sha256(text if text is not None else states.encode()).hexdigest()[:16]
        home = cache.path / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        self.cache, self.folder, self.copy = cache, home / version, home / version / name
        make_folder(self.copy if self._is_directory else self.folder)
        if text is not None and not self.path_of(manifest).exists():
            write_file(self.path_of(manifest), text)
        for other in home.iterdir():
            if other.name != version:
                shutil.rmtree(other, ignore_errors=True)

    def url_of(self, name: str) -> str:
        """Where a file of the artifact is stored."""
        return f"{self.url if self._is_directory else self.url.rpartition('/')[0]}/{name}"

    def path_of(self, name: str) -> Path:
        """Where its copy or its blocks lie."""
        return (self.copy if self._is_directory else self.folder) / name

    def state(self, name: str) -> tuple[int, str]:
        """Size of a file, and what changes when it is written again."""
        return self.store.size_and_state(self.url_of(name))

    def copied(self, name: str, record: FileRecord | None) -> Path:
        """The copy of a whole file; `record`: what the manifest says of it."""
        path = self.path_of(name)
        with (self.folder / "copying").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path
            size = self.state(name)[0] if record is None else record.bytes
            with new_file(path) as partial:
                with self.cache.room(size), partial.open("wb") as stream:
                    if size:
                        os.posix_fallocate(stream.fileno(), 0, size)  # so that others count it
                self._fill(partial, name, size)
                if record is not None and not unchanged(partial, record):
                    raise DamagedArtifact(
                        f"{self.url_of(name)} has changed since it was written: its checksum is wrong", fix=_WRITE_AGAIN
                    )
        return path

    def _fill(self, path: Path, name: str, size: int) -> None:
        url = self.url_of(name)
        parts = (slice(at, min(at + BLOCK_BYTES, size)) for at in range(0, size, BLOCK_BYTES))
        with path.open("r+b") as stream:
            while group := list(islice(parts, PARALLEL_READS)):
                stream.writelines(self.store.read_ranges(url, group))


class StoredBlocks:
    """A file of a stored artifact of which only blocks that are read are fetched. Threads may share it.

    `checksums` are those of its pieces of `piece_bytes`, of which a block holds a whole number; None where nobody wrote
    them: then the store is asked after each block whether the file is still the one that was opened.
    """

    def __init__(
        self,
        artifact: StoredArtifact,
        name: str,
        num_bytes: int,
        checksums: NDArray[np.uint32] | None = None,
        piece_bytes: int = BLOCK_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.url, self.num_bytes, self.block_bytes = artifact.url_of(name), num_bytes, block_bytes
        self.traffic = Traffic()
        self._artifact, self._path = artifact, artifact.path_of(name)
        self._checksums, self._piece_bytes = checksums, piece_bytes
        self._state = artifact.state(name) if checksums is None else None
        count = -(-num_bytes // block_bytes)
        self._verified, self._touched = np.zeros(count, np.bool_), np.zeros(count)
        self._lock, self._fetches = threading.Lock(), dict[int, Future[NDArray[np.uint8]]]()
        self._next = -1  # the block behind the last that was read

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes [start, stop)."""
        found, size = np.empty(stop - start, np.uint8), self.block_bytes
        numbers = range(start // size, -(-stop // size))
        if numbers and numbers[0] <= self._next <= numbers[-1]:
            ahead = range(numbers[-1] + 1, min(numbers[-1] + 1 + _AHEAD, len(self._verified)))
            self._fetch_all(number for number in ahead if not self._path_of(number).exists())
        for number, block in self._blocks(numbers):
            low, high = max(start, number * size), min(stop, number * size + len(block))
            found[low - start : high - start] = block[low - number * size : high - number * size]
            self._next = number + 1
        return found

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
        """Bytes [N, length] from each place on; what lies behind the end is 0."""
        found, size = np.zeros((len(starts), length), np.uint8), self.block_bytes
        stops = np.minimum(starts + length, self.num_bytes)
        pieces: dict[int, list[tuple[int, int, int]]] = {}
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            for number in range(start // size, -(-stop // size)):
                pieces.setdefault(number, []).append((row, start, stop))
        for number, block in self._blocks(sorted(pieces)):
            base = number * size
            for row, start, stop in pieces[number]:
                low, high = max(start, base), min(stop, base + size)
                found[row, low - start : high - start] = block[low - base : high - base]
        return found

    def at(self, offsets: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The number of this type at each place, counted in numbers."""
        per_block = self.block_bytes // dtype.itemsize
        numbers, places = np.divmod(offsets.reshape(-1), per_block)
        order = np.argsort(numbers, kind="stable")
        present, firsts = np.unique(numbers[order], return_index=True)
        found = np.empty(offsets.size, dtype)
        for (_, block), chosen in zip(self._blocks(present.tolist()), np.split(order, firsts[1:]), strict=False):
            found[chosen] = block.view(dtype)[places[chosen]]
        return found.reshape(offsets.shape)

    def _blocks(self, numbers: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """These blocks, some fetched at a time."""
        left = iter(numbers)
        while group := list(islice(left, PARALLEL_READS)):
            kept = {number: self._kept(number) for number in group}
            fetches = self._fetch_all(number for number, block in kept.items() if block is None)
            with self._lock:
                self.traffic += Traffic(len(group), len(group) - len(fetches))
            for number, block in kept.items():
                yield number, fetches[number].result() if block is None else block

    def _fetch_all(self, numbers: Iterable[int]) -> dict[int, Future[NDArray[np.uint8]]]:
        """Begin to fetch blocks that no other thread is fetching."""
        with self._lock:
            for number in (wanted := list(numbers)):
                if number not in self._fetches:
                    self._fetches[number] = self._artifact.store.pool.submit(self._fetch, number)
            return {number: self._fetches[number] for number in wanted}

    def _kept(self, number: int) -> NDArray[np.uint8] | None:
        """A block that the cache has; a copy that is not whole is dropped."""
        path, size = self._path_of(number), self._size_of(number) + _CRC_BYTES
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            is_whole = os.fstat(descriptor).st_size == size
            content = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if is_whole else b"", np.uint8)
        finally:
            os.close(descriptor)
        block, stored = content[:-_CRC_BYTES], content[-_CRC_BYTES:].tobytes()
        if not is_whole or not (self._verified[number] or checksum_of(block.data) == int.from_bytes(stored, "little")):
            path.unlink(missing_ok=True)
            return None
        self._verified[number] = True
        if (now := time.monotonic()) - self._touched[number] > _TOUCH_SECONDS:
            self._touched[number] = now
            os.utime(path)
        return block

    def _fetch(self, number: int) -> NDArray[np.uint8]:
        try:
            content = self._sound(number) or self._sound(number, is_last=True)
            kept = content + checksum_of(content).to_bytes(_CRC_BYTES, "little")
            with self._artifact.cache.room(len(kept)):
                partial = temporary_name(self._path_of(number))
                partial.write_bytes(kept)
                os.replace(partial, self._path_of(number))
            with self._lock:
                self.traffic.fetched_bytes += len(content)
            return np.frombuffer(content, np.uint8)
        except FileNotFoundError:
            raise self._replaced() from None
        finally:
            with self._lock:
                self._fetches.pop(number, None)

    def _sound(self, number: int, *, is_last: bool = False) -> bytes:
        """The bytes of a block, verified; nothing where they are wrong, once: they may have been so on their way."""
        start = number * self.block_bytes
        content = self._artifact.store.read(self.url, start, start + self._size_of(number))
        if self._checksums is None:
            if self._artifact.store.size_and_state(self.url) != self._state:
                raise self._replaced()
            return content
        first = start // self._piece_bytes
        for place in range(0, len(content), self._piece_bytes):
            piece = memoryview(content)[place : place + self._piece_bytes]
            if checksum_of(piece) != self._checksums[first + place // self._piece_bytes]:
                if not is_last:
                    return b""
                raise DamagedArtifact(
                    f"{self.url} has changed since it was written: the checksum of a block is wrong",
                    got=f"bytes {start + place} to {start + place + len(piece)}",
                    fix=_WRITE_AGAIN,
                )
        return content

    def _replaced(self) -> DamagedArtifact:
        again = "run the same command again, which opens the newer one"
        return DamagedArtifact(f"{self.url} was replaced, or its cache removed, while it was read", fix=again)

    def _path_of(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number:08d}{BLOCK_ENDING}")

    def _size_of(self, number: int) -> int:
        return min(self.block_bytes, self.num_bytes - number * self.block_bytes)
