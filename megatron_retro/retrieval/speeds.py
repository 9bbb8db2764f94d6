"""What this machine does per second, measured in a moment on the operations that a build is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.faiss_index import faiss_module
from megatron_retro.retrieval.gpu_copies import copied_to_gpus, copy_bytes
from megatron_retro.retrieval.list_join import Excluded
from megatron_retro.retrieval.searching import Searcher, can_join

_HNSW_SAMPLE_LISTS = 4096
_SCORED_LISTS, _SCORING = 32, 1024
_MINIMUM_SECONDS = 0.2


@dataclass(frozen=True)
class Speeds:
    """Seconds of one operation each."""

    embed_chunk: float
    multiply_add: float
    hnsw_assign: float
    score: float


@dataclass(frozen=True)
class GpuSpeeds:
    """Seconds of one operation on the GPUs of faiss, all of them together."""

    copied_byte: float
    score: float


def measure_speeds(database: ChunkDatabase, embedder: Embedder, dimension: int) -> Speeds:
    """Seconds of each operation on this machine, as it is now; `dimension` is what the lists see."""
    size = min(database.num_chunks, 256)
    ids = np.linspace(0, database.num_chunks - 1, size).astype(np.int64)
    embed = _seconds(lambda: embedder.embed(*database.gather(ids, database.chunk_length))) / size
    product = _product_seconds(dimension)
    return Speeds(embed, product, _hnsw_seconds(dimension), score_seconds(dimension))


def _product_seconds(dimension: int) -> float:
    """Of one multiply-add in a matrix product."""
    rows, columns, halves = torch.randn(1024, dimension), torch.randn(512, dimension), torch.zeros(512)
    return _seconds(lambda: torch.addmm(halves, rows, columns.T)) / (1024 * 512 * dimension)


def score_seconds(dimension: int) -> float:
    """Of comparing a query with one vector of a list that it probes, all that a search does included."""
    index, vectors = _scored_index(dimension)
    queries, own = vectors[:_SCORING], Excluded(np.zeros(_SCORING, np.int64), np.zeros(_SCORING, np.int64))
    searcher = Searcher(index, _SCORED_LISTS - 1, 16, can_join(index), 1e9)
    return _seconds(lambda: searcher.search(queries, 20, own, 20)) / (_SCORING * len(vectors))


def measure_gpu_speeds(dimension: int) -> GpuSpeeds:
    """The same on the GPUs, by the clock, and copying an index to them."""
    index, vectors = _scored_index(dimension)
    copy = copied_to_gpus(index, len(vectors))
    copy.set_lists(_SCORED_LISTS - 1)
    scoring = _seconds(lambda: copy.search(vectors[:_SCORING], 20), waits=True) / (_SCORING * len(vectors))
    copying = _seconds(lambda: copied_to_gpus(index, len(vectors)), waits=True) / copy_bytes(index, len(vectors))
    return GpuSpeeds(copying, scoring)


def _scored_index(dimension: int) -> tuple[Any, NDArray[np.float32]]:
    """A small inverted file and the vectors in it."""
    faiss, random = faiss_module(), np.random.default_rng(0)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, _SCORED_LISTS)
    index.quantizer.add(random.standard_normal((_SCORED_LISTS, dimension)).astype(np.float32))
    index.is_trained = True
    vectors = random.standard_normal((_SCORED_LISTS * 512, dimension)).astype(np.float32)
    index.add(vectors)
    return index, vectors


def _hnsw_seconds(dimension: int) -> float:
    """Of finding the list of one vector through a graph of lists, per power of two of lists."""
    faiss, random = faiss_module(), np.random.default_rng(0)
    graph = faiss.IndexHNSWFlat(dimension, 32)
    graph.add(random.standard_normal((_HNSW_SAMPLE_LISTS // 4, dimension)).astype(np.float32))
    queries = random.standard_normal((64, dimension)).astype(np.float32)
    steps = float(np.log2(_HNSW_SAMPLE_LISTS // 4))
    return _seconds(lambda: graph.search(queries, 1)) / 64 / steps


def _seconds(work: Callable[[], object], waits: bool = False) -> float:
    """Of one call, the fastest of several; CPU time where that is less, as on a busy machine with one thread.

    Work that `waits` for another device has no CPU time to tell.
    """
    work()
    best, spent = float("inf"), 0.0
    while spent < _MINIMUM_SECONDS:
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        taken, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        best, spent = min(best, taken, taken if waits else cpu), spent + taken
    return best
