"""Which embedder finds text that helps: exact neighbours in a sample of the database, by what they share.

What a neighbour and its continuation share with the text AFTER the query chunk is what a model can gain from it;
random neighbours are the floor. Run by `--retro-verify-embedders`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.retrieval.embedders import Embedder, build_embedder
from megatron_retro.retrieval.native import longest_common_runs, token_overlaps
from megatron_retro.retrieval.neighbor_search import NeighborSearch
from megatron_retro.retrieval.reordering import Texts
from megatron_retro.retrieval.training import sampled_vectors, uniform_sample

POOL_CHUNKS = 4000
_QUERIES = 200


def compare_embedders(search: NeighborSearch, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row of figures per embedder, after one for random neighbours; nothing when none is asked for."""
    if not kinds:
        return []
    project = search.project
    pool = uniform_sample(project.database.num_chunks, min(POOL_CHUNKS, project.database.num_chunks))
    numbers = uniform_sample(search.chunks.num_chunks, min(_QUERIES, search.chunks.num_chunks))
    random = np.random.default_rng(0).integers(0, len(pool), (len(numbers), 2))
    rows = [{"embedder": "random", **_shared(search, numbers, pool[random]), "chunks per second": None}]
    for kind in kinds:
        config = replace(project.settings[EmbedderConfig], retro_embedder=kind)
        embedder = build_embedder(config, project.tokenizer)
        start = time.perf_counter()
        chunks = sampled_vectors(project.database, embedder, pool)
        rate = len(pool) / (time.perf_counter() - start)
        nearest = _nearest(search, embedder, numbers, pool, chunks)
        rows.append({"embedder": kind, **_shared(search, numbers, nearest), "chunks per second": rate})
    return rows


def _nearest(
    search: NeighborSearch,
    embedder: Embedder,
    numbers: NDArray[np.int64],
    pool: NDArray[np.int64],
    chunks: NDArray[np.float32],
) -> NDArray[np.int64]:
    texts = _texts([search.texts(int(number), int(number) + 1) for number in numbers])
    queries = embedder.embed(texts.tokens_NM, texts.present_NM)
    distances = np.square(chunks).sum(axis=1) - 2 * queries @ chunks.T
    own = search.own_chunks(numbers)
    distances[(pool >= own.first[:, None]) & (pool < own.last[:, None])] = np.inf
    order = np.argsort(distances, axis=1)[:, :2]
    return np.where(np.isfinite(np.take_along_axis(distances, order, axis=1)), pool[order], -1)


def _shared(search: NeighborSearch, numbers: NDArray[np.int64], ids: NDArray[np.int64]) -> dict[str, float]:
    project, length = search.project, search.chunks.chunk_length
    tokens, there = project.database.gather(ids, project.retrieved_length)
    texts = _texts([search.texts(int(number), int(number) + 1) for number in numbers])
    after = _texts([search.successors(int(number), int(number) + 1) for number in numbers])
    with_query = token_overlaps(texts.tokens_NM, texts.present_NM, tokens[..., :length], there[..., :length])
    with_after = token_overlaps(after.tokens_NM, after.present_NM, tokens, there)
    runs = longest_common_runs(after.tokens_NM, after.present_NM, tokens, there)
    return {
        "shared with the chunk": float(with_query.mean()),
        "shared with what follows": float(with_after.mean()),
        "longest run of what follows": float(runs.max(axis=1).mean()),
    }


def _texts(parts: list[Texts]) -> Texts:
    return Texts(
        np.concatenate([part.tokens_NM for part in parts]), np.concatenate([part.present_NM for part in parts])
    )
