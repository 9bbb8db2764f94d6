"""`inspect-neighbors`: reads chunks and their neighbours from a project, for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_retro.artifacts.files import write_file
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import InspectorConfig, RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.query_chunks import QueryChunks
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import Tokenizer, name_of, refuse_mismatch, require_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.reporting.neighbors import QueryText, Read, RetrievedText, inspector_page, retrieved_texts
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.retrieval.quality import covered_rows
from megatron_retro.retrieval.work_blocks import uniform_sample


@dataclass(frozen=True)
class Reader:
    """A model that reads neighbours of this form."""

    tokenizer: Tokenizer
    num_neighbors: int
    retrieved_length: int
    read: Read


@dataclass(frozen=True)
class Shown:
    """What is needed to show rows of one table."""

    index: LiveIndex
    tokenizer: Tokenizer
    table: NeighborTable
    chunks: QueryChunks
    config: InspectorConfig
    reader: Reader | None


def inspect_neighbors(settings: Settings, reader: Reader | None = None) -> None:
    """Write a page per table of the project, and print their paths."""
    retrieval, config = settings[RetrievalConfig], settings[InspectorConfig]
    layout = ProjectLayout(Path(retrieval.retro_project_dir))
    allowed = settings[TokenizerConfig].allow_tokenizer_mismatch
    index = LiveIndex(layout.root, allow_tokenizer_mismatch=allowed)
    tokenizer = index.tokenizer
    tables = _tables(layout, index, retrieval.retro_query_corpus)
    require_tokenizer([file for _, file in tables.values()], tokenizer, allow_mismatch=allowed)
    if reader is not None and reader.tokenizer.fingerprint != tokenizer.fingerprint:
        what = f"{layout.root} was built with another tokenizer than the model's"
        refuse_mismatch(what, name_of(tokenizer), reader.tokenizer, allowed)
    if config.inspect_output is not None and len(tables) > 1:
        raise ConfigError(
            "--inspect-output names one page, but the project has several tables",
            got=", ".join(tables),
            fix="name one: --retro-query-corpus NAME=PREFIX",
        )
    for name, (table, file) in tables.items():
        chunks = QueryChunks(file, index.database.chunk_length)
        path = Path(config.inspect_output) if config.inspect_output else layout.report / f"neighbors-{name}.html"
        write_file(path, _page(Shown(index, tokenizer, table, chunks, config, reader), name))
        print(path)


def _page(shown: Shown, name: str) -> str:
    rows = shown.table.layout.num_rows
    numbers = covered_rows(shown.table, uniform_sample(rows, min(rows, shown.config.inspect_rows)))
    queries = [_query(shown, int(number)) for number in numbers]
    length, shortest = shown.chunks.chunk_length, shown.config.inspect_run
    return inspector_page(name, queries, rows, shown.tokenizer.decode, length, shortest)


def _query(shown: Shown, number: int) -> QueryText:
    length, file = shown.chunks.chunk_length, shown.chunks.file
    text = file.tokens(number * length, min((number + 2) * length, file.num_tokens)).tolist()
    first, last = (int(bound[0]) for bound in shown.chunks.documents(np.array([number])))
    documents = f"document {first}" if last == first + 1 else f"documents {first} to {last - 1}"
    return QueryText(f"Chunk {number}, {documents}", text, _neighbors(shown, number, text))


def _neighbors(shown: Shown, number: int, text: Sequence[int]) -> list[RetrievedText]:
    database, length = shown.index.database, shown.chunks.chunk_length
    reader = shown.reader
    ids = shown.table.rows(number, number + 1)[0, : reader.num_neighbors if reader else shown.config.inspect_neighbors]
    ids = ids[ids >= 0]
    if not len(ids):
        return []
    tokens, there = database.gather(ids, reader.retrieved_length if reader else 2 * length)
    facts = [
        f"chunk {one}, document {document}, squared distance {distance:.3f}"
        for one, document, distance in zip(
            ids, database.document_of(ids), _distances(shown, text[:length], ids), strict=True
        )
    ]
    return retrieved_texts(facts, text, tokens, there, reader.read if reader and len(text) > length else None)


def _distances(shown: Shown, text: Sequence[int], ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    embedder, database = shown.index.embedder, shown.index.database
    tokens = np.array([text])
    query = embedder.embed(tokens, tokens != (-1 if database.eod is None else database.eod))
    chunks = embedder.embed(*database.gather(ids, database.chunk_length))
    return [float(value) for value in np.square(chunks - query).sum(axis=1)]


def _tables(
    layout: ProjectLayout, index: LiveIndex, given: Sequence[str] | None
) -> dict[str, tuple[NeighborTable, TokenFile]]:
    """The tables to show, each with the corpus that it belongs to."""
    named = dict(text.partition("=")[::2] if "=" in text else (Path(text).name, text) for text in given or ())
    known = {file.fingerprint: file for file in index.database.files}
    names = list(named) or sorted(path.name for path in layout.root.glob("neighbors/*") if path.is_dir())
    tables: dict[str, tuple[NeighborTable, TokenFile]] = {}
    for name in names:
        table = NeighborTable.open(layout.neighbors(name))
        file = TokenFile(named[name]) if name in named else known.get(table.corpus_fingerprint)
        if file is None:
            continue
        if file.fingerprint != table.corpus_fingerprint:
            raise ArtifactError(
                f"{table.path} belongs to another corpus", got=file.prefix, fix="give the token file that was queried"
            )
        tables[name] = (table, file)
    if not tables:
        raise ArtifactError(
            f"{layout.root} has no table whose corpus is known",
            fix="query first, or name the corpus: --retro-query-corpus NAME=PREFIX",
        )
    return tables
