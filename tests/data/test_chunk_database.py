"""The chunk database agrees with cutting every document by hand, in C++ and in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.native import extension
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.testing.corpora import random_documents, write_reference_token_file

EOD = 999


def corpus(prefix: Path, documents: Sequence[list[int]], dtype: str = "uint16", ended: bool = True) -> Path:
    tail = [EOD] if ended else []
    write_reference_token_file(prefix, [[d + tail] if d else [] for d in documents], dtype)
    return prefix


def by_hand(corpora: Sequence[Sequence[list[int]]], length: int, retrieved: int) -> list[tuple[int, list[int]]]:
    """Global document and tokens with continuation of every chunk."""
    documents = [document for documents in corpora for document in documents]
    return [
        (number, document[start : start + retrieved])
        for number, document in enumerate(documents)
        for start in range(0, len(document), length)
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([1, 4, 64]), st.booleans(), st.booleans())
def test_ids_documents_and_tokens_are_those_cut_by_hand(
    tmp_path: Path, seed: int, parts: int, length: int, mixed: bool, ended: bool
) -> None:
    corpora = [random_documents(seed + 7 * part, 8, 3 * length) for part in range(parts)]
    corpora[0].append([5] * (length + 1))
    prefixes = [
        corpus(tmp_path / str(part), documents, "int32" if mixed and part else "uint16", ended)
        for part, documents in enumerate(corpora)
        if any(documents) or not ended
    ]
    corpora = [documents for documents in corpora if any(documents) or not ended]
    if len({TokenFile(prefix).fingerprint for prefix in prefixes}) < len(prefixes):
        return
    database = ChunkDatabase.create(tmp_path / "db", prefixes, length, eod=EOD if ended else None, replace=True)
    expected = by_hand(corpora, length, 2 * length)
    assert database.num_chunks == len(expected)
    ids = np.arange(-1, len(expected))
    assert database.document_of(ids[1:]).tolist() == [document for document, _ in expected]
    for tokens, mask in (database.gather(ids, 2 * length), database.gather_plainly(ids, 2 * length)):
        assert tokens.dtype == (np.int32 if mixed and len(prefixes) > 1 else np.uint16)
        assert not mask[0].any() and not tokens[0].any()
        for row, kept, (_, wanted) in zip(tokens[1:], mask[1:], expected, strict=True):
            assert row[kept].tolist() == wanted and kept[: len(wanted)].all() and not row[~kept].any()
    again = ChunkDatabase.open(tmp_path / "db")
    assert again.fingerprint == database.fingerprint


def test_the_compiled_half_is_what_runs_here() -> None:
    if extension() is None:
        pytest.skip("csrc/host is not built: the tests here compare NumPy with itself")


def test_gather_keeps_any_shape_and_threads_change_nothing(tmp_path: Path) -> None:
    documents = random_documents(3, 400)
    database = ChunkDatabase.create(tmp_path / "db", [corpus(tmp_path / "a", documents)], 64, eod=EOD)
    ids = np.random.default_rng(0).integers(-1, database.num_chunks, (7, 50, 3))
    one, many = database.gather(ids, 128), database.gather(ids, 128, threads=4)
    assert one[0].shape == (7, 50, 3, 128) and (one[0] == many[0]).all() and (one[1] == many[1]).all()


def test_document_ranges_make_a_part_of_a_corpus_a_database(tmp_path: Path) -> None:
    documents = [d or [1] for d in random_documents(5, 30)]
    prefix = corpus(tmp_path / "a", documents)
    database = ChunkDatabase.create(tmp_path / "db", [prefix], 64, eod=EOD, document_ranges=[(10, 25)])
    expected = by_hand([documents[10:25]], 64, 64)
    tokens, mask = database.gather(np.arange(database.num_chunks), 64)
    assert [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)] == [t for _, t in expected]
    mine = TokenFile(prefix).fingerprint
    first, last = database.map_documents(mine, np.array([0, 5, 12, 24, 27]), np.array([3, 12, 14, 30, 28]))
    assert list(zip(first, last, strict=True)) == [(0, 0), (0, 2), (2, 4), (14, 15), (15, 15)]
    nowhere = database.map_documents("other", np.array([3]), np.array([9]))
    assert [one.tolist() for one in nowhere] == [[0], [0]]


def test_unknown_ids_are_refused(tmp_path: Path) -> None:
    database = ChunkDatabase.create(tmp_path / "db", [corpus(tmp_path / "a", [[1] * 100])], 64, eod=EOD)
    for ids in ([2], [-2]):
        with pytest.raises(DataError, match="no such chunk"):
            database.gather(np.array(ids), 64)
    with pytest.raises(DataError, match="no such chunk"):
        database.document_of(np.array([-1]))


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "a", [[1, 2, 3], [4]])
    ChunkDatabase.create(tmp_path / "db", [prefix], 64, eod=EOD)
    corpus(tmp_path / "a", [[1, 2, 9], [4]])
    with pytest.raises(ArtifactError, match="does not match"):
        ChunkDatabase.open(tmp_path / "db")


def test_a_database_moves_with_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    prefix = corpus(tmp_path / "x" / "a", [[1, 2, 3], [4]])
    made = ChunkDatabase.create(tmp_path / "x" / "db", [prefix], 2, eod=EOD)
    (tmp_path / "x").rename(tmp_path / "y")
    assert ChunkDatabase.open(tmp_path / "y" / "db").fingerprint == made.fingerprint


def test_what_cannot_be_a_database_is_named(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "a", [[1, 2, 3]], ended=False)
    with pytest.raises(DataError, match=r"no document of .* ends with"):
        ChunkDatabase.create(tmp_path / "db", [prefix], 64, eod=EOD)
    assert not (tmp_path / "db").exists()
    with pytest.raises(DataError, match="listed twice"):
        ChunkDatabase.create(tmp_path / "db", [prefix, prefix], 64, eod=None)
    with pytest.raises(ConfigError):
        ChunkDatabase.create(tmp_path / "db", [prefix], 0, eod=None)
    with pytest.raises(DataError, match="no documents"):
        ChunkDatabase.create(tmp_path / "db", [prefix], 64, eod=None, document_ranges=[(0, 2)])


def test_an_end_of_document_id_in_the_middle_stays(tmp_path: Path) -> None:
    database = ChunkDatabase.create(tmp_path / "db", [corpus(tmp_path / "a", [[1, EOD, 2, EOD]])], 8, eod=EOD)
    tokens, mask = database.gather(np.array([0]), 8)
    assert tokens[mask].tolist() == [1, EOD, 2, EOD]
