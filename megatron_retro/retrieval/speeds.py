"""What this machine does per second, measured in a moment on the operations that a build is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.faiss_index import faiss_module

_HNSW_SAMPLE_LISTS = 4096
_MINIMUM_SECONDS = 0.2


@dataclass(frozen=True)
class Speeds:
    """Seconds of one operation each."""

    embed_chunk: float
    multiply_add: float
    hnsw_assign: float
    collect_score: float


def measure_speeds(database: ChunkDatabase, embedder: Embedder, dimension: int) -> Speeds:
    """Seconds of each operation on this machine, as it is now; `dimension` is what the lists see."""
    size = min(database.num_chunks, 256)
    ids = np.linspace(0, database.num_chunks - 1, size).astype(np.int64)
    embed = _seconds(lambda: embedder.embed(*database.gather(ids, database.chunk_length))) / size
    product, pick = _product_seconds(dimension)
    return Speeds(embed, product, _hnsw_seconds(dimension), pick)


def _product_seconds(dimension: int) -> tuple[float, float]:
    """Of one multiply-add in a matrix product, and of passing one score by."""
    from megatron_retro.retrieval.native import native_module

    rows, columns = torch.randn(1024, dimension), torch.randn(512, dimension)
    halves = torch.zeros(512)
    product = _seconds(lambda: torch.addmm(halves, rows, columns.T)) / (1024 * 512 * dimension)
    module = native_module()
    if module is None:
        return product, 0.0
    candidates = module.TopCandidates(1024, 20, torch.get_num_threads())
    scores, ids, places = torch.addmm(halves, rows, columns.T).numpy(), np.arange(512), np.arange(1024)
    return product, _seconds(lambda: candidates.offer(places, scores, ids)) / scores.size


def _hnsw_seconds(dimension: int) -> float:
    """Of finding the list of one vector through a graph of lists, per power of two of lists."""
    faiss, random = faiss_module(), np.random.default_rng(0)
    graph = faiss.IndexHNSWFlat(dimension, 32)
    graph.add(random.standard_normal((_HNSW_SAMPLE_LISTS // 4, dimension)).astype(np.float32))
    queries = random.standard_normal((64, dimension)).astype(np.float32)
    steps = float(np.log2(_HNSW_SAMPLE_LISTS // 4))
    return _seconds(lambda: graph.search(queries, 1)) / 64 / steps


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, the fastest of several."""
    work()
    best, spent = float("inf"), 0.0
    while spent < _MINIMUM_SECONDS:
        start = time.perf_counter()
        work()
        taken = time.perf_counter() - start
        best, spent = min(best, taken), spent + taken
    return best
