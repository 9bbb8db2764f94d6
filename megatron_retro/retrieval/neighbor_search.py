"""The query stage: rows of a neighbour table from query chunks, block after block, by any number of workers."""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import make_folder, remove_leftovers
from megatron_retro.artifacts.manifest import read_manifest, require_same
from megatron_retro.artifacts.verified import Verification
from megatron_retro.data.neighbor_table import (
    NeighborTable,
    TableLayout,
    block_is_done,
    covered,
    finish_table,
    write_block,
)
from megatron_retro.data.query_chunks import QueryChunks
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ConfigError, DamagedArtifact
from megatron_retro.retrieval.faiss_index import set_search_effort
from megatron_retro.retrieval.gpu_index import copy_to_gpus, num_gpus
from megatron_retro.retrieval.index_building import KIND, VERSION, list_checks, open_merged
from megatron_retro.retrieval.index_search import Searcher, SearchResult
from megatron_retro.retrieval.live_index import write_live_settings
from megatron_retro.retrieval.project import Project, QueryCorpus
from megatron_retro.retrieval.query_texts import QueryTexts, query_chunks
from megatron_retro.retrieval.reranking import (
    BATCH_ROWS,
    TokenStatistics,
    drop_leaks,
    refine_by_embedding,
    refine_with_kept,
    rerank,
    statistics_of,
)
from megatron_retro.retrieval.search_device import choose_device
from megatron_retro.retrieval.search_effort import SearchEffort, choose_search_effort
from megatron_retro.retrieval.work_blocks import claim_blocks, ignore_failure_if_done, recompute, uniform_sample
from megatron_retro.runtime.console import Advance, Progress, say, unseen
from megatron_retro.runtime.strict_json import json_text

_ANY_KEY = "[0-9a-f]" * 12
_FORMER_SETTINGS = {"found_by": "index"}  # of tables that do not say


@dataclass(frozen=True)
class NeighborSearch(QueryTexts):
    """Finds the neighbours of a corpus's query chunks: the rows of its table."""

    searcher: Searcher

    @cached_property
    def statistics(self) -> TokenStatistics:
        """How rare tokens are, for BM25."""
        database = self.project.database
        return statistics_of(database, uniform_sample(database.num_chunks, min(database.num_chunks, 200_000)))

    def rows(self, first: int, last: int, advance: Advance | None = None) -> NDArray[np.int64]:
        """Neighbours of the query chunks [first, last), -1 for none; `advance` is told of chunks that are done."""
        config = self.project.config
        keep = config.retro_query_num_neighbors_save
        return self.search(first, last, advance).ids_QK[:, :keep]

    def search(self, first: int, last: int, advance: Advance | None = None) -> SearchResult:
        """The same with distances, and the further candidates."""
        config = self.project.config
        save, numbers = config.retro_query_num_neighbors_save, np.arange(first, last)
        reranks = config.retro_refine or config.retro_rerank != "none" or config.retro_drop_overlap is not None
        candidates = max(save, config.retro_query_num_neighbors_query)
        wanted = candidates if reranks or not self.searcher.by_lists else save
        if config.retro_candidates == "bm25":
            vectors = np.zeros((last - first, 0), np.float32)  # which nothing reads
            found = self.project.bm25.search(
                self.texts(first, last), wanted, self.own_chunks(numbers), advance or unseen
            )
        else:
            vectors = self._vectors_with_progress(first, last) if advance else self.vectors(first, last)
            found = self.searcher.search(vectors, wanted, self.own_chunks(numbers), save, advance)
        if not reranks:
            return found
        if advance is None:
            return self._reranked(found, vectors, first)
        with Progress(f"re-rank {self.corpus.name}", last - first, "chunks") as progress:
            return self._reranked(found, vectors, first, progress.advance)

    def _vectors_with_progress(self, first: int, last: int) -> NDArray[np.float32]:
        with Progress(f"embed {self.corpus.name}", last - first, "chunks") as progress:
            return self.vectors(first, last, progress.advance)

    def _reranked(
        self, found: SearchResult, vectors: NDArray[np.float32], first: int, advance: Advance = unseen
    ) -> SearchResult:
        parts = []
        for start in range(0, len(vectors), BATCH_ROWS):
            some = slice(start, start + BATCH_ROWS)
            batch = SearchResult(found.distances_QK[some], found.ids_QK[some])
            parts.append(self._rerank_batch(batch, vectors[some], first + start))
            advance(len(vectors[some]))
        return SearchResult.joined(parts)

    def _rerank_batch(self, found: SearchResult, vectors: NDArray[np.float32], first: int) -> SearchResult:
        config, database = self.project.config, self.project.database
        last = first + len(vectors)
        if config.retro_refine:
            found = self._refined(found, vectors)
        if config.retro_rerank != "none":
            found = rerank(found, self.texts(first, last), database, config.retro_rerank, self.statistics)
        if config.retro_drop_overlap is not None:
            successors = self.successors(first, last)
            length = self.project.retrieved_length
            found = drop_leaks(found, successors, database, length, config.retro_drop_overlap)
        return found

    def _refined(self, found: SearchResult, vectors: NDArray[np.float32]) -> SearchResult:
        project = self.project
        if project.kept_vectors is not None:
            return refine_with_kept(found, vectors, project.kept_vectors.mapped())
        return refine_by_embedding(found, vectors, project.chunk_vectors, project.memory_bytes / 4)


def query(project: Project) -> None:
    """Fill the table of every query corpus."""
    effort = choose_search_effort(project)
    write_live_settings(project, effort.nprobe, effort.ef_search)
    unfinished = [corpus for corpus in project.query_corpora if not _is_finished(project, corpus, effort)]
    if unfinished:
        searches = open_searches(project, unfinished)
        verification = Verification(list_checks(project.layout.merged, project.worker.index, project.worker.count))
        verification.start()
        for search in searches:
            _fill_table(project, search, verification)
    for corpus in project.query_corpora:
        for place in (project.layout.work(""), project.layout.claims("")):
            for leftover in place.glob(f"neighbors-{glob.escape(corpus.name)}-{_ANY_KEY}"):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_finished(project: Project, corpus: QueryCorpus, effort: SearchEffort) -> bool:
    """Whether a table exists; one with other inputs or settings is refused."""
    path, chunks = project.layout.neighbors(corpus.name), query_chunks(project, corpus)
    if path.exists():
        settings = table_settings(project, effort.nprobe, effort.ef_search)
        check_table(path, table_inputs(project, chunks.file), settings, table_layout(project, corpus, chunks))
    return path.exists()


def _fill_table(project: Project, search: NeighborSearch, verification: Verification) -> None:
    corpus, searcher = search.corpus, search.searcher
    path, layout = project.layout.neighbors(corpus.name), table_layout(project, corpus, search.chunks)
    inputs = table_inputs(project, search.chunks.file)
    settings = table_settings(project, searcher.nprobe, searcher.ef_search)
    # Search methods differ in rounding and ties, so all blocks of one table are searched with the same method.
    config = {**settings, "by_lists": searcher.by_lists, "on_gpus": searcher.gpus is not None}
    key = hashlib.sha256(json_text([inputs, config, layout.row_ranges], sort_keys=True).encode()).hexdigest()[:12]
    name = f"neighbors-{corpus.name}-{key}"
    directory = project.layout.work(name)
    make_folder(directory)
    remove_leftovers(directory)
    blocks = {block.name: block for block in layout.blocks}

    def is_done(block: str) -> bool:
        return path.exists() or block_is_done(directory, layout, blocks[block])

    with Progress(f"query {corpus.name}", layout.num_rows, "rows") as progress:
        progress.advance(sum(block.last - block.first for block in layout.blocks if is_done(block.name)))
        for block in claim_blocks(project.layout, name, list(blocks), is_done, project.worker):
            with ignore_failure_if_done(path.exists):
                found = search.rows(blocks[block].first, blocks[block].last, progress.advance)
                write_block(directory, layout, blocks[block], found)
    try:
        verification.finish()
    except DamagedArtifact:
        shutil.rmtree(directory, ignore_errors=True)  # some of its rows were found in damaged lists
        raise
    again = [block for block in layout.blocks if (directory / block.name).exists()]
    recompute(
        f"query {corpus.name}",
        [directory / block.name for block in again],
        project.config.retro_task_validate,
        lambda number, file: write_block(
            file.parent, layout, again[number], search.rows(again[number].first, again[number].last)
        ),
    )
    for _ in claim_blocks(project.layout, name, ["finish"], lambda _: path.exists(), project.worker):
        make_folder(path.parent)
        with ignore_failure_if_done(path.exists):
            finish_table(directory, path, layout, inputs=inputs, config=config)


def open_searches(project: Project, corpora: Sequence[QueryCorpus]) -> list[NeighborSearch]:
    """A search for each query corpus, all in the project's index, which is opened once."""
    chunks = [query_chunks(project, corpus) for corpus in corpora]
    pairs = list(zip(corpora, chunks, strict=True))
    searcher = _open_searcher(project, sum(table_layout(project, *pair).num_rows for pair in pairs))
    return [NeighborSearch(project, *pair, searcher) for pair in pairs]


def _open_searcher(project: Project, rows: int) -> Searcher:
    """The merged index with its search effort, on the device where this many queries cost least."""
    effort, index = choose_search_effort(project), open_merged(project.layout.merged)
    device = choose_device(project, index, effort.nprobe, rows)
    if num_gpus():
        say(f"search: on {device}")
    if not device.on_gpus:
        return Searcher(index, effort.nprobe, effort.ef_search, effort.by_lists, project.memory_bytes)
    set_search_effort(index, effort.nprobe, effort.ef_search)
    copy = copy_to_gpus(index, index.ntotal)
    return Searcher(index, effort.nprobe, effort.ef_search, False, project.memory_bytes, copy)


def table_layout(project: Project, corpus: QueryCorpus, chunks: QueryChunks) -> TableLayout:
    """The rows that a corpus gets, and how they are cut into blocks."""
    if chunks.num_chunks == 0:
        raise ConfigError(f"{chunks.file.prefix} holds no whole chunk", got=f"{chunks.file.num_tokens} tokens")
    ranges: tuple[tuple[int, int], ...] = ((0, chunks.num_chunks),)
    asked = project.query_rows.get(corpus.name)
    if asked is not None:
        ranges = tuple(part for span in asked for part in covered(ranges, *span))
        if sum(last - first for first, last in ranges) < sum(last - first for first, last in asked):
            raise ConfigError(
                "--retro-query-rows names rows that the corpus does not have",
                got=", ".join(f"{first}:{last}" for first, last in asked),
                expected=f"within 0:{chunks.num_chunks} ({chunks.file.prefix})",
            )
    return TableLayout(project.config.retro_query_num_neighbors_save, ranges, project.config.retro_block_size)


def check_table(path: Path, inputs: dict[str, str], config: dict[str, Any], layout: TableLayout) -> NeighborTable:
    """A finished table; one with other inputs or settings is refused."""
    table = NeighborTable.open(path)
    again = f"remove {path} and query again, or give another --retro-project-dir"
    for name, value in inputs.items():
        require_same(path, name, table.manifest.inputs.get(name), value, again)
    for name, value in config.items():
        require_same(path, name, table.manifest.config.get(name, _FORMER_SETTINGS.get(name)), value, again)
    require_same(path, "the rows", table.layout.row_ranges, layout.row_ranges, again)
    require_same(path, "--retro-query-num-neighbors-save", table.num_saved, layout.saved, again)
    return table


def table_inputs(project: Project, file: TokenFile) -> dict[str, str]:
    """Fingerprints of the corpus, database, embedder and index of a table."""
    index = read_manifest(project.layout.merged, kind=KIND, version=VERSION)
    return {
        "corpus": file.fingerprint,
        "database": project.database.fingerprint,
        "embedder": project.embedder.fingerprint,
        "index": index.fingerprint,
    }


def table_settings(project: Project, nprobe: int, ef_search: int) -> dict[str, Any]:
    """The settings of a table's search, for its manifest."""
    config = project.config
    return {
        "chunk_length": project.database.chunk_length,
        "nprobe": nprobe,
        "ef_search": ef_search,
        "candidates": config.retro_query_num_neighbors_query,
        "found_by": config.retro_candidates,
        "refine": config.retro_refine,
        "rerank": config.retro_rerank,
        "drop_overlap": config.retro_drop_overlap,
    }
