"""Samples, their neighbours and their order: pure functions of the settings, whatever the cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_retro.config.settings import Settings
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.dataset import Dataset
from megatron_retro.data.neighbor_table import (
    NONE,
    NeighborTable,
    TableLayout,
    finish_table,
    unpack_ids,
    write_block,
)
from megatron_retro.data.neighbor_transforms import ThinnedDatabase
from megatron_retro.data.neighbors import NeighborReader
from megatron_retro.data.order import mix
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.testing.corpora import write_reference_token_file
from megatron_retro.testing.sample_corpora import EOD, LENGTH, config, corpus, retro_config, same, table


def test_labels_follow_tokens_and_an_epoch_has_every_sample_once(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a")
    dataset = build_dataset(config([file.prefix]), "train", eod=EOD)
    total = dataset.num_samples
    assert total == (file.num_tokens - 1) // (4 * LENGTH)
    batch = dataset.read(range(2 * total))
    rows = [tuple(row) for row in np.concatenate([batch.tokens_BS, batch.labels_BS[:, -1:]], axis=1).tolist()]
    wanted = [tuple(file.stream[s * 32 : s * 32 + 33].tolist()) for s in range(total)]
    assert sorted(rows[:total]) == sorted(wanted) == sorted(rows[total:]) and rows[:total] != rows[total:]
    assert (batch.tokens_BS[:, 1:] == batch.labels_BS[:, :-1]).all() and batch.tokens_BS.dtype == np.uint16
    assert batch.neighbors is None and batch.loss_mask_BS.all()


def test_splits_share_no_token_and_no_label(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a")
    seen: dict[int, str] = {}
    for split in ("train", "valid", "test"):
        dataset = build_dataset(config([file.prefix], split="6,3,1"), split, eod=EOD)
        samples = dataset.sources[0].samples
        chunks = samples.first_chunks(np.arange(samples.num_samples))
        for start in chunks * LENGTH:
            for token in range(start, start + 33):
                assert seen.setdefault(int(token), split) == split
    assert len(set(seen.values())) == 3


@pytest.mark.parametrize("shift", [False, True])
def test_epochs_may_start_at_other_chunks(tmp_path: Path, shift: bool) -> None:
    file = corpus(tmp_path / "a")
    samples = build_dataset(config([file.prefix], epoch_chunk_offset=shift), "train", eod=EOD).sources[0].samples
    chunks = samples.first_chunks(np.arange(12 * samples.num_samples)).reshape(12, -1)
    offsets = {tuple(set((epoch % 4).tolist())) for epoch in chunks}
    assert (len(offsets) > 1) == shift and all(len(offset) == 1 for offset in offsets)
    assert (chunks.max() + 4) * LENGTH < file.num_tokens
    assert all(len(set(epoch.tolist())) == samples.num_samples for epoch in chunks)


def by_hand(file: TokenFile, neighbors: NeighborReader, chunk: int, count: int) -> list[list[int]]:
    """The same-document rule, one neighbour at a time."""
    documents = {file.document_of(token) for token in range(chunk * LENGTH, (chunk + count) * LENGTH + 1)}
    database = neighbors.database
    corpora = zip(database.corpora, database.documents_before.tolist(), strict=False)
    first = next((before for corpus, before in corpora if corpus.fingerprint == file.fingerprint), None)
    found = []
    for row in neighbors.table.rows(chunk, chunk + count).tolist():
        legal = [
            id
            for id in row
            if id != NONE and (first is None or int(database.document_of(np.array(id))) - first not in documents)
        ]
        found.append(([*legal, NONE, NONE])[:2])
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([3, 12, 60]))
def test_no_neighbour_comes_from_a_document_of_the_sample(
    tmp_path_factory: pytest.TempPathFactory, seed: int, longest: int
) -> None:
    folder = tmp_path_factory.mktemp("same")
    file = corpus(folder / "a", seed, 60, longest)
    if file.num_tokens < 40:
        return
    dataset = build_dataset(retro_config(folder, file), "train", eod=EOD)
    source = dataset.sources[0]
    assert source.neighbors is not None
    chunks = source.samples.first_chunks(np.arange(source.samples.num_samples))
    chosen = source.neighbors.select(chunks, 4)
    assert chosen.tolist() == [by_hand(file, source.neighbors, int(chunk), 4) for chunk in chunks]
    own = np.array([[file.document_of(int(c) * LENGTH), file.document_of((int(c) + 4) * LENGTH) + 1] for c in chunks])
    packed = np.stack([source.neighbors.table.packed_rows(int(c), int(c) + 4) for c in chunks])
    plain = source.neighbors.select_plainly(unpack_ids(packed), own[:, 0], own[:, 1])
    assert (plain == chosen).all()


def test_the_last_chunk_of_the_document_before_is_legal_and_the_labels_document_is_not(tmp_path: Path) -> None:
    """A sample that ends where document 2 begins: its last label is document 2's first token."""
    documents = [[1] * 8, [2] * 32, [3] * 16, [4] * 8]
    write_reference_token_file(tmp_path / "a", [[d] for d in documents], "uint16")
    file = TokenFile(tmp_path / "a")
    database = ChunkDatabase.create(tmp_path / "db", [file.prefix], LENGTH, eod=None)
    layout = TableLayout(3, ((0, 8),))
    of_document = {0: 0, 1: 1, 2: 5, 3: 7}
    row = [of_document[2], of_document[1], of_document[0]]
    write_block(tmp_path / "w", layout, layout.blocks[0], np.array([row] * 8))
    inputs = {"corpus": file.fingerprint, "database": database.fingerprint}
    finish_table(tmp_path / "w", tmp_path / "t", layout, inputs=inputs, config={})
    reader = NeighborReader(file, NeighborTable.open(tmp_path / "t"), database, LENGTH, 2, 2 * LENGTH)
    assert reader.select(np.array([1]), 4).tolist() == [[[0, NONE]] * 4]
    assert reader.select(np.array([0]), 4).tolist() == [[[5, NONE]] * 4]


def test_a_corpus_outside_the_database_excludes_nothing(tmp_path: Path) -> None:
    file, other = corpus(tmp_path / "a"), corpus(tmp_path / "b", 99)
    database = ChunkDatabase.create(tmp_path / "db", [other.prefix], LENGTH, eod=EOD)
    reader = NeighborReader(file, table(tmp_path / "t", file, database), database, LENGTH, 2, 2 * LENGTH)
    chosen = reader.select(np.array([0, 4]), 4)
    rows = [[id for id in row if id != NONE][:2] for row in reader.table.rows(0, 8).tolist()]
    assert [[id for id in row if id != NONE] for row in chosen.reshape(8, 2).tolist()] == rows


@pytest.mark.parametrize("by_chunk", [False, True])
def test_kept_shares_are_nested_and_as_large_as_asked(tmp_path: Path, by_chunk: bool) -> None:
    file = corpus(tmp_path / "a", count=3000, longest=20)
    database = ChunkDatabase.create(tmp_path / "db", [file.prefix], LENGTH, eod=EOD)
    made = table(tmp_path / "t", file, database)
    chunks = np.arange(database.num_chunks)
    documents = database.document_of(chunks)
    shares = (0.0, 0.125, 0.25, 0.5, 1.0)
    kept = [ThinnedDatabase(share, by_chunk).keeps(database, chunks, documents) for share in shares]
    assert all((smaller <= larger).all() for smaller, larger in itertools.pairwise(kept))
    assert not kept[0].any() and kept[-1].all()
    assert [mask.mean() for mask in kept] == pytest.approx(shares, abs=0.05)
    whole = [len(np.unique(kept[2][documents == document])) == 1 for document in np.unique(documents)]
    assert all(whole) != by_chunk
    for share, mask in zip(shares, kept, strict=True):
        reader = NeighborReader(file, made, database, LENGTH, 2, 2 * LENGTH, (ThinnedDatabase(share, by_chunk),))
        ids = reader.select(np.arange(0, 80, 4), 4)
        assert mask[ids[ids != NONE]].all() and (ids != NONE).any() == (share > 0)


def test_corpora_of_a_database_are_thinned_each_by_its_own_share(tmp_path: Path) -> None:
    """Composition by source, against the rule written out; the compiled choice and the plain one agree."""
    files = [corpus(tmp_path / name, number, count=400) for number, name in enumerate("abc")]
    database = ChunkDatabase.create(tmp_path / "db", [file.prefix for file in files], LENGTH, eod=EOD)
    made, chunks = table(tmp_path / "table", files[0], database), np.arange(database.num_chunks)
    owner = np.searchsorted(database.documents_before, database.document_of(chunks), side="right") - 1
    for by_chunk in (False, True):
        numbers = chunks if by_chunk else database.document_of(chunks)
        shares = np.array([1.0, 0.0, 0.25])[owner] * 0.5
        wanted = np.array([mix(int(number)) / 2**64 for number in numbers]) < shares
        thinned = ThinnedDatabase(0.5, by_chunk, (1.0, 0.0, 0.25))
        assert (thinned.keeps(database, chunks, database.document_of(chunks)) == wanted).all()
        reader = NeighborReader(files[0], made, database, LENGTH, 2, 2 * LENGTH, (thinned,))
        firsts = np.arange(0, 200, 4)
        chosen = reader.select(firsts, 4)
        assert wanted[chosen[chosen != NONE]].all() and (chosen != NONE).any()
        packed = np.stack([made.packed_rows(int(first), int(first) + 4) for first in firsts])
        own = np.array([[files[0].document_of(int(f) * 8), files[0].document_of(int(f) * 8 + 32) + 1] for f in firsts])
        assert (reader.select_plainly(unpack_ids(packed), own[:, 0], own[:, 1], thinned) == chosen).all()
    settings = retro_config(
        tmp_path, files[0], database_corpus_fractions=(0.5, 1.0), database_path=str(tmp_path / "db")
    )
    with pytest.raises(ConfigError, match=r"one share per corpus of the database\s+got: +2"):
        build_dataset(settings, "train", eod=EOD)


def test_samples_come_only_from_rows_that_the_table_has(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a", count=400)
    database = ChunkDatabase.create(tmp_path / "db", [file.prefix], LENGTH, eod=EOD)
    table(tmp_path / "table", file, database, rows=((3, 50), (60, 61), (100, 190)))
    dataset = build_dataset(retro_config(tmp_path, file), "train", eod=EOD)
    samples = dataset.sources[0].samples
    chunks = sorted(samples.first_chunks(np.arange(samples.num_samples)).tolist())
    assert chunks == [*range(3, 47, 4), *range(100, 187, 4)]
    assert dataset.read(range(samples.num_samples)).neighbors is not None


def test_neighbour_tokens_stand_where_the_model_reads_them(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a")
    dataset = build_dataset(retro_config(tmp_path, file), "train", eod=EOD)
    batch = dataset.read(range(6))
    source = dataset.sources[0]
    assert source.neighbors is not None and batch.neighbors is not None
    ids = source.neighbors.select(source.samples.first_chunks(np.arange(6)), 4)
    assert batch.neighbors.tokens_BCKR.shape == (6, 4, 2, 2 * LENGTH)
    for place in np.ndindex(6, 4, 2):
        tokens, mask = source.neighbors.database.gather(ids[place], 2 * LENGTH)
        assert (batch.neighbors.tokens_BCKR[place] == tokens).all()
        assert (batch.neighbors.mask_BCKR[place] == mask).all()


BROKEN: list[tuple[str, Callable[[Path, TokenFile], Settings], type[Exception], str]] = [
    (
        "length",
        lambda p, f: retro_config(p, f, seq_length=4 * LENGTH + 1),
        ConfigError,
        "not a multiple of the chunk length",
    ),
    ("no documents", lambda p, f: config([f.prefix], split="0,1"), DataError, "has no train sample"),
    ("long samples", lambda p, f: config([f.prefix], seq_length=10**6 * LENGTH), DataError, "has no train sample"),
    ("split words", lambda p, f: config([f.prefix], split="a,b"), ConfigError, "--split"),
    ("split zero", lambda p, f: config([f.prefix], split="0,0,0"), ConfigError, "--split"),
    ("split minus", lambda p, f: config([f.prefix], split="-1,2"), ConfigError, "--split"),
    ("no path", lambda p, f: config([]), ConfigError, "--data-path"),
    ("absent", lambda p, f: config([p / "none"]), ArtifactError, "there is no file"),
    (
        "exhausted",
        lambda p, f: config([f.prefix], training={"train_iters": 1000}, max_data_epochs=1.5),
        DataError,
        "is exhausted before the run ends",
    ),
    (
        "tables",
        lambda p, f: retro_config(p, f, neighbor_path=("x", "y")),
        ConfigError,
        "one table per token file",
    ),
    ("no database", lambda p, f: retro_config(p, f, database_path=None), ConfigError, "needs --database-path"),
    (
        "neighbours",
        lambda p, f: retro_config(p, f, retro={"retro_num_neighbors": 7}),
        DataError,
        "too few neighbours per chunk",
    ),
    (
        "chunk length",
        lambda p, f: retro_config(p, f, retro={"retro_chunk_length": 4}),
        ArtifactError,
        "the chunk length does not match",
    ),
]


@pytest.mark.parametrize(("name", "make", "kind", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_settings_that_cannot_work_are_named(
    tmp_path: Path, name: str, make: Callable[[Path, TokenFile], Settings], kind: type[Exception], message: str
) -> None:
    file = corpus(tmp_path / "a")
    with pytest.raises(kind, match=message):
        build_dataset(make(tmp_path, file), "train", eod=EOD)


def test_a_table_of_another_corpus_or_database_is_refused(tmp_path: Path) -> None:
    file, other = corpus(tmp_path / "a"), corpus(tmp_path / "b", 1)
    setting = retro_config(tmp_path, file)
    with pytest.raises(ArtifactError, match="the corpus does not match"):
        build_dataset(setting.replace(data_path=(other.prefix,)), "train", eod=EOD)
    ChunkDatabase.create(tmp_path / "db2", [other.prefix], LENGTH, eod=EOD)
    with pytest.raises(ArtifactError, match="the database does not match"):
        build_dataset(setting.replace(database_path=str(tmp_path / "db2")), "train", eod=EOD)


def test_reading_is_the_same_without_the_compiled_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = corpus(tmp_path / "a")
    setting = retro_config(tmp_path, file, reset_attention_mask=True, database_keep_fraction=0.7)

    def read() -> Microbatch[Array]:
        dataset: Dataset = build_dataset(setting, "train", eod=EOD)
        return dataset.read(range(40))

    compiled = read()
    for module in ("token_file", "chunk_database"):
        monkeypatch.setattr(f"megatron_retro.data.{module}.extension", lambda: None)
    assert same(compiled, read())
