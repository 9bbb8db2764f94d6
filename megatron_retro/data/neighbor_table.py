"""Neighbour tables: for each query chunk of a corpus, the ids of its nearest chunks in a database.

Row u is query chunk u: `saved` ids of 5 bytes, little-endian, nearest first; all bits set is "none". A table covers
any set of row ranges, cut into block files of at most `block_rows` rows whose checksums are in the manifest; those of
their pages of 16 KB are in a file beside them, so that what is read is verified without the rest. Blocks can be
written by any number of workers in any order; `finish_table` gives the directory its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import CheckedContent, ChecksumList, RunningBlocks
from megatron_retro.artifacts.files import flush_directory, has_size, publish_directory, write_file
from megatron_retro.artifacts.manifest import Manifest, file_records, read_manifest, write_manifest
from megatron_retro.artifacts.mapped_files import expect_random_reads, map_file
from megatron_retro.artifacts.object_store import is_url
from megatron_retro.artifacts.stored_artifact import StoredArtifact, StoredBlocks, Traffic
from megatron_retro.artifacts.verified import require_recorded, require_whole
from megatron_retro.errors import ArtifactError, DamagedArtifact, DataError

KIND = "neighbor-table"
VERSION = 1
ID_BYTES = 5
NONE = -1
NONE_BITS = (1 << 8 * ID_BYTES) - 1
MAX_ID = NONE_BITS - 1
CHECKSUMS_FILE = "checksums.blocks"
PAGE_BYTES = 1 << 14
_STORED_BLOCK_BYTES = 1 << 20  # a row is 100 bytes: what is fetched around it should not be much
_REMEDY = "run the query stage again"


@dataclass(frozen=True)
class TableBlock:
    """Rows [first, last) of one file."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The name of the block's file."""
        return f"rows-{self.first:013d}-{self.last:013d}.ids"


@dataclass(frozen=True)
class TableLayout:
    """Which rows a table has and how they are cut into files. `row_ranges` ascend and do not overlap."""

    saved: int
    row_ranges: tuple[tuple[int, int], ...]
    block_rows: int = 1 << 18

    def __post_init__(self) -> None:
        ends = [0]
        for first, last in self.row_ranges:
            if not ends[-1] <= first < last:
                raise DataError("row ranges must ascend, not overlap and not be empty", got=self.row_ranges)
            ends.append(last)
        if self.saved < 1 or self.block_rows < 1:
            raise DataError("a neighbour table needs at least one id per row and one row per block")

    @cached_property
    def blocks(self) -> tuple[TableBlock, ...]:
        """The files of the table; a block never spans two ranges."""
        return tuple(
            TableBlock(start, min(start + self.block_rows, last))
            for first, last in self.row_ranges
            for start in range(first, last, self.block_rows)
        )

    @property
    def num_rows(self) -> int:
        """Rows of all ranges."""
        return sum(last - first for first, last in self.row_ranges)


def pack_ids(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Ids [..., saved] as bytes [..., saved * 5]; -1 becomes all ones."""
    array = np.ascontiguousarray(ids, "<i8")
    if array.size and (int(array.min()) < NONE or int(array.max()) > MAX_ID):
        raise DataError("a neighbour id does not fit 5 bytes", got=f"{array.min()} to {array.max()}")
    octets = array.view(np.uint8).reshape(*array.shape, 8)[..., :ID_BYTES]
    return np.ascontiguousarray(octets).reshape(*array.shape[:-1], array.shape[-1] * ID_BYTES)


def unpack_ids(octets: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The reverse of `pack_ids`."""
    parts = octets.reshape(*octets.shape[:-1], octets.shape[-1] // ID_BYTES, ID_BYTES)
    wide = np.zeros((*parts.shape[:-1], 8), np.uint8)
    wide[..., :ID_BYTES] = parts
    ids = wide.view("<i8")[..., 0]
    return np.where(ids == NONE_BITS, NONE, ids)


def write_block(directory: Path, layout: TableLayout, block: TableBlock, ids: NDArray[np.int64]) -> None:
    """Write one block atomically. `ids` is [rows, saved], -1 for none."""
    expected = (block.last - block.first, layout.saved)
    if ids.shape != expected:
        raise DataError(f"{block.name}: wrong shape of neighbour ids", got=ids.shape, expected=expected)
    content = pack_ids(ids).tobytes()
    running = RunningBlocks(PAGE_BYTES)
    running.feed(memoryview(content))
    write_file(_list_path(directory, block), ChecksumList.of(running, PAGE_BYTES).to_bytes())
    write_file(directory / block.name, content)


def _list_path(directory: Path, block: TableBlock) -> Path:
    """The checksums of the pages of one block, until the table is finished."""
    return directory / f"{block.name}.blocks"


def block_is_done(directory: Path, layout: TableLayout, block: TableBlock) -> bool:
    """Whether the block's file is in place and whole."""
    return has_size(directory / block.name, _block_bytes(layout, block))


def finish_table(
    directory: Path,
    path: Path,
    layout: TableLayout,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
) -> Manifest:
    """Describe a directory of finished blocks and give it its name; whatever else lies in it is removed.

    `inputs` names `corpus` and `database`.
    """
    missing = [block.name for block in layout.blocks if not block_is_done(directory, layout, block)]
    if missing:
        raise ArtifactError(f"{directory} lacks {len(missing)} blocks", got=", ".join(missing[:3]), fix="query again")
    checksums, names = _page_checksums(directory, layout), {block.name for block in layout.blocks}
    for file in directory.iterdir():
        if file.name not in names:
            file.unlink(missing_ok=True)  # a late worker's may go by itself
    write_file(directory / CHECKSUMS_FILE, checksums.to_bytes())
    described = {
        **config,
        "saved": layout.saved,
        "row_ranges": [list(span) for span in layout.row_ranges],
        "block_rows": layout.block_rows,
    }
    manifest = write_manifest(
        directory,
        kind=KIND,
        version=VERSION,
        inputs=inputs,
        config=described,
        counts={"rows": layout.num_rows},
        files=file_records(directory, {CHECKSUMS_FILE, *names}),
    )
    flush_directory(directory)
    publish_directory(directory, path)
    return manifest


def _page_checksums(directory: Path, layout: TableLayout) -> ChecksumList:
    """The checksums of all pages as they were written, block after block; the last page of a block may be short."""
    parts, size = [np.zeros(0, np.uint32)], 0
    for block in layout.blocks:
        path = _list_path(directory, block)
        if path.exists():
            found = ChecksumList.parse(map_file(path), path)
        else:  # a worker was killed after the lists were joined
            running = RunningBlocks(PAGE_BYTES)
            running.feed(map_file(directory / block.name).data)
            found = ChecksumList.of(running, PAGE_BYTES)
        if found.block_bytes != PAGE_BYTES or found.num_bytes != _block_bytes(layout, block):
            raise DamagedArtifact(f"{path} is of another block", fix=f"remove {path.with_suffix('')} and query again")
        parts.append(found.checksums)
        size += _pages(layout, block) * PAGE_BYTES
    return ChecksumList(PAGE_BYTES, size, np.concatenate(parts))


class NeighborTable:
    """A mapped table, or one behind a URL; files are opened when their rows are first read, and pages verified."""

    def __init__(
        self, path: Path, manifest: Manifest, layout: TableLayout, stored: StoredArtifact | None = None
    ) -> None:
        self.path, self.manifest, self.layout = path, manifest, layout
        self._firsts = np.array([block.first for block in layout.blocks], np.int64)
        self._files: dict[int, CheckedContent | StoredBlocks] = {}
        self._stored = stored
        self._random = False
        self._pages_before = np.cumsum([0, *(_pages(layout, block) for block in layout.blocks)], dtype=np.int64)
        self._checksums = self._opened_checksums()

    @classmethod
    def open(cls, path: str | Path) -> NeighborTable:
        """Map a finished table, or open one behind a URL; every file must have its size."""
        stored = StoredArtifact(str(path)) if is_url(path) else None
        where = Path(path) if stored is None else stored.copy
        manifest = read_manifest(where, kind=KIND, version=VERSION)
        config = manifest.config
        layout = TableLayout(
            config["saved"], tuple((first, last) for first, last in config["row_ranges"]), config["block_rows"]
        )
        names = {block.name for block in layout.blocks}
        if not names <= set(manifest.files):
            raise ArtifactError(f"{where} lacks blocks", got=sorted(names - set(manifest.files))[0], fix=_REMEDY)
        if stored is not None and CHECKSUMS_FILE in manifest.files:
            stored.copied(CHECKSUMS_FILE, manifest.files[CHECKSUMS_FILE])
        elsewhere = names if stored is not None else ()
        require_recorded(where, manifest, fix=_REMEDY, read_in_parts=names, optional=elsewhere)
        return cls(where, manifest, layout, stored)

    def _opened_checksums(self) -> NDArray[np.uint32] | None:
        """The checksums of all pages; None of a table that was written without."""
        if CHECKSUMS_FILE not in self.manifest.files:
            return None
        path = self.path / CHECKSUMS_FILE
        found = ChecksumList.parse(map_file(path), path)
        if found.block_bytes != PAGE_BYTES or len(found.checksums) != self._pages_before[-1]:
            raise DamagedArtifact(f"{path} is of another table", fix=_REMEDY)
        return found.checksums

    def expect_random_reads(self) -> None:
        """Say before the first read that rows will be read here and there, as shuffled samples read them."""
        self._random = True

    @property
    def traffic(self) -> Traffic:
        """What was read from an object store."""
        return sum((file.traffic for file in self._files.values() if isinstance(file, StoredBlocks)), Traffic())

    @property
    def num_saved(self) -> int:
        """Ids in a row."""
        return self.layout.saved

    @property
    def row_ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges of rows that the table has."""
        return self.layout.row_ranges

    @property
    def fingerprint(self) -> str:
        """Identity of the table and of all that it was made from; whether its pages have checksums is none of it."""
        files = {name: record for name, record in self.manifest.files.items() if name != CHECKSUMS_FILE}
        return replace(self.manifest, files=files).fingerprint

    @property
    def corpus_fingerprint(self) -> str:
        """The token file whose query chunks the rows are."""
        return self.manifest.inputs["corpus"]

    @property
    def database_fingerprint(self) -> str:
        """The chunk database that the ids point into."""
        return self.manifest.inputs["database"]

    def rows(self, first: int, last: int) -> NDArray[np.int64]:
        """Ids of the rows [first, last), -1 for none."""
        return unpack_ids(self.packed_rows(first, last))

    def packed_rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """The stored bytes [last - first, saved * 5] of rows; a view when they lie in one block."""
        parts = list(self._parts(first, last))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros((0, self.num_saved * ID_BYTES), np.uint8)

    def _parts(self, first: int, last: int) -> Iterator[NDArray[np.uint8]]:
        row = first
        while row < last:
            number = int(np.searchsorted(self._firsts, row, side="right")) - 1
            block = self.layout.blocks[number] if number >= 0 else None
            if block is None or row >= block.last:
                raise DataError(
                    f"{self.path} has no neighbours of query chunk {row}", expected=f"rows within {self.row_ranges}"
                )
            width = self.num_saved * ID_BYTES
            start, stop = row - block.first, min(last, block.last) - block.first
            yield self._opened(number).read(start * width, stop * width).reshape(-1, width)
            row = block.first + stop

    def _opened(self, number: int) -> CheckedContent | StoredBlocks:
        if number not in self._files:
            name, checksums = self.layout.blocks[number].name, None
            if self._checksums is not None:
                checksums = self._checksums[self._pages_before[number] : self._pages_before[number + 1]]
            self._files[number] = (
                self._mapped(name, checksums)
                if self._stored is None
                else StoredBlocks(
                    self._stored, name, self.manifest.files[name].bytes, checksums, PAGE_BYTES, _STORED_BLOCK_BYTES
                )
            )
        return self._files[number]

    def _mapped(self, name: str, checksums: NDArray[np.uint32] | None) -> CheckedContent:
        content = map_file(self.path / name)
        if self._random:
            expect_random_reads(content)
        if checksums is None:
            require_whole(self.path, self.manifest, name, fix=_REMEDY)
            checksums = np.zeros(0, np.uint32)
        return CheckedContent(self.path / name, content, checksums, PAGE_BYTES)


def _block_bytes(layout: TableLayout, block: TableBlock) -> int:
    return (block.last - block.first) * layout.saved * ID_BYTES


def _pages(layout: TableLayout, block: TableBlock) -> int:
    return -(-_block_bytes(layout, block) // PAGE_BYTES)


def covered(row_ranges: Sequence[tuple[int, int]], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The parts of [first, last) that lie in the ranges."""
    cut = ((max(first, start), min(last, stop)) for start, stop in row_ranges)
    return tuple((start, stop) for start, stop in cut if start < stop)
