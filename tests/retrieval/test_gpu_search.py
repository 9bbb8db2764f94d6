"""GPUs of faiss: what can be copied there, what is chosen and why, and the same neighbours from either place.

Where there is no GPU a stand-in answers to the names that faiss-gpu documents and refuses what it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval import gpu_index, search_device
from megatron_retro.retrieval.build_estimate import estimate_build
from megatron_retro.retrieval.faiss_index import faiss_module, inverted_parts, new_index
from megatron_retro.retrieval.gpu_index import (
    MOST_SELECTED,
    GpuIndex,
    copy_bytes,
    copy_to_gpus,
    lack_of_memory,
    not_supported_reasons,
)
from megatron_retro.retrieval.index_search import ExcludedIds, Searcher
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.search_device import GpuOperationSeconds
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.retrieval_projects import echoing_documents, project_settings, write_corpus

GPU_NAMES = ("StandardGpuResources", "GpuMultipleClonerOptions", "index_cpu_to_gpu_multiple_py", "GpuParameterSpace")
STRINGS = ["IVF8,Flat", "IVF8,SQ8", "PCA32,IVF8_HNSW32,PQ8", "PCA32,IVF8,SQfp16"]
VECTORS = np.random.default_rng(0).standard_normal((1200, 64)).astype(np.float32)
NOBODY = np.zeros(100, np.int64)


class StandInIndex:
    """A copy made as faiss makes one: with the list finder and the lists that the index has at that moment."""

    def __init__(self, index: Any, options: Any) -> None:
        faiss = faiss_module()
        searched = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        finder = faiss.downcast_index(searched.quantizer)
        if not isinstance(finder, faiss.IndexFlat):
            raise RuntimeError("Error in clone: This index type is not implemented on GPU.")
        if searched.nprobe > gpu_index.MOST_SELECTED:
            raise RuntimeError("Error: 'nprobe <= getMaxKSelection()' failed: GPU index only supports nprobe <= 2048")
        if options.use_cuvs and isinstance(searched, faiss.IndexIVFScalarQuantizer):
            raise RuntimeError("Error: this type of index is not implemented for cuVS")
        self.options = options
        self.finder, self.index, self.searched, self.nprobe = (
            faiss.clone_index(finder),
            index,
            searched,
            searched.nprobe,
        )
        self.asked: list[int] = []

    def search(self, vectors: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
        self.check(keep)
        kept = self.searched.nprobe, self.searched.quantizer
        self.searched.nprobe, self.searched.quantizer = self.nprobe, self.finder
        try:
            return self.index.search(vectors, keep)
        finally:
            self.searched.nprobe, self.searched.quantizer = kept

    def search_preassigned(
        self, vectors: np.ndarray, keep: int, lists: np.ndarray, distances: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        self.check(keep)
        if self.options.use_cuvs:
            raise RuntimeError("Error: searchPreassigned is not implemented for cuVS index")
        kept, self.searched.nprobe = self.searched.nprobe, self.nprobe
        try:
            return self.searched.search_preassigned(vectors, keep, lists, distances)
        finally:
            self.searched.nprobe = kept

    def check(self, keep: int) -> None:
        if not 0 < keep <= MOST_SELECTED or not 0 < self.nprobe <= gpu_index.MOST_SELECTED:
            raise RuntimeError("Error: 'k <= getMaxKSelection()' failed: GPU index only supports k <= 2048")
        self.asked.append(keep)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[StandInIndex]:
    """A faiss that has two GPUs; every copy made on them."""
    copies: list[StandInIndex] = []

    def to_gpus(resources: Sequence[Any], index: Any, options: Any) -> StandInIndex:
        assert len(resources) == 2
        copies.append(StandInIndex(index, options))
        return copies[-1]

    def set_parameter(index: StandInIndex, name: str, value: int) -> None:
        assert name == "nprobe"
        index.nprobe = value

    faiss = faiss_module()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", faiss.clone_index, raising=False)
    stand_ins = (object, SimpleNamespace, to_gpus, lambda: SimpleNamespace(set_index_parameter=set_parameter))
    for name, stand_in in zip(GPU_NAMES, stand_ins, strict=True):
        monkeypatch.setattr(faiss, name, stand_in, raising=False)
    monkeypatch.setattr(gpu_index, "free_bytes", lambda: (10 * 10**9, 10 * 10**9))
    return copies


def cheap(monkeypatch: pytest.MonkeyPatch, copied_byte: float, score: float) -> None:
    monkeypatch.setattr(search_device, "measure_gpu_operations", lambda _: GpuOperationSeconds(copied_byte, score))


def filled(index_str: str) -> Any:
    index = new_index(index_str, 64)
    index.train(VECTORS)
    index.add(VECTORS)
    return index


@pytest.mark.parametrize(
    ("index_str", "keep", "reason"),
    [
        ("IVF8,Flat", 200, None),
        ("PCA32,Flat", 200, None),
        ("IVF8,SQ8", 200, None),
        ("IVF8,SQfp16", 200, None),
        ("OPQ8_32,IVF8_HNSW32,PQ8", 200, None),
        ("IVF8,SQbf16", 200, "scalar quantizer"),
        ("IVF8,PQ8x4", 200, "4 bits"),
        ("OPQ10_60,IVF8,PQ10", 200, "10 codes"),
        ("HNSW32", 200, "IndexHNSWFlat"),
        ("IVF8,RaBitQ", 200, "IndexIVFRaBitQ"),
        ("IVF8,Flat", 2049, "2049 candidates"),
    ],
)
def test_what_faiss_cannot_search_on_gpus_is_known_beforehand(
    two_gpus: list[StandInIndex], index_str: str, keep: int, reason: str | None
) -> None:
    found = not_supported_reasons(new_index(index_str, 64), keep)
    assert found == () if reason is None else len(found) == 1 and reason in found[0]


def test_without_gpus_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_module(), "get_num_gpus", lambda: 0)
    assert not_supported_reasons(new_index("IVF8,Flat", 64), 200) == ("faiss sees no GPU",)


def test_memory_decides_between_copies_parts_and_none(two_gpus: list[StandInIndex]) -> None:
    index = filled("IVF8,Flat")
    assert copy_bytes(index, 10**7) > 10**7 * (64 * 4 + 8)
    assert lack_of_memory(7 * 10**9, 1e9) is None
    assert "through memory" in str(lack_of_memory(9 * 10**9, 4e9))
    assert lack_of_memory(9 * 10**9, 10e9) is None
    assert "GPUs have" in str(lack_of_memory(30 * 10**9, 100e9))
    copy_to_gpus(index, 1000)
    copy_to_gpus(index, 40_000_000)
    assert [copy.options.shard for copy in two_gpus] == [False, True]


def test_long_codes_are_looked_up_in_half_precision(two_gpus: list[StandInIndex]) -> None:
    for codes in (8, 64):
        copy_to_gpus(new_index(f"IVF4,PQ{codes}", 64), 1000)
    assert [copy.options.useFloat16 for copy in two_gpus] == [False, True]


@pytest.mark.parametrize("index_str", STRINGS)
def test_a_copy_finds_what_the_index_finds(two_gpus: list[StandInIndex], index_str: str) -> None:
    check_copy(index_str)
    assert len(two_gpus) == 1 and two_gpus[0].nprobe == 4


@pytest.mark.parametrize("index_str", STRINGS)
def test_a_real_gpu_finds_what_the_index_finds(index_str: str) -> None:
    if faiss_module().get_num_gpus() == 0:
        pytest.skip("faiss sees no GPU")
    check_copy(index_str)


def check_copy(index_str: str, nprobe: int = 4) -> GpuIndex:
    """Equal distances from both places; a graph over the lists may miss one, an exhaustive finder does not."""
    index, queries, nobody = filled(index_str), VECTORS[:100] + 0.1, ExcludedIds(NOBODY, NOBODY)
    here = Searcher(index, nprobe, 64, False, 1e9)
    copy = copy_to_gpus(index, len(VECTORS))
    there = Searcher(index, nprobe, 64, False, 1e9, copy)
    left, right = here.search(queries, 20, nobody, 20), there.search(queries, 20, nobody, 20)
    assert np.allclose(left.distances_QK, right.distances_QK, rtol=1e-3, atol=1e-3)
    assert (left.ids_QK == right.ids_QK).mean() > 0.99
    return copy


@pytest.mark.parametrize("index_str", STRINGS)
def test_more_lists_than_a_gpu_takes_are_searched_in_parts(
    two_gpus: list[StandInIndex], monkeypatch: pytest.MonkeyPatch, index_str: str
) -> None:
    monkeypatch.setattr(gpu_index, "MOST_SELECTED", 3)
    check_copy(index_str, nprobe=7)
    assert two_gpus[0].nprobe == 1 and len(two_gpus[0].asked) == 3


@pytest.mark.parametrize("index_str", STRINGS)
def test_a_real_gpu_searches_more_lists_in_parts(monkeypatch: pytest.MonkeyPatch, index_str: str) -> None:
    if faiss_module().get_num_gpus() == 0:
        pytest.skip("faiss sees no GPU")
    monkeypatch.setattr(gpu_index, "MOST_SELECTED", 3)
    check_copy(index_str, nprobe=7)


@pytest.mark.parametrize(
    ("index_str", "nprobe", "taken"),
    [("IVF8,Flat", 3, True), ("IVF8_HNSW32,PQ8", 3, True), ("IVF8,SQ8", 3, False), ("IVF8,Flat", 7, False)],
)
def test_cuvs_searches_what_it_can(
    two_gpus: list[StandInIndex], monkeypatch: pytest.MonkeyPatch, index_str: str, nprobe: int, taken: bool
) -> None:
    """Built with it, faiss takes it unless told otherwise, and refuses what it has not."""
    monkeypatch.setattr(gpu_index, "MOST_SELECTED", 3)
    monkeypatch.setattr(faiss_module(), "GpuMultipleClonerOptions", lambda: SimpleNamespace(use_cuvs=True))
    there = check_copy(index_str, nprobe)
    assert two_gpus[0].options.use_cuvs is taken
    assert there.most_lists == (3 if taken else 8)


def test_the_list_finder_comes_back_after_copying(two_gpus: list[StandInIndex]) -> None:
    index = filled("IVF8_HNSW32,Flat")
    parts = inverted_parts(index)
    assert parts is not None
    before = index.search(VECTORS[:50], 5)
    copy_to_gpus(index, 1000)
    assert type(faiss_module().downcast_index(parts.inverted.quantizer)).__name__ == "IndexHNSWFlat"
    assert (index.search(VECTORS[:50], 5)[1] == before[1]).all()


def test_more_than_a_gpu_selects_is_selected_here(two_gpus: list[StandInIndex]) -> None:
    """Rows whose own chunks fill the selection are searched again, wider, up to all there are."""
    index = new_index("IVF1,Flat", 64)
    index.train(VECTORS)
    vectors = np.tile(VECTORS, (3, 1))
    index.add(vectors)
    searcher = Searcher(index, 1, 16, False, 1e9, copy_to_gpus(index, len(vectors)))
    own = ExcludedIds(np.zeros(2, np.int64), np.full(2, 3590, np.int64))
    found = searcher.search(VECTORS[:2], 20, own, 5)
    assert (np.sort(found.ids_QK[:, :10]) == np.arange(3590, 3600)).all() and (found.ids_QK[:, 10:] == -1).all()
    assert two_gpus[0].asked and max(two_gpus[0].asked) <= MOST_SELECTED


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus", echoing_documents(31, 200))


def table_of(root: Path) -> tuple[NeighborTable, np.ndarray]:
    table = NeighborTable.open(root / "neighbors" / "corpus")
    return table, table.rows(0, table.layout.num_rows)


@pytest.mark.parametrize(("score", "on_gpus"), [(1e-15, True), (1.0, False)])
def test_the_cheaper_place_is_planned_and_taken(
    corpus: str,
    tmp_path: Path,
    two_gpus: list[StandInIndex],
    monkeypatch: pytest.MonkeyPatch,
    score: float,
    on_gpus: bool,
) -> None:
    cheap(monkeypatch, 1e-15, score)
    settings = project_settings(tmp_path / "p", [corpus], retro_index_str="IVF8,Flat", retro_query_nprobe=4)
    text = estimate_build(Project(settings)).text()
    assert ("2 GPUs (" if on_gpus else "CPU (") in next(line for line in text.splitlines() if "searching" in line)
    build_retrieval(settings)
    made = len(two_gpus)
    assert (made > 0) is on_gpus
    table, ids = table_of(tmp_path / "p")
    assert table.manifest.config["on_gpus"] is on_gpus
    build_retrieval(settings)
    assert len(two_gpus) == made, "a finished table needs no copy"
    build_retrieval(settings.replace(retro_project_dir=str(tmp_path / "q"), retro_faiss_device="cpu"))
    assert (table_of(tmp_path / "q")[1] == ids).mean() > 0.99
    assert len(two_gpus) == made


def test_a_table_made_on_gpus_is_verified_and_asked_without_them(
    corpus: str, tmp_path: Path, two_gpus: list[StandInIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap(monkeypatch, 1e-15, 1e-15)
    settings = project_settings(tmp_path / "p", [corpus], retro_index_str="IVF8,Flat", retro_query_nprobe=8)
    build_retrieval(settings.replace(retro_tasks=["train", "encode", "merge", "query"]))
    monkeypatch.undo()
    build_retrieval(settings.replace(retro_recall_floor=0.99))
    assert LiveIndex(tmp_path / "p").search([[1] * 16], 2)[0].shape == (1, 2)


def test_gpus_asked_for_by_name_are_not_replaced_in_silence(
    corpus: str, tmp_path: Path, two_gpus: list[StandInIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap(monkeypatch, 1e9, 1e9)
    settings = project_settings(tmp_path / "p", [corpus], retro_index_str="IVF8,Flat", retro_query_nprobe=4)
    build_retrieval(settings.replace(retro_faiss_device="gpu", retro_tasks=["train", "encode", "merge", "query"]))
    assert table_of(tmp_path / "p")[0].manifest.config["on_gpus"]
    with pytest.raises(EnvironmentProblem, match="IndexHNSWFlat"):
        build_retrieval(project_settings(tmp_path / "q", [corpus], retro_index_str="HNSW32", retro_faiss_device="gpu"))
    monkeypatch.setattr(faiss_module(), "get_num_gpus", lambda: 0)
    with pytest.raises(EnvironmentProblem, match="faiss sees no GPU"):
        build_retrieval(settings.replace(retro_project_dir=str(tmp_path / "r"), retro_faiss_device="gpu"))
    assert not (tmp_path / "r" / "index").exists()


def test_faiss_with_gpus_has_the_names_that_the_stand_in_answers_to() -> None:
    faiss = faiss_module()
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss is built without GPUs")
    assert all(hasattr(faiss, name) for name in (*GPU_NAMES, "index_cpu_to_all_gpus"))
    options = faiss.GpuMultipleClonerOptions()
    assert all(hasattr(options, name) for name in ("shard", "useFloat16", "use_cuvs"))
