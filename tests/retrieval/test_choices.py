"""Re-ordering and dropping candidates, comparing embedders, choosing indexes, pricing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import CHECKSUMS_FILE, NeighborTable
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval import index_building, neighbor_search, verification
from megatron_retro.retrieval.bm25_search import Bm25Search
from megatron_retro.retrieval.build_estimate import estimate_build, index_file_bytes
from megatron_retro.retrieval.faiss_index import faiss_module, inverted_parts, new_index
from megatron_retro.retrieval.index_choice import automatic_index, choose_index, number_of_lists
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.reference import longest_common_runs, token_overlaps
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.runtime import console
from megatron_retro.runtime.console import Progress
from megatron_retro.testing.retrieval_projects import CHUNK, EOD, echoing_documents, project_settings, write_corpus

TASKS = ["train", "encode", "merge", "query"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("choices") / "corpus", echoing_documents(21, 260))


def stream_of(corpus: str) -> np.ndarray:
    return np.fromfile(f"{corpus}.bin", np.uint16).astype(np.int64)


def ids_of(root: Path) -> np.ndarray:
    table = NeighborTable.open(root / "neighbors" / "corpus")
    return table.rows(0, table.layout.num_rows)


def test_overlap_reranking_orders_rows_by_shared_tokens(corpus: str, tmp_path: Path) -> None:
    build_retrieval(project_settings(tmp_path / "p", [corpus], retro_tasks=TASKS, retro_rerank="overlap"))
    ids = ids_of(tmp_path / "p")
    database = ChunkDatabase.open(tmp_path / "p" / "database")
    queries = stream_of(corpus)[: len(ids) * CHUNK].reshape(-1, CHUNK)
    tokens, there = database.gather(ids, CHUNK)
    shares = token_overlaps(queries.astype(np.int32), queries != EOD, tokens.astype(np.int32), there)
    assert (np.diff(shares, axis=1) <= 1e-6).all()
    assert shares[:, 0].mean() > 0.3


@pytest.mark.parametrize("method", ["lists", "queries"])
def test_calibration_and_queries_show_how_far_they_are(
    corpus: str, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: dict[str, list[float]] = {}
    monkeypatch.setattr(Progress, "_show", lambda self, note, end: shown.setdefault(self.what, []).append(self.done))
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    changes = {"retro_index_str": "IVF16,Flat", "retro_index_ntrain": 10_000, "retro_query_method": method}
    changes |= {"retro_rerank": "overlap"} if method == "lists" else {}
    build_retrieval(project_settings(tmp_path / "p", [corpus], retro_tasks=TASKS, **changes))
    rows = len(ids_of(tmp_path / "p"))
    assert shown["embed corpus"][-1] == rows and shown["query corpus"][-1] == pytest.approx(rows)
    assert len(shown["query corpus"]) > 3 or method == "queries"
    assert shown.get("re-rank corpus", [rows])[-1] == rows and ("re-rank corpus" in shown) == (method == "lists")
    assert len(shown["calibrate"]) > 10 and shown["calibrate"] == sorted(shown["calibrate"])
    assert "of 16 lists find" in capsys.readouterr().err


def test_bm25_prefers_rare_shared_tokens(tmp_path: Path) -> None:
    common, rare = list(range(10)), list(range(100, 106))
    documents = [
        common + rare,
        [*common, *range(50, 56)],
        [*rare, *range(60, 70)],
        *[common * 2 for _ in range(12)],
    ]
    corpus = write_corpus(tmp_path / "corpus", documents)
    build_retrieval(project_settings(tmp_path / "p", [corpus], retro_tasks=TASKS, retro_rerank="bm25"))
    database = ChunkDatabase.open(tmp_path / "p" / "database")
    first = ids_of(tmp_path / "p")[0, 0]
    assert database.document_of(np.array([first]))[0] == 2


def test_bm25_finds_the_best_of_all_chunks(tmp_path: Path) -> None:
    """Against the formula in float64 over every chunk that is not of the query's own documents."""
    corpus = write_corpus(tmp_path / "corpus", echoing_documents(3, 60))
    settings = project_settings(tmp_path / "p", [corpus], retro_tasks=(*TASKS, "verify"), retro_candidates="bm25")
    build_retrieval(settings)
    ids, database, stream = ids_of(tmp_path / "p"), ChunkDatabase.open(tmp_path / "p" / "database"), stream_of(corpus)
    tokens, there = database.gather(np.arange(database.num_chunks), CHUNK)
    held = np.stack([np.bincount(row[mask], minlength=EOD + 1) for row, mask in zip(tokens, there, strict=True)])
    rare = np.log1p((len(held) - (held > 0).sum(0) + 0.5) / ((held > 0).sum(0) + 0.5))
    long = held.sum(1, keepdims=True)
    weights = rare * held / (held + 1.2 * (0.25 + 0.75 * long / long.mean()))
    owners = database.document_of(np.arange(len(held)))
    own = np.searchsorted(np.flatnonzero(stream == EOD), np.arange(len(ids) * CHUNK + CHUNK))
    for row in range(len(ids)):
        query = stream[row * CHUNK : (row + 1) * CHUNK]
        scores = weights[:, query[query != EOD]].sum(1)
        span = own[row * CHUNK : (row + 2) * CHUNK + 1]
        scores[(owners >= span[0]) & (owners <= span[-1])] = 0
        best = np.sort(scores)[::-1][: ids.shape[1]]
        found = np.where(ids[row] >= 0, scores[ids[row]], 0)
        assert np.allclose(found, best, rtol=1e-4), row
    with pytest.raises(ConfigError, match="holds the whole database in memory"):
        Bm25Search.of(database, 1e3)
    with pytest.raises(ConfigError, match="which those of BM25 do not have"):
        build_retrieval(settings.replace(retro_refine=True))
    with pytest.raises(ArtifactError, match="found_by"):
        build_retrieval(settings.replace(retro_candidates="index"))


def test_neighbors_that_hold_what_follows_are_dropped(corpus: str, tmp_path: Path) -> None:
    roots = {share: tmp_path / str(share) for share in (None, 0.5)}
    for share, root in roots.items():
        settings = project_settings(root, [corpus], retro_tasks=TASKS, retro_query_num_neighbors_query=400)
        build_retrieval(settings.replace(retro_drop_overlap=share))
    longest = {}
    for share, root in roots.items():
        ids, database = ids_of(root), ChunkDatabase.open(root / "database")
        stream = stream_of(corpus)
        after = np.full(len(ids) * CHUNK, EOD)
        after[: len(stream) - CHUNK] = stream[CHUNK : CHUNK + len(after)]
        after = after.reshape(-1, CHUNK)
        tokens, there = database.gather(ids, 2 * CHUNK)
        longest[share] = longest_common_runs(after.astype(np.int32), after != EOD, tokens.astype(np.int32), there)
    assert longest[None].max() > CHUNK // 2 >= longest[0.5].max()
    kept = [
        [one for one, run in zip(*row, strict=True) if run <= CHUNK // 2]
        for row in zip(ids_of(roots[None]), longest[None], strict=True)
    ]
    dropped = ids_of(roots[0.5])
    assert all(row[: len(keep)].tolist() == keep for row, keep in zip(dropped, kept, strict=True))


def test_refining_makes_codes_nearly_exact_and_kept_vectors_only_save_time(corpus: str, tmp_path: Path) -> None:
    coarse = {"retro_index_str": "IVF4,PQ4x4", "retro_index_ntrain": 10_000, "retro_query_nprobe": 4}
    recalls, found = {}, {}
    for name, refine, kept in (("codes", False, False), ("kept", True, True), ("anew", True, False)):
        changes = {**coarse, "retro_keep_embeddings": kept, "retro_refine": refine, "retro_memory_gb": 0.1}
        build_retrieval(project_settings(tmp_path / name, [corpus], retro_query_num_neighbors_query=900, **changes))
        quality = json.loads((tmp_path / name / "report" / "quality.json").read_text())
        recalls[name] = quality["tables"]["corpus"]["recall"]["2"]["recall"]
        found[name] = ids_of(tmp_path / name)
    assert recalls["kept"] > 0.98 > recalls["codes"]
    assert (found["kept"] == found["anew"]).all() and (found["kept"] != found["codes"]).any()


def test_embedders_are_compared_on_the_same_text(corpus: str, tmp_path: Path) -> None:
    settings = project_settings(tmp_path / "p", [corpus], retro_verify_embedders=["hashed"])
    build_retrieval(settings)
    report = json.loads((tmp_path / "p" / "report" / "quality.json").read_text())
    random, hashed = report["embedders"]
    assert hashed["shared with the chunk"] > 2 * random["shared with the chunk"]
    assert hashed["shared with what follows"] > random["shared with what follows"]
    assert "Embedders" in (tmp_path / "p" / "report" / "quality.html").read_text()


def test_finished_blocks_can_be_computed_again(corpus: str, tmp_path: Path) -> None:
    settings = project_settings(tmp_path / "p", [corpus], retro_tasks=["train", "encode"], retro_block_size=100)
    build_retrieval(settings)
    build_retrieval(settings.replace(retro_task_validate=1.0))
    blocks = sorted((tmp_path / "p" / "index" / "codes").iterdir())
    blocks[1].write_bytes(blocks[0].read_bytes())
    with pytest.raises(ArtifactError, match="not what its inputs give"):
        build_retrieval(settings.replace(retro_task_validate=1.0))


@pytest.mark.parametrize(
    ("chunks", "dimension", "memory", "expected"),
    [
        (1, 256, 1e9, "IVF1,Flat"),
        (65_536, 256, 1e9, "IVF1,Flat"),
        (200_000, 256, 1e9, "IVF512,Flat"),
        (1_000_000, 256, 4e9, "IVF1024,Flat"),
        (19_000_000_000, 1024, 400e9, "OPQ64_128,IVF4194304_HNSW32,PQ64"),
        (66_000_000, 1024, 4e9, "OPQ64_128,IVF262144_HNSW32,PQ64"),
    ],
)
def test_the_automatic_index(chunks: int, dimension: int, memory: float, expected: str) -> None:
    assert automatic_index(chunks, dimension, memory) == expected


def test_an_automatic_index_can_always_be_trained() -> None:
    for power in range(60):
        chunks = int(1.5**power) + 1
        for dimension in (64, 384, 1024):
            choice = choose_index("auto", chunks, dimension, 1e12, None, lambda _, d=dimension: d)
            assert choice.train_chunks <= chunks
            assert choice.train_chunks >= 39 * number_of_lists(choice.index_str) or choice.index_str == "IVF1,Flat"
            assert 1 <= choice.nprobe <= number_of_lists(choice.index_str)


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(ConfigError, match=r"retro-index-ntrain 166666 or less"):
        choose_index("HNSW32", 10**9, 1000, 1e9, 10**6, lambda _: 1000)
    with pytest.raises(ConfigError, match=r"got: +20\.97 GB\n.*at most 1\.00 GB.*\n.*fewer lists, or more memory"):
        choose_index("IVF1048576,Flat", 10**9, 1000, 1e9, 10**8, lambda _: 1000)
    assert choose_index("IVF64,Flat", 10**9, 1000, 1e9, 10**6, lambda _: 1000).train_chunks == 10**6
    with pytest.raises(ConfigError, match="at most IVF256 without PQ"):
        choose_index("IVF4096,Flat", 10_000, 64, 1e9, None, lambda _: 64)


@pytest.mark.parametrize(
    ("index_str", "nprobe", "told"), [("IVF16,Flat", None, True), ("IVF16,Flat", 5, False), ("IVF1,Flat", None, False)]
)
def test_a_plan_before_calibration_tells_both_ends(
    corpus: str, tmp_path: Path, index_str: str, nprobe: int | None, told: bool
) -> None:
    """How many lists are enough is known once the index is there: no single price would be true before."""
    changes = {"retro_index_str": index_str, "retro_index_ntrain": 10_000, "retro_query_nprobe": nprobe}
    plan = estimate_build(Project(project_settings(tmp_path / "p", [corpus], **changes)))
    query = next(cost for cost in plan.costs if cost.stage == "query")
    assert (query.most_seconds is not None and query.most_seconds > query.seconds) is told
    assert plan.facts["lists searched"].startswith({True: "9 to 16: calibrated", False: str(nprobe or 1)}[told])


@pytest.mark.parametrize("index_str", ["IVF1,Flat", "IVF8,Flat", "OPQ8_32,IVF4_HNSW8,PQ8x4"])
def test_the_plan_knows_every_file_to_the_byte(corpus: str, tmp_path: Path, index_str: str) -> None:
    changes = {"retro_index_str": index_str, "retro_index_ntrain": 10_000, "retro_keep_embeddings": True}
    settings = project_settings(tmp_path / "p", [corpus], retro_tasks=TASKS, **changes)
    plan = estimate_build(Project(settings))
    build_retrieval(settings)
    for name, size in plan.files.items():
        path = tmp_path / "p" / name
        content = [file for file in path.rglob("*") if file.name not in ("manifest.json", CHECKSUMS_FILE)]
        written = content if path.is_dir() else [path]
        found = sum(file.stat().st_size for file in written)
        assert found == size or (name == "index/codes" and 0 < found - size < 2000 * len(written)), name
    assert {cost.stage for cost in plan.costs} == {"train", "encode", "merge", "query", "verify"}
    assert all(cost.seconds > 0 for cost in plan.costs)
    text = plan.text()
    assert index_str in text and f"{plan.files['neighbors/corpus']:,}" in text
    assert plan.files["index/merged/index.faiss"] == index_file_bytes(index_str, 64)


@pytest.mark.parametrize(
    "index_str",
    [
        *("IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16", "IVF8,RaBitQ", "ITQ32,IVF8,Flat", "RR32,IVF8,Flat"),
        *("PCA32,IVF8,SQ4", "PCAR32,L2norm,IVF8,Flat", "OPQ4_16,IVF8,PQ4x4", "IVF8,PQ4x8"),
    ],
)
def test_the_plan_knows_the_size_of_any_index_file(index_str: str) -> None:
    index, faiss = new_index(index_str, 64), faiss_module()
    index.train(np.random.default_rng(0).standard_normal((700, 64)).astype(np.float32))
    parts = inverted_parts(index)
    assert parts is not None
    lists = faiss.OnDiskInvertedLists()
    lists.nlist, lists.code_size, lists.read_only, lists.filename = 8, parts.code_size, True, "lists.ivfdata"
    lists.lists.resize(8)
    parts.inverted.replace_invlists(lists, False)
    assert index_file_bytes(index_str, 64) == faiss.serialize_index(index).size


def test_who_comes_second_accepts_what_another_worker_has_published(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every publishing step done twice, the first time by "the other worker", whose result stays."""
    settings = project_settings(tmp_path / "p", [corpus], retro_index_str="IVF4,Flat", retro_block_size=100)
    for place, name in ((index_building.ListMerge, "finish"), (neighbor_search, "finish_table")):
        once = getattr(place, name)

        def twice(*arguments: Any, once: Any = once, **more: Any) -> None:
            once(*arguments, **more)
            once(*arguments, **more)

        monkeypatch.setattr(place, name, twice)
    build_retrieval(settings)
    monkeypatch.undo()
    build_retrieval(project_settings(tmp_path / "q", [corpus], retro_index_str="IVF4,Flat", retro_block_size=100))
    assert (ids_of(tmp_path / "p") == ids_of(tmp_path / "q")).all()


def test_no_worker_judges_a_report_on_something_else(corpus: str, tmp_path: Path) -> None:
    settings = project_settings(tmp_path / "p", [corpus], retro_verify_queries=30)
    build_retrieval(settings)
    report = tmp_path / "p" / "report" / "quality.json"
    first = report.read_text()
    build_retrieval(settings.replace(retro_tasks=["verify"], shard="1/2"))
    assert report.read_text() == first
    build_retrieval(settings.replace(retro_tasks=["verify"], shard="1/2", retro_verify_queries=40))
    assert json.loads(report.read_text())["tables"]["corpus"]["sampled"] == 40


def test_a_finished_report_is_left_alone_and_an_old_one_stays_until_the_new_one_is_there(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = project_settings(tmp_path / "p", [corpus], retro_verify_queries=30)
    build_retrieval(settings)
    report = tmp_path / "p" / "report" / "quality.json"
    first, made = report.read_text(), report.stat().st_mtime_ns

    def interrupted(_: Project) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "_measured", interrupted)
    build_retrieval(settings)
    with pytest.raises(KeyboardInterrupt):
        build_retrieval(settings.replace(retro_verify_queries=40))
    assert (report.read_text(), report.stat().st_mtime_ns) == (first, made)
    lists = tmp_path / "p" / "index/merged/lists.ivfdata"
    content = bytearray(lists.read_bytes())
    content[len(content) // 2] ^= 1
    lists.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        build_retrieval(settings.replace(retro_tasks=["verify"]))


@pytest.mark.parametrize(
    "index_str", ["HNSW16", "PCA32,Flat", "ITQ32,LSH", "SQ8", "RaBitQ", "IVF8,PQ8x4fs", "IVF8,Flat,RFlat"]
)
def test_the_plan_knows_about_what_an_index_without_blocks_takes(corpus: str, tmp_path: Path, index_str: str) -> None:
    """A thousand chunks, so that tables of fixed size and random levels of a graph still count."""
    settings = project_settings(tmp_path / "p", [corpus], retro_index_str=index_str, retro_tasks=TASKS[:3])
    expected = estimate_build(Project(settings)).files["index/merged/index.faiss (about)"]
    build_retrieval(settings)
    written = (tmp_path / "p/index/merged/index.faiss").stat().st_size
    assert expected * 0.97 <= written <= expected * 1.1 + 20_000


@pytest.mark.parametrize("index_str", ["IDMap,Flat", "IVF8(PQ4x4np),Flat", "IMI2x4,Flat"])
def test_an_index_that_cannot_be_planned_is_refused_by_name(corpus: str, tmp_path: Path, index_str: str) -> None:
    with pytest.raises(ConfigError, match="cannot be built here"):
        build_retrieval(project_settings(tmp_path / "p", [corpus], retro_index_str=index_str))
    assert not (tmp_path / "p" / "index").exists()
