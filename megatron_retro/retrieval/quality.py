"""How good a neighbour table is: recall, effort, leaks, absences, distances, shared tokens.

Every figure is measured on the table as it is on disk. The audit for leaks proves itself on planted ones.

Embedders are compared on a sample of the database (`--retro-verify-embedders`): what a neighbour and its continuation
share with the text AFTER the query chunk is what a model can gain from it; random neighbours are the floor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.reporting.quality_page import Audit, Closeness, Effort, Histogram, ListBalance, Recall
from megatron_retro.retrieval.chunk_vectors import EmbeddedChunks
from megatron_retro.retrieval.embedders import Embedder, build_embedder
from megatron_retro.retrieval.exact_search import ExactNeighbors, distances_to, exact_neighbors
from megatron_retro.retrieval.index_search import SearchResult
from megatron_retro.retrieval.index_training import sampled_vectors
from megatron_retro.retrieval.native import longest_common_runs, token_overlaps
from megatron_retro.retrieval.neighbor_search import NeighborSearch
from megatron_retro.retrieval.reranking import MaskedTokens
from megatron_retro.retrieval.work_blocks import uniform_sample

RECALL_AT = (1, 2, 10, 20)
_AUDIT_ROWS = 1 << 16
_PLANTED = 100
_BINS = 40


@dataclass(frozen=True)
class SampledRows:
    """A sample of a table's rows, with their vectors and exact neighbours."""

    numbers: NDArray[np.int64]
    ids_QK: NDArray[np.int64]
    exact: ExactNeighbors


def sampled_rows(search: NeighborSearch, table: NeighborTable, size: int) -> SampledRows:
    """A uniform sample of the covered rows, searched exactly."""
    numbers = covered_rows(table, uniform_sample(table.layout.num_rows, min(size, table.layout.num_rows)))
    ids = np.concatenate([table.rows(int(number), int(number) + 1) for number in numbers])
    vectors = np.concatenate([search.vectors(int(number), int(number) + 1) for number in numbers])
    keep = max(RECALL_AT)
    return SampledRows(numbers, ids, exact_neighbors(search.project, vectors, search.own_chunks(numbers), keep))


def covered_rows(table: NeighborTable, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers of the given places among the rows that a table has."""
    starts = np.cumsum([0, *(last - first for first, last in table.row_ranges)])
    owner = np.searchsorted(starts, places, side="right") - 1
    firsts = np.array([first for first, _ in table.row_ranges], np.int64)
    numbers: NDArray[np.int64] = firsts[owner] + places - starts[owner]
    return numbers


def recalls(rows: SampledRows, ids_QK: NDArray[np.int64], search: NeighborSearch) -> dict[str, Recall]:
    """Recall at several depths with a 95 % interval; a chunk as near as a true neighbour counts as found."""
    distances = distances_to(search.project, rows.exact.vectors, ids_QK)
    found = SearchResult(np.sort(distances, axis=1), ids_QK)
    result = {}
    for depth in (depth for depth in RECALL_AT if depth <= ids_QK.shape[1]):
        shares = row_recalls(found, rows.exact.found, depth)
        margin = 1.96 * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else 1.0
        mean = float(shares.mean())
        result[str(depth)] = Recall(mean, max(0.0, mean - margin), min(1.0, mean + margin))
    return result


def row_recalls(found: SearchResult, exact: SearchResult, depth: int) -> NDArray[np.float64]:
    """Per row, the share of the `depth` true neighbours that were found; 1 where there are none."""
    true = exact.distances_QK[:, :depth]
    there = np.isfinite(true).sum(axis=1)
    worst = np.where(np.isfinite(true), true, -np.inf).max(axis=1, keepdims=True)
    hits = (found.distances_QK[:, :depth] <= worst * (1 + 1e-4) + 1e-5).sum(axis=1)
    return np.where(there > 0, np.minimum(hits, there) / np.maximum(there, 1), 1.0)


def effort_sweep(search: NeighborSearch, rows: SampledRows, efforts: Sequence[int]) -> list[Effort]:
    """Recall@2 and time per query at several numbers of lists (or efSearch, where there are no lists)."""
    own, points = search.own_chunks(rows.numbers), []
    current = search.searcher
    for effort in efforts:
        searcher = replace(current, nprobe=effort, ef_search=max(effort, 16))
        clock = time.process_time if current.gpus is None else time.perf_counter
        start = clock()
        found = searcher.search(rows.exact.vectors, 20, own, 20)
        seconds = clock() - start
        exact = distances_to(search.project, rows.exact.vectors, found.ids_QK)
        share = row_recalls(SearchResult(np.sort(exact, axis=1), found.ids_QK), rows.exact.found, 2)
        cost = seconds * 1000 / len(rows.numbers)
        points.append(Effort(effort, float(share.mean()), cost))
    replace(current)  # sets the effort in use again
    return points


def audit(search: NeighborSearch, table: NeighborTable, limit: int) -> Audit:
    """Leaks, absences and repetitions over up to `limit` rows, and whether planted leaks are seen."""
    rows = leaks = missing = repeated = empty = planted = seen = 0
    step = max(1, min(_AUDIT_ROWS, limit))
    for first, last in table.row_ranges:
        for start in range(first, last, step):
            if rows >= limit:
                break
            stop = min(start + step, last)
            ids = table.rows(start, stop)
            rows += len(ids)
            leaks += int(leaking(search, start, ids).sum())
            missing += int((ids < 0).sum())
            empty += int((ids < 0).all(axis=1).sum())
            ordered = np.sort(ids, axis=1)
            repeated += int(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum())
            hidden, found = _planted_leaks(search, start, ids)
            planted, seen = planted + hidden, seen + found
    cells = max(rows * table.num_saved, 1)
    return Audit(
        rows=rows,
        leaks=leaks,
        missing_share=missing / cells,
        empty_rows_share=empty / max(rows, 1),
        repeated=repeated,
        planted_leaks=planted,
        planted_leaks_seen=seen,
    )


def leaking(search: NeighborSearch, first: int, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which neighbours come from a document that their query chunk has a token of; by documents, not by chunk ids."""
    database, chunks = search.project.database, search.chunks
    numbers = np.arange(first, first + len(ids))
    low, high = database.map_documents(chunks.file.fingerprint, *chunks.documents(numbers))
    documents = database.document_of(np.maximum(ids, 0))
    found: NDArray[np.bool_] = (documents >= low[:, None]) & (documents < high[:, None]) & (ids >= 0)
    return found


def _planted_leaks(search: NeighborSearch, first: int, ids: NDArray[np.int64]) -> tuple[int, int]:
    """How many leaks were hidden in a copy of some rows, and how many the audit found there."""
    own = search.own_chunks(np.arange(first, first + len(ids)), following=0)
    rows = np.flatnonzero(own.last > own.first)[:_PLANTED]
    copy = ids.copy()
    before = int(leaking(search, first, copy).sum())
    columns = np.arange(len(rows)) % ids.shape[1]
    copy[rows, columns] = np.where(np.arange(len(rows)) % 2, own.first[rows], own.last[rows] - 1)
    return len(rows), int(leaking(search, first, copy).sum()) - before


def closeness(search: NeighborSearch, rows: SampledRows) -> Closeness:
    """Histograms of distances and shared tokens of the nearest neighbours, and how much they leak of what follows."""
    project, numbers = search.project, rows.numbers
    nearest = rows.ids_QK[:, :2]
    distances = distances_to(project, rows.exact.vectors, nearest)
    texts = [search.texts(int(number), int(number) + 1) for number in numbers]
    after = [search.successors(int(number), int(number) + 1) for number in numbers]
    tokens, there = project.database.gather(nearest, project.retrieved_length)
    length = project.database.chunk_length
    shared = token_overlaps(
        np.concatenate([text.tokens_NM for text in texts]),
        np.concatenate([text.present_NM for text in texts]),
        tokens[..., :length],
        there[..., :length],
    )
    runs = longest_common_runs(
        np.concatenate([text.tokens_NM for text in after]),
        np.concatenate([text.present_NM for text in after]),
        tokens,
        there,
    )
    exists = nearest >= 0
    return Closeness(
        distance=_histogram(distances[exists]),
        overlap=_histogram(shared[exists], 0.0, 1.0),
        successor_run=_histogram(runs.max(axis=1) / length, 0.0, 1.0),
        same_text_share=float(((shared >= 1.0) & exists).sum() / max(exists.sum(), 1)),
        mean_overlap=float(shared[exists].mean()) if exists.any() else 0.0,
        successor_run_above_half=float((runs.max(axis=1) > length / 2).mean()),
    )


def list_balance(sizes: NDArray[np.int64]) -> ListBalance:
    """How evenly chunks lie in the inverted lists; 1 is even, K is all in one of K."""
    total = float(sizes.sum())
    return ListBalance(
        lists=len(sizes),
        imbalance=float(len(sizes) * np.square(sizes, dtype=np.float64).sum() / max(total * total, 1.0)),
        largest=int(sizes.max(initial=0)),
        empty=int((sizes == 0).sum()),
        sizes=_histogram(sizes.astype(np.float64)),
    )


def _histogram(values: NDArray[Any], low: float | None = None, high: float | None = None) -> Histogram:
    if not len(values):
        return Histogram()
    low = float(values.min()) if low is None else low
    high = max(float(values.max()) if high is None else high, low + 1e-6)
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    return Histogram(counts.astype(float).tolist(), edges.tolist())


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
        chunks = sampled_vectors(EmbeddedChunks(project.database, embedder), pool)
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
    texts = _concatenated([search.texts(int(number), int(number) + 1) for number in numbers])
    queries = embedder.embed(texts.tokens_NM, texts.present_NM)
    distances = np.square(chunks).sum(axis=1) - 2 * queries @ chunks.T
    own = search.own_chunks(numbers)
    distances[(pool >= own.first[:, None]) & (pool < own.last[:, None])] = np.inf
    order = np.argsort(distances, axis=1)[:, :2]
    return np.where(np.isfinite(np.take_along_axis(distances, order, axis=1)), pool[order], -1)


def _shared(search: NeighborSearch, numbers: NDArray[np.int64], ids: NDArray[np.int64]) -> dict[str, float]:
    project, length = search.project, search.chunks.chunk_length
    tokens, there = project.database.gather(ids, project.retrieved_length)
    texts = _concatenated([search.texts(int(number), int(number) + 1) for number in numbers])
    after = _concatenated([search.successors(int(number), int(number) + 1) for number in numbers])
    with_query = token_overlaps(texts.tokens_NM, texts.present_NM, tokens[..., :length], there[..., :length])
    with_after = token_overlaps(after.tokens_NM, after.present_NM, tokens, there)
    runs = longest_common_runs(after.tokens_NM, after.present_NM, tokens, there)
    return {
        "shared with the chunk": float(with_query.mean()),
        "shared with what follows": float(with_after.mean()),
        "longest run of what follows": float(runs.max(axis=1).mean()),
    }


def _concatenated(parts: list[MaskedTokens]) -> MaskedTokens:
    return MaskedTokens(
        np.concatenate([part.tokens_NM for part in parts]), np.concatenate([part.present_NM for part in parts])
    )
