"""The plan stage: files, memory and time of a build, estimated before it runs.

Sizes of files are arithmetic and exact (codes of blocks: to within their headers). Times are this machine's speeds
times the operations of each stage, for one worker; stages split over workers evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_retro.data.neighbor_table import ID_BYTES
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS
from megatron_retro.retrieval.faiss_index import InvertedParts, faiss_module, inverted_parts, new_index, searched_index
from megatron_retro.retrieval.index_building import LISTS_FILE, SEGMENT_BYTES
from megatron_retro.retrieval.index_choice import is_clustered_in_parts, training_bytes
from megatron_retro.retrieval.index_training import TRANSFORM_CHUNKS, training_place
from megatron_retro.retrieval.neighbor_search import table_layout
from megatron_retro.retrieval.project import Project, QueryCorpus
from megatron_retro.retrieval.query_texts import query_chunks
from megatron_retro.retrieval.reranking import BATCH_ROWS
from megatron_retro.retrieval.sample_clustering import ROUNDS
from megatron_retro.retrieval.search_device import DeviceChoice, OperationSeconds, choose_device, measure_operations
from megatron_retro.retrieval.search_effort import can_calibrate
from megatron_retro.runtime.console import readable_bytes, readable_count, readable_seconds, render_table

_KMEANS_POINTS = 256
_EXACT_UP_TO_BYTES = 1 << 29
_WRITE_BYTES_PER_SECOND = 4e8
_ID_BYTES = 8


@dataclass(frozen=True)
class StageCost:
    """What a stage costs one worker; `most_seconds` where it depends on the calibration of nprobe."""

    stage: str
    seconds: float
    memory_bytes: float
    most_seconds: float | None = None

    @property
    def time(self) -> str:
        """For a table."""
        most = "" if self.most_seconds is None else f" to {readable_seconds(self.most_seconds)}"
        return readable_seconds(self.seconds) + most


@dataclass(frozen=True)
class BuildEstimate:
    """The tables that the plan stage prints."""

    facts: dict[str, str]
    files: dict[str, int]
    costs: tuple[StageCost, ...]

    def text(self) -> str:
        """Tables for a console."""
        facts = "\n".join(f"{name:<22} {value}" for name, value in self.facts.items())
        files = [(name, f"{size:,}", readable_bytes(size)) for name, size in self.files.items()]
        costs = [(one.stage, one.time, readable_bytes(one.memory_bytes)) for one in self.costs]
        return "\n\n".join(
            [
                facts,
                render_table(("file", "bytes", ""), files),
                render_table(("stage", "one worker here", "memory"), costs),
            ]
        )


def estimate_build(project: Project) -> BuildEstimate:
    """Measure this machine for a second and multiply by the operations of each stage."""
    index = new_index(project.choice.index_str, project.embedder.dimension)
    parts = inverted_parts(index)
    chunks = sum(block.size for block in project.blocks)
    rows = {corpus.name: _rows(project, corpus) for corpus in project.query_corpora}
    width = parts.dimension if parts else project.embedder.dimension
    speeds = measure_operations(project, width)
    choice = project.choice
    device = choose_device(project, index, _nprobe(project), sum(rows.values()), speeds.score)
    facts = {
        "database": f"{project.database.num_chunks:,} chunks of {project.database.chunk_length}, "
        f"{project.database.num_documents:,} documents",
        "index": choice.index_str,
        "trained on": f"{project.index_spec['train_chunks']:,} chunks",
        "blocks": f"{len(project.blocks):,} of {project.config.retro_block_size:,} chunks",
        "queries": ", ".join(f"{name}: {readable_count(count)} rows" for name, count in rows.items()),
        "lists searched": _lists_searched(project, parts, chunks),
        "training": training_place(project, parts),
        "searching": str(device),
    }
    return BuildEstimate(
        facts, _files(project, parts, chunks, rows), _costs(project, parts, chunks, rows, speeds, device)
    )


def _rows(project: Project, corpus: QueryCorpus) -> int:
    return table_layout(project, corpus, query_chunks(project, corpus)).num_rows


def _nprobe(project: Project) -> int:
    return project.config.retro_query_nprobe or project.choice.nprobe


def _lists_searched(project: Project, parts: InvertedParts | None, chunks: int) -> str:
    if parts is None or not _will_calibrate(project, chunks):
        return str(_nprobe(project))
    return f"{_nprobe(project)} to {parts.num_lists}: calibrated once the index is there, or --retro-query-nprobe"


def _will_calibrate(project: Project, chunks: int) -> bool:
    index = new_index(project.choice.index_str, project.embedder.dimension)
    return project.config.retro_query_nprobe is None and can_calibrate(index, chunks)


def _files(project: Project, parts: InvertedParts | None, chunks: int, rows: dict[str, int]) -> dict[str, int]:
    dimension, saved = project.embedder.dimension, project.config.retro_query_num_neighbors_save
    files = {"database": 8 * (project.database.num_documents + 1)}
    if parts is None:
        files["index/codes (vectors)"] = chunks * dimension * 4
        index = new_index(project.choice.index_str, dimension)
        files["index/merged/index.faiss (about)"] = chunks * _bytes_of_vector(index)
    else:
        files["index/codes"] = chunks * (parts.code_size + 8)
        files["index/merged/lists.ivfdata"] = chunks * (parts.code_size + 8)
        files["index/merged/index.faiss"] = index_file_bytes(project.choice.index_str, dimension)
    if project.config.retro_keep_embeddings:
        files["index/embeddings"] = project.database.num_chunks * dimension * 2
    files.update({f"neighbors/{name}": count * saved * ID_BYTES for name, count in rows.items()})
    return files


def _bytes_of_vector(index: Any) -> int:
    """Bytes per vector in an index that is filled in memory: its code, links of a graph, an id in a list."""
    faiss = faiss_module()
    searched = searched_index(index)
    if hasattr(searched, "hnsw"):
        ground, upper = searched.hnsw.nb_neighbors(0), searched.hnsw.nb_neighbors(1)
        links = ground + upper / max(1, upper - 1)
        return _bytes_of_vector(faiss.downcast_index(searched.storage)) + int(4 * links) + 12
    if isinstance(searched, faiss.IndexRefine):
        stores = (searched.base_index, searched.refine_index)
        return sum(int(_bytes_of_vector(faiss.downcast_index(store))) for store in stores)
    return int(searched.code_size) + (_ID_BYTES if isinstance(searched, faiss.IndexIVF) else 0)


def index_file_bytes(index_str: str, dimension: int) -> int:
    """Bytes of the file that describes the index: transforms, list finder, places of lists."""
    index = new_index(index_str, dimension)
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("only an inverted file has such a file")
    lists, width = parts.num_lists, parts.dimension
    if lists * width * 4 <= _EXACT_UP_TO_BYTES:
        return _described_bytes(index, parts, lists)
    small = max(1, _EXACT_UP_TO_BYTES // (8 * width))
    sample = new_index(index_str.replace(f"IVF{lists}", f"IVF{small}"), dimension)
    smaller = inverted_parts(sample)
    return round(_described_bytes(sample, smaller, small) * lists / small) if smaller else 0


def _described_bytes(index: Any, parts: InvertedParts, lists: int) -> int:
    """The size of an index file with empty lists on disk and a list finder filled with zeros."""
    faiss = faiss_module()
    finder = faiss.downcast_index(parts.inverted.quantizer)
    storage = faiss.downcast_index(finder.storage) if hasattr(finder, "storage") else finder
    storage.add(np.zeros((lists, parts.dimension), np.float32))
    if hasattr(finder, "hnsw"):
        finder.hnsw.prepare_level_tab(lists, False)
        finder.ntotal = lists
    if hasattr(parts.inverted, "pq"):
        quantizer = parts.inverted.pq
        _fill(quantizer.centroids, quantizer.M * quantizer.ksub * quantizer.dsub)
    if hasattr(parts.inverted, "sq"):
        parts.inverted.sq.train(np.zeros((2, parts.dimension), np.float32))
    for number in range(index.chain.size() if index is not parts.inverted else 0):
        _fill_transform(faiss.downcast_VectorTransform(index.chain.at(number)))
    ondisk = faiss.OnDiskInvertedLists()
    ondisk.nlist, ondisk.code_size, ondisk.read_only, ondisk.filename = lists, parts.code_size, True, LISTS_FILE
    ondisk.lists.resize(lists)
    parts.inverted.replace_invlists(ondisk, False)
    return int(faiss.serialize_index(index).size)


def _fill_transform(transform: Any) -> None:
    """Give a transform the arrays that training would."""
    wide, narrow = int(transform.d_in), int(transform.d_out)
    if hasattr(transform, "A"):
        _fill(transform.A, wide * narrow)
    if hasattr(transform, "pca_then_itq"):
        _fill(transform.mean, wide)
        _fill(transform.itq.A, narrow * narrow)
        _fill(transform.pca_then_itq.A, wide * narrow)
    if hasattr(transform, "eigenvalues"):
        for vector, size in (("mean", wide), ("eigenvalues", wide), ("PCAMat", wide * wide), ("b", narrow)):
            _fill(getattr(transform, vector), size)


def _fill(vector: Any, size: int) -> None:
    faiss_module().copy_array_to_vector(np.zeros(size, np.float32), vector)


def _costs(
    project: Project,
    parts: InvertedParts | None,
    chunks: int,
    rows: dict[str, int],
    speeds: OperationSeconds,
    device: DeviceChoice,
) -> tuple[StageCost, ...]:
    sample, dimension = int(project.index_spec["train_chunks"]), project.embedder.dimension
    width, lists = (parts.dimension, parts.num_lists) if parts else (dimension, 1)
    code = parts.code_size if parts else 4 * dimension
    points = sample if is_clustered_in_parts(lists, sample) else min(sample, _KMEANS_POINTS * lists)
    assign = _assign_seconds(project.choice.index_str, lists, width, speeds)
    quantize = 256 * width * speeds.multiply_add if "PQ" in project.choice.index_str else 0.0
    train = sample * speeds.chunk_vector + ROUNDS * points * lists * width * speeds.multiply_add
    written = chunks * (code + 8) / _WRITE_BYTES_PER_SECOND
    score = device.speeds.score if device.on_gpus and device.speeds else speeds.score
    per_query = speeds.embed_chunk + assign + min(_nprobe(project), lists) * chunks / lists * score
    every_list = max(0, lists - _nprobe(project)) * chunks / lists * score if _will_calibrate(project, chunks) else 0.0
    if project.config.retro_refine and project.kept_vectors is None:
        # As if no two queries of a batch shared a candidate; the database is the most that a batch can need.
        candidates = min(project.config.retro_query_num_neighbors_query, chunks / BATCH_ROWS)
        per_query += candidates * speeds.chunk_vector
    queried, checked = sum(rows.values()), min(project.config.retro_verify_queries, max(rows.values())) * len(rows)
    verify = len(rows) * chunks * speeds.chunk_vector + checked * (chunks * speeds.score + 8 * per_query)
    block = project.config.retro_block_size
    learning = training_bytes(lists, sample, width) + (TRANSFORM_CHUNKS * dimension * 8 if width < dimension else 0)
    return (
        StageCost("train", train, learning),
        StageCost("encode", chunks * (speeds.chunk_vector + assign + quantize) + written, block * (2 * code + 48)),
        StageCost("merge", 2 * written, min(SEGMENT_BYTES, project.memory_bytes / 4) * 2),
        StageCost(
            "query",
            queried * per_query,
            min(project.memory_bytes, block * (8 * dimension + 2000.0)),
            queried * (per_query + every_list) if every_list else None,
        ),
        StageCost("verify", verify, BATCH_CHUNKS * (4.0 * dimension + 8 * project.config.retro_verify_queries)),
    )


def _assign_seconds(index_str: str, lists: int, width: int, speeds: OperationSeconds) -> float:
    if "HNSW" in index_str:
        return speeds.hnsw_assign * float(np.log2(max(lists, 2)))
    return lists * width * speeds.multiply_add
