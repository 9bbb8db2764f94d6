"""The data side: bytes and hours of token files, index and neighbour table; what is wrong with those that are there.

The rates are those of the published build; `build-retrieval --retro-tasks plan` measures a machine's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.retrieval import RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import MegatronRetroError
from megatron_retro.planning.workload import workload_of
from megatron_retro.runtime.console import readable_bytes, readable_count, readable_seconds

EMBEDDED_CHUNKS_PER_GPU_HOUR = 6.22e6  # published: BERT-large on an A100
ADDED_CHUNKS_PER_CPU_HOUR = 19e9 / 192  # published
QUERIES_PER_CPU_HOUR = 1.56e9 / 1736  # published, nprobe 4096
TOKENIZED_PER_CPU_HOUR = 1.16e6 * 3600  # measured: Megatron's own preprocessing, sentencepiece BPE, one core
CODE_BYTES, ID_BYTES, TABLE_ID_BYTES = 64, 8, 5


@dataclass(frozen=True)
class DataEstimate:
    """Bytes and hours."""

    corpus_tokens: float
    database_chunks: float
    queries: float
    token_file_bytes: float
    database_bytes: float
    index_bytes: float
    table_bytes: float
    tokenize_cpu_hours: float
    embed_gpu_hours: float
    add_cpu_hours: float
    query_cpu_hours: float


def data_estimate(settings: Settings) -> DataEstimate:
    """The data that a run needs: its whole corpus as database, its own tokens as queries."""
    planning, retro, retrieval = settings[PlanningConfig], settings[RetroConfig], settings[RetrievalConfig]
    work = workload_of(settings)
    corpus = float(planning.plan_corpus_tokens or work.num_tokens)
    database = float(planning.plan_database_tokens or corpus)
    chunks = _chunks(database, retro.retro_chunk_length, planning.plan_document_tokens)
    queries = min(work.num_tokens, corpus) / retro.retro_chunk_length
    token_bytes = 2 if (settings[ModelConfig].vocab_size or 0) < 65_500 else 4
    return DataEstimate(
        corpus_tokens=corpus,
        database_chunks=chunks,
        queries=queries,
        token_file_bytes=corpus * token_bytes,
        database_bytes=8 * database / planning.plan_document_tokens,
        index_bytes=chunks * (_code_bytes(retrieval.retro_index_str) + ID_BYTES),
        table_bytes=queries * TABLE_ID_BYTES * retrieval.retro_query_num_neighbors_save,
        tokenize_cpu_hours=corpus / TOKENIZED_PER_CPU_HOUR,
        embed_gpu_hours=(chunks + queries) / EMBEDDED_CHUNKS_PER_GPU_HOUR,
        add_cpu_hours=chunks / ADDED_CHUNKS_PER_CPU_HOUR,
        query_cpu_hours=queries / QUERIES_PER_CPU_HOUR,
    )


def _code_bytes(index: str) -> int:
    """Bytes of a stored vector: what a product quantizer at the end of the factory string says, else the published."""
    found = re.search(r"PQ(\d+)$", index)
    return int(found[1]) if found else CODE_BYTES


def _chunks(tokens: float, length: int, document_tokens: int) -> float:
    """Chunks never cross documents, so each document ends with a short one."""
    return tokens / document_tokens * math.ceil(document_tokens / length)


def data_lines(settings: Settings) -> Iterator[str]:
    """The data side as text."""
    planning, retro = settings[PlanningConfig], settings[RetroConfig]
    data = data_estimate(settings)
    yield f"data          {readable_count(data.corpus_tokens)} tokens: files {readable_bytes(data.token_file_bytes)}"
    yield f"              {readable_count(data.tokenize_cpu_hours)} CPU hours to tokenize"
    if retro.retro_add_retriever:
        yield (
            f"database      {readable_count(data.database_chunks)} chunks of {retro.retro_chunk_length}: "
            f"{readable_bytes(data.database_bytes)}"
        )
        yield (
            f"index         {readable_bytes(data.index_bytes)} of codes and ids, embedding "
            f"{readable_count(data.embed_gpu_hours)} GPU hours, adding {readable_count(data.add_cpu_hours)} CPU hours"
        )
        saved = settings[RetrievalConfig].retro_query_num_neighbors_save
        yield (
            f"table         {readable_count(data.queries)} queries x {saved} "
            f"neighbours: {readable_bytes(data.table_bytes)}, {readable_count(data.query_cpu_hours)} CPU hours"
        )
    hours = data.tokenize_cpu_hours
    hours += data.add_cpu_hours + data.query_cpu_hours if retro.retro_add_retriever else 0.0
    if planning.plan_data_workers > 1:
        wall = readable_seconds(hours / planning.plan_data_workers * 3600)
        yield f"              {wall} of CPU work on {planning.plan_data_workers} workers of one core"
    if planning.plan_price_per_cpu_hour is not None:
        yield f"price         {hours * planning.plan_price_per_cpu_hour:,.0f} of CPU hours"


def data_faults(settings: Settings) -> tuple[list[str], list[str]]:
    """What is wrong with the files that a run would read, and which are not there yet."""
    data = settings[DataConfig]
    if data.mock_data or data.data_path is None:
        return [], []
    absent = [path for path in _files(data, settings[RetroConfig]) if not path.exists()]
    if absent:
        return [], [f"{path} is not there yet" for path in absent]
    from megatron_retro.data.builders import build_dataset

    try:
        build_dataset(settings, "train", eod=None)
    except MegatronRetroError as error:
        return [str(error)], []
    return [], []


def _files(data: DataConfig, retro: RetroConfig) -> Iterator[Path]:
    from megatron_retro.data.blends import parse_data_path

    for entry in parse_data_path(data.data_path or ()):
        yield Path(f"{entry.path}.idx")
    if retro.retro_add_retriever and retro.retro_num_neighbors:
        yield from (Path(path) for path in data.neighbor_path or ())
        if data.database_path is not None:
            yield Path(data.database_path)
