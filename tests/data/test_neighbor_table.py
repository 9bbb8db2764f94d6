"""Neighbour tables give back what was written, block by block, and notice what changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.artifacts.manifest import damage
from megatron_retro.data import neighbor_table
from megatron_retro.data.neighbor_table import (
    MAX_ID,
    NONE,
    NeighborTable,
    TableLayout,
    block_is_done,
    covered,
    finish_table,
    pack_ids,
    unpack_ids,
    write_block,
)
from megatron_retro.errors import ArtifactError, DataError

INPUTS = {"corpus": "c", "database": "d"}


def make(path: Path, layout: TableLayout, rows: dict[int, np.ndarray]) -> NeighborTable:
    work = path.with_name("work")
    for block in reversed(layout.blocks):
        ids = np.stack([rows[row] for row in range(block.first, block.last)])
        write_block(work, layout, block, ids)
    finish_table(work, path, layout, inputs=INPUTS, config={"embedder": "hashed"})
    return NeighborTable.open(path)


def random_rows(layout: TableLayout) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        row: generator.choice([NONE, 0, 1, MAX_ID, 123_456_789_012], layout.saved)
        for first, last in layout.row_ranges
        for row in range(first, last)
    }


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_rows_are_those_written_across_blocks_and_ranges(tmp_path: Path, block_rows: int) -> None:
    layout = TableLayout(20, ((3, 50), (50, 61), (100, 130)), block_rows)
    rows = random_rows(layout)
    table = make(tmp_path / "t", layout, rows)
    assert table.num_saved == 20 and table.row_ranges == layout.row_ranges
    for first, last in ((3, 61), (5, 6), (100, 130), (48, 53), (10, 10)):
        assert (table.rows(first, last) == np.array([rows[r] for r in range(first, last)]).reshape(-1, 20)).all()
    for first, last in ((0, 4), (60, 62), (99, 101), (130, 131)):
        with pytest.raises(DataError, match="no neighbours of query chunk"):
            table.rows(first, last)
    assert damage(table.path, table.manifest) == []


def test_an_id_takes_five_bytes_little_endian() -> None:
    assert pack_ids(np.array([[1, NONE]])).tobytes() == b"\1\0\0\0\0\xff\xff\xff\xff\xff"
    assert unpack_ids(pack_ids(np.array([[MAX_ID, 0, NONE]]))).tolist() == [[MAX_ID, 0, NONE]]
    for wrong in (MAX_ID + 1, -2):
        with pytest.raises(DataError, match="does not fit"):
            pack_ids(np.array([[wrong]]))


def test_damage_is_noticed(tmp_path: Path) -> None:
    layout = TableLayout(2, ((0, 10),), 4)
    table = make(tmp_path / "t", layout, random_rows(layout))
    path = tmp_path / "t" / layout.blocks[1].name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    assert any("checksum" in problem for problem in damage(table.path, table.manifest))
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="is cut or replaced"):
        NeighborTable.open(tmp_path / "t")


def test_unfinished_tables_are_not_published(tmp_path: Path) -> None:
    layout = TableLayout(2, ((0, 10),), 4)
    write_block(tmp_path / "work", layout, layout.blocks[0], np.zeros((4, 2), np.int64))
    assert block_is_done(tmp_path / "work", layout, layout.blocks[0])
    assert not block_is_done(tmp_path / "work", layout, layout.blocks[1])
    with pytest.raises(ArtifactError, match="lacks 2 blocks"):
        finish_table(tmp_path / "work", tmp_path / "t", layout, inputs=INPUTS, config={})
    with pytest.raises(DataError, match="wrong shape"):
        write_block(tmp_path / "work", layout, layout.blocks[1], np.zeros((4, 3), np.int64))
    assert not (tmp_path / "t").exists()


def test_a_table_may_be_published_while_a_worker_looks_at_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's rename takes the folder between two looks."""
    layout = TableLayout(2, ((0, 10),), 4)
    write_block(tmp_path / "work", layout, layout.blocks[0], np.zeros((4, 2), np.int64))
    look = os.stat

    def late(path: Path, **how: Any) -> os.stat_result:
        found = look(path, **how)
        if str(path).endswith(".ids") and (tmp_path / "work").exists():
            (tmp_path / "work").rename(tmp_path / "published")
        return found

    monkeypatch.setattr(os, "stat", late)
    assert block_is_done(tmp_path / "work", layout, layout.blocks[0])
    assert (tmp_path / "published").exists()
    assert not block_is_done(tmp_path / "work", layout, layout.blocks[0])


def test_a_late_worker_does_not_disturb_who_finishes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary file goes by itself while the rest is cleared, and another one comes before the manifest."""
    layout = TableLayout(2, ((0, 10),), 4)
    rows, work = random_rows(layout), tmp_path / "work"
    late, later = work / "rows.partial-elsewhere-1", work / "rows.partial-elsewhere-2"
    listed, write = Path.iterdir, neighbor_table.write_file

    def leaving(self: Path) -> Iterator[Path]:
        if self == work:
            late.touch()
        for path in list(listed(self)):
            late.unlink(missing_ok=True)
            yield path

    def coming(path: Path, content: bytes) -> None:
        if path.name == neighbor_table.CHECKSUMS_FILE:
            later.touch()
        write(path, content)

    monkeypatch.setattr(Path, "iterdir", leaving)
    monkeypatch.setattr(neighbor_table, "write_file", coming)
    table = make(tmp_path / "t", layout, rows)
    names = {block.name for block in layout.blocks} | {neighbor_table.CHECKSUMS_FILE}
    assert set(table.manifest.files) == names and damage(table.path, table.manifest) == []
    assert (table.rows(0, 10) == np.array([rows[row] for row in range(10)])).all()


@pytest.mark.parametrize("ranges", [((5, 3),), ((0, 4), (3, 6)), ((4, 6), (0, 2)), ((1, 1),)])
def test_ranges_that_overlap_or_fall_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(DataError, match="row ranges"):
        TableLayout(2, ranges)


def test_coverage_is_an_intersection() -> None:
    assert covered(((0, 10), (20, 30)), 5, 25) == ((5, 10), (20, 25))
    assert covered(((0, 10),), 10, 20) == ()
