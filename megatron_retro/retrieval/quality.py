"""How good a neighbour table is: recall, effort, leaks, absences, distances, shared tokens.

Every figure is measured on the table as it is on disk. The audit for leaks proves itself on planted ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.reporting.quality_page import Audit, Closeness, Effort, Histogram, ListBalance, Recall
from megatron_retro.retrieval.exact_search import Truth, distances_to, exact_neighbors
from megatron_retro.retrieval.list_join import Found
from megatron_retro.retrieval.native import longest_common_runs, token_overlaps
from megatron_retro.retrieval.neighbor_search import NeighborSearch
from megatron_retro.retrieval.training import uniform_sample

RECALL_AT = (1, 2, 10, 20)
_AUDIT_ROWS = 1 << 16
_PLANTED = 100
_BINS = 40


@dataclass(frozen=True)
class SampledRows:
    """Rows of a table that are looked at closely, with their vectors and exact neighbours."""

    numbers: NDArray[np.int64]
    ids_QK: NDArray[np.int64]
    truth: Truth


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
    """Recall at several depths with a 95 % interval; a chunk as near as a true neighbour counts as one."""
    distances = distances_to(search.project, rows.truth.vectors, ids_QK)
    found = Found(np.sort(distances, axis=1), ids_QK)
    result = {}
    for depth in (depth for depth in RECALL_AT if depth <= ids_QK.shape[1]):
        shares = row_recalls(found, rows.truth.found, depth)
        margin = 1.96 * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else 1.0
        mean = float(shares.mean())
        result[str(depth)] = Recall(mean, max(0.0, mean - margin), min(1.0, mean + margin))
    return result


def row_recalls(found: Found, truth: Found, depth: int) -> NDArray[np.float64]:
    """Per row, the share of the `depth` true neighbours that were found; 1 where there are none."""
    true = truth.distances_QK[:, :depth]
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
        found = searcher.search(rows.truth.vectors, 20, own, 20)
        seconds = clock() - start
        exact = distances_to(search.project, rows.truth.vectors, found.ids_QK)
        share = row_recalls(Found(np.sort(exact, axis=1), found.ids_QK), rows.truth.found, 2)
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
    own = search.own_chunks(np.arange(first, first + len(ids)))
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
    distances = distances_to(project, rows.truth.vectors, nearest)
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
