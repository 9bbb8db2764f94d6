"""A build finds what exact search finds, never a query's own documents, and the same bytes however it is shared."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.config.settings import Settings
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval import index_choice, index_search
from megatron_retro.retrieval.embedders import HashedEmbedder
from megatron_retro.retrieval.index_building import open_merged
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.retrieval.work_blocks import recompute
from megatron_retro.testing.retrieval_projects import (
    CHUNK,
    EOD,
    cut_chunks,
    echoing_documents,
    owners_of_tokens,
    project_settings,
    write_corpus,
)

Documents = list[list[int]]
TASKS = ["train", "encode", "merge", "query"]


def build(settings: Settings) -> Path:
    build_retrieval(settings)
    return Path(settings.values()["retrieval"]["retro_project_dir"])


def table_of(root: Path, name: str = "corpus") -> tuple[NeighborTable, np.ndarray]:
    table = NeighborTable.open(root / "neighbors" / name)
    return table, np.concatenate([table.rows(first, last) for first, last in table.row_ranges])


def exact_distances(queries: Documents, database: Documents) -> tuple[np.ndarray, np.ndarray]:
    """All squared distances, infinite where a chunk is of a document of the query chunk or of the next; by hand."""
    chunks = cut_chunks(database)
    stream = np.concatenate([[*document, EOD] for document in queries])
    owners = owners_of_tokens(queries)
    rows = len(stream) // CHUNK
    embedder = HashedEmbedder(64)
    grid = stream[: rows * CHUNK].reshape(-1, CHUNK)
    padded = np.array([tokens + [0] * (CHUNK - len(tokens)) for _, tokens in chunks])
    there = np.array([[place < len(tokens) for place in range(CHUNK)] for _, tokens in chunks])
    left = embedder.embed(grid, grid != EOD).astype(np.float64)
    right = embedder.embed(padded, there).astype(np.float64)
    distances = np.square(left[:, None] - right[None]).sum(axis=2)
    own = np.zeros(distances.shape, bool)
    if queries is database:
        for row in range(rows):
            mine = set(owners[row * CHUNK : (row + 2) * CHUNK].tolist())
            own[row] = [document in range(min(mine), max(mine) + 1) for document, _ in chunks]
    return np.where(own, np.inf, distances), own


def assert_nearest(ids: np.ndarray, distances: np.ndarray) -> None:
    """Each row holds the nearest allowed chunks in order, modulo ties; -1 only when there are no more."""
    for row in range(len(ids)):
        found = ids[row][ids[row] >= 0]
        allowed = np.sort(distances[row][np.isfinite(distances[row])])
        assert len(found) == min(len(allowed), ids.shape[1])
        assert len(set(found)) == len(found)
        assert np.isfinite(distances[row, found]).all(), "a neighbour is from the query's own documents"
        assert np.allclose(distances[row, found], allowed[: len(found)], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["lists", "queries"])
def test_an_exact_index_gives_exact_neighbors(tmp_path: Path, seed: int, method: str) -> None:
    documents = echoing_documents(seed, 40)
    held_out = echoing_documents(seed + 100, 6)
    corpus, other = write_corpus(tmp_path / "corpus", documents), write_corpus(tmp_path / "other", held_out)
    root = build(
        project_settings(
            tmp_path / "project",
            [corpus],
            retro_query_corpus=[corpus, f"held={other}"],
            retro_query_method=method,
            retro_block_size=53,
            retro_recall_floor=0.999,
        )
    )
    assert_nearest(table_of(root)[1], exact_distances(documents, documents)[0])
    assert_nearest(table_of(root, "held")[1], exact_distances(held_out, documents)[0])
    assert (root / "report" / "quality.html").exists()


def test_chunks_that_straddle_documents_avoid_both(tmp_path: Path) -> None:
    """The grid of the stream is not that of documents: one chunk holds the end of d-1 and the start of d."""
    passage = list(range(65, 65 + CHUNK))
    documents = [passage * 2 + [1, 2, 3], [4, 5] + passage * 3, [*passage, 9], [7] * 3, passage * 2]
    corpus = write_corpus(tmp_path / "corpus", documents)
    root = build(project_settings(tmp_path / "project", [corpus], retro_query_num_neighbors_save=20))
    _, ids = table_of(root)
    database = ChunkDatabase.open(root / "database")
    owners = owners_of_tokens(documents)
    straddling = 0
    for row in range(len(ids)):
        straddling += len(set(owners[row * CHUNK : (row + 1) * CHUNK])) > 1
        mine = set(owners[row * CHUNK : (row + 2) * CHUNK].tolist())  # and what the next chunk is of
        found = ids[row][ids[row] >= 0]
        assert not mine & set(database.document_of(found).tolist())
        assert len(found) == sum(document not in mine for document, _ in cut_chunks(documents))
    assert straddling >= 3


def test_a_database_of_one_document_leaves_every_neighbor_absent(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [[1, 2, 3] * 60])
    root = build(project_settings(tmp_path / "project", [corpus]))
    assert (table_of(root)[1] == -1).all()


@pytest.mark.parametrize("index_str", ["IVF8,Flat", "IVF8,SQ8", "OPQ8_32,IVF4_HNSW32,PQ8x4", "PCA32,IVF4,Flat"])
def test_the_merged_index_is_the_one_that_faiss_builds(tmp_path: Path, index_str: str) -> None:
    """Encoding in blocks and merging on disk changes nothing: same lists, same answers."""
    documents = echoing_documents(3, 250)
    corpus = write_corpus(tmp_path / "corpus", documents)
    root = build(
        project_settings(
            tmp_path / "project",
            [corpus],
            retro_index_str=index_str,
            retro_block_size=100,
            retro_tasks=TASKS[:3],
            retro_index_ntrain=10_000,
        )
    )
    merged = open_merged(root / "index" / "merged")
    database = ChunkDatabase.open(root / "database")
    embedder = HashedEmbedder(64)
    vectors = embedder.embed(*database.gather(np.arange(database.num_chunks), CHUNK))
    import faiss

    bare = faiss.read_index(str(root / "index" / "trained" / "trained.faiss"))
    bare.add(vectors)
    assert merged.ntotal == bare.ntotal == len(vectors)
    for index in (merged, bare):
        inner = faiss.try_extract_index_ivf(index)
        if inner is not None:
            inner.nprobe = 3
    expected, got = bare.search(vectors[:50], 10), merged.search(vectors[:50], 10)
    assert (expected[1] == got[1]).mean() > 0.99 and np.allclose(expected[0], got[0], atol=1e-5)
    if "PCA" not in index_str and "OPQ" not in index_str:
        assert (expected[1] == got[1]).all() and (expected[0] == got[0]).all()


def test_an_index_without_lists_is_filled_in_memory(tmp_path: Path) -> None:
    documents = echoing_documents(4, 60)
    corpus = write_corpus(tmp_path / "corpus", documents)
    root = build(project_settings(tmp_path / "project", [corpus], retro_index_str="HNSW32", retro_block_size=100))
    _, ids = table_of(root)
    distances, _ = exact_distances(documents, documents)
    found = np.take_along_axis(distances, np.maximum(ids, 0), axis=1)
    assert np.isfinite(found[ids >= 0]).all()
    worst = np.sort(distances, axis=1)[:, 1:2]
    assert (found[:, :2] <= worst + 1e-5).mean() > 0.95


@pytest.mark.parametrize("index_str", ["IVF8,Flat", "IVF8,SQ8", "PCA32,IVF4,PQ8x4"])
def test_list_by_list_finds_what_query_by_query_finds(tmp_path: Path, index_str: str) -> None:
    documents = echoing_documents(5, 200)
    corpus = write_corpus(tmp_path / "corpus", documents)
    tables = []
    for method in ("lists", "queries"):
        settings = project_settings(
            tmp_path / method,
            [corpus],
            retro_index_str=index_str,
            retro_index_ntrain=10_000,
            retro_query_method=method,
            retro_query_nprobe=3,
            retro_tasks=TASKS,
            retro_query_num_neighbors_query=2000,
        )
        tables.append(table_of(build(settings))[1])
    same = np.mean([len(set(left) & set(right)) / len(left) for left, right in zip(*tables, strict=True)])
    assert same > 0.99


@pytest.mark.parametrize("index_str", ["IVF1,Flat", "IVF8,SQ8"])
def test_rounded_products_find_the_same_neighbors(
    tmp_path: Path, index_str: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The join in bfloat16, taken or not, leaves the tables as they are but for rounding."""
    corpus, found = write_corpus(tmp_path / "corpus", echoing_documents(9, 300)), []
    for rounded in (False, True):
        monkeypatch.setattr(index_search, "has_fast_bfloat16", lambda rounded=rounded: rounded)
        settings = project_settings(
            tmp_path / str(rounded),
            [corpus],
            retro_index_str=index_str,
            retro_query_nprobe=8,
            retro_query_num_neighbors_query=6,
            retro_tasks=TASKS,
        )
        found.append(table_of(build(settings))[1])
    assert (found[0] == found[1]).mean() > 0.999


def files_under(root: Path) -> dict[str, bytes]:
    kept = [path for part in ("database", "index", "neighbors") for path in (root / part).rglob("*")]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in kept
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize(
    ("index_str", "part"), [("IVF8,Flat", 65_536), ("IVF8,Flat", 300), ("OPQ8_32,IVF4_HNSW32,PQ8x4", 300)]
)
def test_any_number_of_workers_in_any_order_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index_str: str, part: int
) -> None:
    """Where the sample is larger than a part, all workers cluster it."""
    monkeypatch.setattr(index_choice, "_PART_CHUNKS", part)
    documents = echoing_documents(8, 200)
    results = []
    for shards in (1, 2, 7):
        folder = tmp_path / str(shards)
        corpus = write_corpus(folder / "corpus", documents)
        settings = project_settings(
            folder / "project",
            [corpus],
            retro_index_str=index_str,
            retro_index_ntrain=10_000,
            retro_block_size=131,
            retro_keep_embeddings=True,
            retro_tasks=TASKS,
        )
        order = random.Random(shards).sample(range(shards), shards)
        failures: list[BaseException] = []

        def work(shard: int, settings: Settings = settings, shards: int = shards, failures: list = failures) -> None:
            try:
                build_retrieval(settings.replace(shard=f"{shard}/{shards}"))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(shard,)) for shard in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        results.append(files_under(folder / "project"))
    for left, right in itertools.pairwise(results):
        assert left.keys() == right.keys()
        assert [name for name in left if left[name] != right[name]] == []


def test_rows_of_ranges_are_those_of_the_whole_table(tmp_path: Path) -> None:
    documents = echoing_documents(2, 60)
    corpus = write_corpus(tmp_path / "corpus", documents)
    _, whole = table_of(build(project_settings(tmp_path / "whole", [corpus], retro_tasks=TASKS)))
    ranges = ["40:90", "3:17"]
    table, part = table_of(
        build(project_settings(tmp_path / "part", [corpus], retro_tasks=TASKS, retro_query_rows=ranges))
    )
    assert table.row_ranges == ((3, 17), (40, 90))
    assert (part == np.concatenate([whole[3:17], whole[40:90]])).all()


def test_rows_of_one_corpus_leave_the_others_whole(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / name, echoing_documents(seed, 20)) for seed, name in enumerate("ab", 1)]
    settings = project_settings(tmp_path / "project", prefixes, retro_tasks=TASKS, retro_query_rows=["b=3:17"])
    root = build(settings)
    (whole, _), (part, _) = table_of(root, "a"), table_of(root, "b")
    assert (len(whole.row_ranges), whole.row_ranges[0][0], part.row_ranges) == (1, 0, ((3, 17),))
    assert whole.layout.num_rows > 14
    with pytest.raises(ConfigError, match="'c=0:3' names no query corpus"):
        build(settings.replace(retro_query_rows=["c=0:3"]))


def test_several_corpora_make_one_database(tmp_path: Path) -> None:
    parts = [echoing_documents(seed, 20) for seed in (1, 2)]
    prefixes = [write_corpus(tmp_path / f"part{number}", part) for number, part in enumerate(parts)]
    root = build(project_settings(tmp_path / "project", prefixes))
    joined = parts[0] + parts[1]
    chunks = cut_chunks(joined)
    for number, part in enumerate(parts):
        _, ids = table_of(root, f"part{number}")
        owners = owners_of_tokens(part) + (len(parts[0]) if number else 0)
        for row in range(len(ids)):
            mine = set(owners[row * CHUNK : (row + 2) * CHUNK].tolist())
            assert not mine & {chunks[one][0] for one in ids[row] if one >= 0}


def test_blocks_may_be_published_while_they_are_computed_again(tmp_path: Path) -> None:
    files = [tmp_path / "stage" / "blocks" / str(number) for number in range(4)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text(file.name)
    written = []

    def write(number: int, path: Path) -> None:
        path.write_text(str(number))
        written.append(number)
        for file in files:  # by another worker
            file.unlink(missing_ok=True)

    recompute("encode", files, 1.0, write)
    assert len(written) == 1
