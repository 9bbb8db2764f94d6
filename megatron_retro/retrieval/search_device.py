"""Where an index is searched: on GPUs where faiss can and it costs less, else on the CPU; from measured speeds.

The speeds of this machine are measured in a moment on the operations that a build is made of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval.chunk_vectors import EmbeddedChunks
from megatron_retro.retrieval.faiss_index import faiss_module, inverted_parts
from megatron_retro.retrieval.gpu_index import copy_bytes, copy_to_gpus, lack_of_memory, not_supported_reasons, num_gpus
from megatron_retro.retrieval.index_search import ExcludedIds, Searcher, can_search_by_lists
from megatron_retro.retrieval.project import Project
from megatron_retro.runtime.console import readable_seconds

_HNSW_SAMPLE_LISTS = 4096
_SCORED_LISTS, _SCORING = 32, 1024
_MINIMUM_SECONDS = 0.2


@dataclass(frozen=True)
class OperationSeconds:
    """Seconds that one operation of each kind takes on the CPU."""

    embed_chunk: float
    chunk_vector: float
    multiply_add: float
    hnsw_assign: float
    score: float


@dataclass(frozen=True)
class GpuOperationSeconds:
    """Seconds that one operation takes on all GPUs of faiss together."""

    copied_byte: float
    score: float


def measure_operations(project: Project, dimension: int) -> OperationSeconds:
    """Measure the operations on this machine; `dimension` is that of the vectors in the lists."""
    size = min(project.database.num_chunks, 256)
    ids = np.linspace(0, project.database.num_chunks - 1, size).astype(np.int64)
    embedded = EmbeddedChunks(project.database, project.embedder)
    embed = found = _seconds(lambda: embedded.of(ids)) / size
    if project.config.retro_passage_vectors is not None:
        found = _seconds(lambda: project.chunk_vectors.of(ids)) / size
    product = _product_seconds(dimension)
    return OperationSeconds(embed, found, product, _hnsw_seconds(dimension), score_seconds(dimension))


def _product_seconds(dimension: int) -> float:
    """Seconds of one multiply-add in a matrix product."""
    rows, columns, halves = torch.randn(1024, dimension), torch.randn(512, dimension), torch.zeros(512)
    return _seconds(lambda: torch.addmm(halves, rows, columns.T)) / (1024 * 512 * dimension)


def score_seconds(dimension: int) -> float:
    """Seconds of comparing a query with one vector of a probed list, everything that a search does included."""
    index, vectors = _measured_index(dimension)
    queries, own = vectors[:_SCORING], ExcludedIds(np.zeros(_SCORING, np.int64), np.zeros(_SCORING, np.int64))
    searcher = Searcher(index, _SCORED_LISTS - 1, 16, can_search_by_lists(index), 1e9)
    return _seconds(lambda: searcher.search(queries, 20, own, 20)) / (_SCORING * len(vectors))


def measure_gpu_operations(dimension: int) -> GpuOperationSeconds:
    """Wall-clock seconds of a score on the GPUs, and of copying a byte of an index to them."""
    index, vectors = _measured_index(dimension)
    copy = copy_to_gpus(index, len(vectors))
    copy.set_lists(_SCORED_LISTS - 1)
    scoring = _seconds(lambda: copy.search(vectors[:_SCORING], 20), waits=True) / (_SCORING * len(vectors))
    copying = _seconds(lambda: copy_to_gpus(index, len(vectors)), waits=True) / copy_bytes(index, len(vectors))
    return GpuOperationSeconds(copying, scoring)


def _measured_index(dimension: int) -> tuple[Any, NDArray[np.float32]]:
    """A small inverted file and the vectors in it."""
    faiss, random = faiss_module(), np.random.default_rng(0)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, _SCORED_LISTS)
    index.quantizer.add(random.standard_normal((_SCORED_LISTS, dimension)).astype(np.float32))
    index.is_trained = True
    vectors = random.standard_normal((_SCORED_LISTS * 512, dimension)).astype(np.float32)
    index.add(vectors)
    return index, vectors


def _hnsw_seconds(dimension: int) -> float:
    """Seconds of finding the list of one vector through an HNSW graph of lists, per power of two of lists."""
    faiss, random = faiss_module(), np.random.default_rng(0)
    graph = faiss.IndexHNSWFlat(dimension, 32)
    graph.add(random.standard_normal((_HNSW_SAMPLE_LISTS // 4, dimension)).astype(np.float32))
    queries = random.standard_normal((64, dimension)).astype(np.float32)
    steps = float(np.log2(_HNSW_SAMPLE_LISTS // 4))
    return _seconds(lambda: graph.search(queries, 1)) / 64 / steps


def _seconds(work: Callable[[], object], waits: bool = False) -> float:
    """Seconds of one call, the fastest of several; CPU time where that is less, as on a busy machine with one thread.

    Only wall-clock time counts for work that `waits` for another device.
    """
    work()
    best, spent = float("inf"), 0.0
    while spent < _MINIMUM_SECONDS:
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        taken, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        best, spent = min(best, taken, taken if waits else cpu), spent + taken
    return best


@dataclass(frozen=True)
class DeviceChoice:
    """GPUs or CPU, the reason, and the speed of the GPUs if it was measured."""

    on_gpus: bool
    reason: str
    speeds: GpuOperationSeconds | None = None

    def __str__(self) -> str:
        return f"{f'{num_gpus()} GPUs' if self.on_gpus else 'CPU'} ({self.reason})"


def choose_device(project: Project, index: Any, nprobe: int, rows: int, score: float | None = None) -> DeviceChoice:
    """The device to search `rows` queries on; `score` is the seconds of one score on the CPU, if known."""
    if project.config.retro_faiss_device == "cpu":
        return DeviceChoice(False, "--retro-faiss-device cpu")
    reasons = check_device(project, index)
    return DeviceChoice(False, "; ".join(reasons)) if reasons else _cheaper_device(project, index, nprobe, rows, score)


def check_device(project: Project, index: Any) -> tuple[str, ...]:
    """The reasons why the GPUs cannot search an index; an error where --retro-faiss-device gpu asks for them."""
    reasons = _gpu_reasons(project, index)
    if reasons and project.config.retro_faiss_device == "gpu":
        raise EnvironmentProblem(
            f"{project.choice.index_str} cannot be searched on GPUs",
            got="; ".join(reasons),
            fix="give --retro-faiss-device auto, or another --retro-index-str",
        )
    return reasons


def _gpu_reasons(project: Project, index: Any) -> tuple[str, ...]:
    config = project.config
    keep = max(config.retro_query_num_neighbors_query, config.retro_query_num_neighbors_save)
    reasons = not_supported_reasons(index, keep)
    if reasons:
        return reasons
    lack = lack_of_memory(copy_bytes(index, _chunks(project)), project.memory_bytes)
    return (lack,) if lack else ()


def _cheaper_device(project: Project, index: Any, nprobe: int, rows: int, score: float | None) -> DeviceChoice:
    """The cheaper of both by measured speeds; a GPU that was asked for by name is taken at any cost."""
    parts, chunks = inverted_parts(index), _chunks(project)
    width, lists = (parts.dimension, parts.num_lists) if parts else (project.embedder.dimension, 1)
    speeds = measure_gpu_operations(width)
    scores = rows * min(nprobe, lists) * chunks / lists
    there = copy_bytes(index, chunks) * speeds.copied_byte + scores * speeds.score
    here = scores * (score if score is not None else score_seconds(width))
    prices = f"{readable_seconds(there)} on GPUs, {readable_seconds(here)} on the CPU"
    asked = project.config.retro_faiss_device == "gpu"
    return DeviceChoice(asked or there < here, f"--retro-faiss-device gpu: {prices}" if asked else prices, speeds)


def _chunks(project: Project) -> int:
    return sum(block.size for block in project.blocks)
