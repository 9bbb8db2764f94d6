"""No number that stands in a file is trusted: a damaged index or chunk database is a named error, never a crash.

Each case damages one number under an open map, as a bad disk does, and reads everything in a forked process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.data.chunk_database import COUNTS_FILE, ChunkDatabase
from megatron_retro.data.neighbor_table import pack_ids
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.testing.corpora import write_documents

EOD, LENGTH = 256, 16
EDGES = (-1, 0, 1, -(1 << 63), (1 << 63) - 1, -(1 << 40), 1 << 40, 1 << 31, 7)
NAMED, CRASHED, READ = 3, -1, 0


@pytest.fixture
def database(tmp_path: Path) -> ChunkDatabase:
    random = np.random.default_rng(1)
    documents = [[*random.integers(0, 256, size).tolist(), EOD] for size in random.integers(0, 120, 40)]
    write_documents(tmp_path / "corpus", documents)
    return ChunkDatabase.create(tmp_path / "database", [tmp_path / "corpus"], LENGTH, eod=EOD)


def outcome(work: Callable[[], object]) -> int:
    """READ, NAMED for an error with a name, another exit status for any other error, CRASHED for a signal."""
    child = os.fork()
    if child == 0:
        status = 4
        try:
            work()
            status = READ
        except (ArtifactError, DataError):
            status = NAMED
        finally:
            os._exit(status)
    _, code = os.waitpid(child, 0)
    return CRASHED if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def read_everything(database: ChunkDatabase) -> None:
    """Every chunk, every token's document, and neighbours that are left after some documents are excluded."""
    ids = np.arange(-1, database.num_chunks)
    database.gather(ids, 2 * LENGTH)
    database.document_of(ids[1:])
    file = database.files[0]
    file.documents_of(np.arange(file.num_tokens))
    if database.native is not None:
        packed, excluded = pack_ids(ids[1:].reshape(-1, 1)), np.array([[3, 5]])
        database.native.select(packed, excluded, 1, np.array([1 << 62], np.uint64), False, 1)


def damaged(path: Path, place: int, number: int) -> bytes:
    """Write a 64-bit number over another one; returns what stood there."""
    with path.open("r+b") as stream:
        stream.seek(place)
        before = stream.read(8)
        stream.seek(place)
        stream.write(struct.pack("<q", number))
    return before


def places(database: ChunkDatabase) -> list[tuple[Path, int]]:
    """Where numbers stand that lead to tokens: byte offsets and boundaries of the index, counts of the database."""
    index = database.files[0].index
    pointers_at = 34 + 4 * index.num_sequences
    documents_at = pointers_at + 8 * index.num_sequences
    idx, counts = Path(f"{database.files[0].prefix}.idx"), database.path / COUNTS_FILE
    found = [(idx, pointers_at + 8 * number) for number in range(0, index.num_sequences, 5)]
    found += [(idx, documents_at + 8 * number) for number in range(0, len(index.documents), 5)]
    return found + [(counts, 8 * number) for number in range(0, database.num_documents, 5)]


@pytest.mark.parametrize("native", [True, False])
def test_a_damaged_number_is_named(database: ChunkDatabase, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("megatron_retro.data.chunk_database.extension", lambda: None)
        monkeypatch.setattr("megatron_retro.data.token_file.extension", lambda: None)
    elif database.native is None:
        pytest.skip("built without a compiler")
    assert outcome(lambda: read_everything(database)) == READ
    found = {}
    for path, place in places(database):
        for number in EDGES:
            before = damaged(path, place, number)
            found[path.name, place, number] = outcome(lambda: read_everything(database))
            with path.open("r+b") as stream:
                stream.seek(place)
                stream.write(before)
    wrong = {case: status for case, status in found.items() if status not in (READ, NAMED)}
    assert not wrong, f"{len(wrong)} of {len(found)}: {list(wrong.items())[:5]}"
    assert sum(status == NAMED for status in found.values()) > len(found) // 2
