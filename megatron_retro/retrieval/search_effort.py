"""The search effort (nprobe, efSearch): from flags, or the least that has nearly the recall of a full search.

Calibration compares searches of a sample at rising numbers of lists with a search of all lists of the same index.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import read_manifest, read_sealed_json, write_sealed_json
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.faiss_index import inverted_parts, new_index
from megatron_retro.retrieval.index_building import KIND, VERSION, open_merged
from megatron_retro.retrieval.index_search import ExcludedIds, Searcher, SearchResult, can_search_by_lists
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.query_texts import QueryTexts, query_chunks
from megatron_retro.retrieval.work_blocks import claim_blocks, uniform_sample
from megatron_retro.runtime.console import Progress, say

_SAMPLE = 2000
_WANTED_RECALL = 0.97
_CALIBRATED_UP_TO = 30_000_000


@dataclass(frozen=True)
class SearchEffort:
    """How many lists a query probes, efSearch of a graph, and whether the search goes list by list."""

    nprobe: int
    ef_search: int
    by_lists: bool


def choose_search_effort(project: Project) -> SearchEffort:
    """The effort that flags set, or that is calibrated once per index."""
    config, index = project.config, open_merged(project.layout.merged)
    ef_search = config.retro_query_ef_search or project.choice.ef_search
    if config.retro_query_nprobe is not None:
        nprobe = config.retro_query_nprobe
    elif can_calibrate(index, index.ntotal):
        nprobe = _calibrated_nprobe(project, index, ef_search)
    else:
        nprobe = project.choice.nprobe
    parts = inverted_parts(index)
    nprobe = min(nprobe, parts.num_lists) if parts else nprobe
    by_lists = _by_lists(config.retro_query_method, index, _lists_are_probed_often(project, nprobe))
    return SearchEffort(nprobe, ef_search, by_lists)


def _lists_are_probed_often(project: Project, nprobe: int) -> bool:
    """Whether several queries of a block probe the same list: only then is searching list by list cheaper."""
    rows = max(TokenFile(corpus.prefix).num_tokens for corpus in project.query_corpora) // project.database.chunk_length
    parts = inverted_parts(new_index(project.choice.index_str, project.embedder.dimension))
    return parts is not None and min(rows, project.config.retro_block_size) * nprobe >= 2 * parts.num_lists


def _by_lists(asked: str, index: Any, shared: bool) -> bool:
    if asked == "lists" and not can_search_by_lists(index):
        raise ConfigError(
            "this index cannot be searched list by list",
            got=type(index).__name__,
            expected="inverted lists of whole vectors, scalar- or product-quantized codes, and the compiled extension",
            fix="give --retro-query-method queries",
        )
    return asked == "lists" or (asked == "auto" and shared and can_search_by_lists(index))


def can_calibrate(index: Any, num_chunks: int) -> bool:
    """Whether all lists can be searched, to compare with, at an acceptable cost."""
    parts = inverted_parts(index)
    return parts is not None and parts.num_lists > 1 and can_search_by_lists(index) and num_chunks <= _CALIBRATED_UP_TO


def _calibrated_nprobe(project: Project, index: Any, ef_search: int) -> int:
    """The calibrated nprobe; one worker measures it, the others read it."""
    manifest = read_manifest(project.layout.merged, kind=KIND, version=VERSION)
    path = project.layout.work(f"calibration-{manifest.fingerprint[:12]}-{ef_search}.json")
    for _ in claim_blocks(project.layout, "calibrate", [path.name], lambda _: path.exists(), project.worker):
        write_sealed_json(path, _calibrate(project, index, ef_search))
    fields = {*SearchEffort.__dataclass_fields__, "recalls"}
    return int(read_sealed_json(path, fields, fix="remove it: it is measured again")["nprobe"])


def _calibrate(project: Project, index: Any, ef_search: int) -> dict[str, Any]:
    vectors, own = _sampled_queries(project)
    lists = inverted_parts(index)
    all_lists = lists.num_lists if lists else 1
    with Progress("calibrate", None, "lists") as progress:

        def search(nprobe: int) -> SearchResult:
            def advance(queries: float) -> None:
                progress.advance(queries * nprobe / len(vectors), f"in searches of {nprobe}")

            return Searcher(index, nprobe, ef_search, True, project.memory_bytes).search(vectors, 2, own, 2, advance)

        full, recalls = search(all_lists), {0: 0.0}
        for nprobe in _rising_efforts(all_lists):
            too_few = max(recalls)
            recalls[nprobe] = recall(search(nprobe), full)
            if recalls[nprobe] >= _WANTED_RECALL:
                break
        enough = max(recalls)
        while enough - too_few > max(1, enough // 16):
            middle = (too_few + enough) // 2
            recalls[middle] = recall(search(middle), full)
            too_few, enough = (too_few, middle) if recalls[middle] >= _WANTED_RECALL else (middle, enough)
    say(f"calibrate: {enough} of {all_lists} lists find {recalls[enough]:.1%} of what all find")
    return {**asdict(SearchEffort(enough, ef_search, True)), "recalls": recalls}


def _sampled_queries(project: Project) -> tuple[NDArray[np.float32], ExcludedIds]:
    """Vectors of query chunks, evenly from all corpora, and the chunks of their own documents."""
    vectors, first, last = [], [], []
    for corpus in project.query_corpora:
        queries = QueryTexts(project, corpus, query_chunks(project, corpus))
        share = min(-(-_SAMPLE // len(project.query_corpora)), queries.chunks.num_chunks)
        numbers = uniform_sample(queries.chunks.num_chunks, share)
        own = queries.own_chunks(numbers)
        vectors += [queries.vectors(number, number + 1) for number in numbers.tolist()]
        first.append(own.first)
        last.append(own.last)
    return np.concatenate(vectors), ExcludedIds(np.concatenate(first), np.concatenate(last))


def recall(found: SearchResult, full: SearchResult) -> float:
    """The share of the full search's candidates that were found; a tie in distance counts as found."""
    there = full.ids_QK >= 0
    if not there.any():
        return 1.0
    worst = np.where(there, full.distances_QK, -np.inf).max(axis=1, keepdims=True)
    hits = np.minimum((found.distances_QK <= worst * (1 + 1e-5) + 1e-6).sum(axis=1), there.sum(axis=1))
    return float(hits.sum() / there.sum())


def _rising_efforts(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, .. up to the number of lists."""
    values = sorted({factor << power for power in range(32) for factor in (2, 3)} | {1})
    return [*(value for value in values if value < limit), limit]
