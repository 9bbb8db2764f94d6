"""A retrieval project: its directory, settings, database and embedder, each opened when first used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import read_sealed_json, require_same, write_sealed_json
from megatron_retro.config.data import TokenizerConfig, WorkersConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.retrieval import EmbedderConfig, RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.chunk_database import ChunkDatabase, digest_of
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer, require_tokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.bm25_search import Bm25Search
from megatron_retro.retrieval.chunk_encoding import KeptVectors
from megatron_retro.retrieval.chunk_vectors import ChunkVectors, EmbeddedChunks, open_passage_vectors
from megatron_retro.retrieval.document_spans import DocumentSpans
from megatron_retro.retrieval.duplicate_report import documents_to_drop
from megatron_retro.retrieval.embedders import Embedder, build_embedder
from megatron_retro.retrieval.faiss_index import inverted_parts, new_index
from megatron_retro.retrieval.index_choice import IndexChoice, choose_index
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.retrieval.work_blocks import WorkBlock, claim_blocks, cut_blocks, ignore_failure_if_done
from megatron_retro.runtime.launch import Worker, this_worker


@dataclass(frozen=True)
class QueryCorpus:
    """A token file to find neighbours for, and the name of its table."""

    name: str
    prefix: str


@dataclass(frozen=True)
class Project:
    """One `build-retrieval`: settings, files and blocks, shared by all stages."""

    settings: Settings

    @property
    def config(self) -> RetrievalConfig:
        """The settings of database, index and queries."""
        return self.settings[RetrievalConfig]

    @cached_property
    def layout(self) -> ProjectLayout:
        """The paths of the project directory."""
        return ProjectLayout(Path(self.config.retro_project_dir))

    @cached_property
    def worker(self) -> Worker:
        """This worker's number and the number of workers."""
        return this_worker(self.settings[WorkersConfig].shard)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpora."""
        return build_tokenizer(self.settings[TokenizerConfig])

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder of chunks."""
        return build_embedder(self.settings[EmbedderConfig], self.tokenizer)

    @cached_property
    def chunk_vectors(self) -> ChunkVectors:
        """The vectors of the database's chunks."""
        paths = self.config.retro_passage_vectors
        if paths is None:
            return EmbeddedChunks(self.database, self.embedder)
        return open_passage_vectors(paths, self.database, self.embedder)

    @property
    def memory_bytes(self) -> float:
        """Memory that one worker may use."""
        return self.config.retro_memory_gb * 1e9

    @property
    def retrieved_length(self) -> int:
        """Tokens of a neighbour with its continuation."""
        return self.settings[RetroConfig].retrieved_length()

    @cached_property
    def database(self) -> ChunkDatabase:
        """The chunk database, created when it is not there yet."""
        layout, length = self.layout, self.settings[RetroConfig].retro_chunk_length
        for _ in claim_blocks(layout, "database", ["database"], lambda _: layout.database.exists(), self.worker):
            corpora, ranges = self.database_corpora, self.document_ranges
            with ignore_failure_if_done(layout.database.exists):
                left_out = self._left_out(corpora, ranges)
                ChunkDatabase.create(
                    layout.database, corpora, length, eod=self.eod, document_ranges=ranges, left_out=left_out
                )
        database = ChunkDatabase.open(layout.database)
        again = f"remove {layout.root} or give another --retro-project-dir"
        require_same(layout.database, "--retro-chunk-length", database.chunk_length, length, again)
        require_same(layout.database, "the end-of-document id of the tokenizer", database.eod, self.eod, again)
        if self.config.retro_database_corpus is not None:
            given = [TokenFile(prefix).fingerprint for prefix in self.config.retro_database_corpus]
            found = [corpus.fingerprint for corpus in database.corpora]
            require_same(layout.database, "--retro-database-corpus", found, given, again)
        ranges = self.document_ranges
        if ranges is not None:
            held = [(corpus.first_document, corpus.last_document) for corpus in database.corpora]
            require_same(layout.database, "--retro-database-documents", held, ranges, again)
        left_out = self._left_out([file.prefix for file in database.files], ranges)
        if left_out is not None:
            require_same(layout.database, "--retro-drop-duplicates", database.left_out, digest_of(left_out), again)
        self._require_tokenizer(database.files)
        return database

    def _left_out(self, corpora: Sequence[str], ranges: Sequence[tuple[int, int]] | None) -> NDArray[np.int64] | None:
        """The documents that --retro-drop-duplicates names, by the report of `find-duplicates`."""
        kind = self.config.retro_drop_duplicates
        if kind is None:
            return None
        return documents_to_drop(
            self.layout.duplicates, kind, DocumentSpans.of(corpora, ranges, self.eod, "--retro-database-documents")
        )

    def _require_tokenizer(self, files: Sequence[TokenFile]) -> None:
        allowed = self.settings[TokenizerConfig].allow_tokenizer_mismatch
        require_tokenizer(files, self.tokenizer, allow_mismatch=allowed, ends=self.config.retro_database_eod)

    @property
    def eod(self) -> int | None:
        """The id that ends a document, or None if documents have none."""
        return self.tokenizer.eod if self.config.retro_database_eod else None

    @property
    def database_corpora(self) -> tuple[str, ...]:
        """The token files of the database."""
        if self.config.retro_database_corpus is None:
            raise ConfigError(
                f"{self.layout.database} is not there yet",
                fix="give its token files: --retro-database-corpus PREFIX ..",
            )
        return self.config.retro_database_corpus

    @property
    def document_ranges(self) -> list[tuple[int, int]] | None:
        """The documents of each of them, or None for all."""
        ranges = self.config.retro_database_documents
        return None if ranges is None else [parsed_range(text, "--retro-database-documents") for text in ranges]

    @cached_property
    def query_corpora(self) -> tuple[QueryCorpus, ...]:
        """The corpora that get neighbour tables; the database's own when none is named."""
        given = self.config.retro_query_corpus
        if given is None:
            given = tuple(file.prefix for file in self.database.files)
        corpora = tuple(_query_corpus(text) for text in given)
        names = [corpus.name for corpus in corpora]
        if len(set(names)) < len(names):
            raise ConfigError(
                "two query corpora have one name",
                got=", ".join(names),
                fix="name them: --retro-query-corpus NAME=PREFIX",
            )
        self._require_tokenizer([TokenFile(corpus.prefix) for corpus in corpora])
        return corpora

    @cached_property
    def query_rows(self) -> dict[str, list[tuple[int, int]]]:
        """The row ranges of corpora that do not get all of theirs, by the names of their tables."""
        names = [corpus.name for corpus in self.query_corpora]
        ranges: dict[str, list[tuple[int, int]]] = {}
        for text in self.config.retro_query_rows or ():
            name, separator, span = text.rpartition("=")
            if separator and name not in names:
                raise ConfigError(
                    f"--retro-query-rows {text!r} names no query corpus", expected=f"FIRST:LAST, or {names[0]}={span}"
                )
            for one in [name] if separator else names:
                ranges.setdefault(one, []).append(parsed_range(span, "--retro-query-rows"))
        return {name: sorted(spans) for name, spans in ranges.items()}

    @cached_property
    def bm25(self) -> Bm25Search:
        """All chunks, for BM25 in place of the index."""
        return Bm25Search.of(self.database, self.memory_bytes)

    @cached_property
    def choice(self) -> IndexChoice:
        """The index to build."""
        config = self.config
        return choose_index(
            config.retro_index_str,
            self.database.num_chunks,
            self.embedder.dimension,
            self.memory_bytes,
            config.retro_index_ntrain,
            self._dimension_in_lists,
        )

    def _dimension_in_lists(self, index_str: str) -> int:
        """Dimension of the vectors in an index's lists; a string that faiss does not know is refused."""
        parts = inverted_parts(new_index(index_str, self.embedder.dimension))
        return parts.dimension if parts else self.embedder.dimension

    @cached_property
    def blocks(self) -> tuple[WorkBlock, ...]:
        """The blocks of chunks in the index."""
        blocks = cut_blocks(self.database.num_chunks, self.config.retro_block_size)
        return blocks[: max(1, round(len(blocks) * self.config.retro_index_add_load_fraction))]

    @cached_property
    def index_spec(self) -> dict[str, Any]:
        """Everything that the index depends on; the first run fixes it, a later one that differs is refused."""
        return {
            "database": self.database.fingerprint,
            "embedder": self.chunk_vectors.fingerprint,
            "index_str": self.choice.index_str,
            "train_chunks": round(self.choice.train_chunks * self.config.retro_index_train_load_fraction),
            "block_size": self.config.retro_block_size,
            "blocks": len(self.blocks),
            "keep_embeddings": self.config.retro_keep_embeddings,
        }

    def fix_index_spec(self) -> None:
        """Write the index's specification, or check that it is that of the first run."""
        path = self.layout.index_spec
        if not path.exists():
            write_sealed_json(path, self.index_spec)
            return
        found = read_sealed_json(path, self.index_spec, fix=f"remove {path.parent} and build again")
        for name, value in self.index_spec.items():
            again = f"remove {path.parent} to build another index, or give another --retro-project-dir"
            require_same(path, name, found.get(name), value, again)

    @property
    def kept_vectors(self) -> KeptVectors | None:
        """The file of kept vectors, when they are to be kept."""
        if not self.config.retro_keep_embeddings:
            return None
        path = self.layout.embeddings / "vectors.bf16"
        return KeptVectors(path, self.database.num_chunks, self.embedder.dimension)

    def codes_path(self, block: WorkBlock) -> Path:
        """The file of a block's codes."""
        return self.layout.codes / f"{block.name}.safetensors"


def parsed_range(text: str, flag: str) -> tuple[int, int]:
    """`FIRST:LAST` as numbers."""
    first, separator, last = text.partition(":")
    if separator and first.isdigit() and last.isdigit() and int(first) < int(last):
        return int(first), int(last)
    raise ConfigError(
        f"{flag} {text!r} is no range", expected="FIRST:LAST, two numbers, where LAST is the first one outside"
    )


def _query_corpus(text: str) -> QueryCorpus:
    name, separator, prefix = text.partition("=")
    if not separator:
        name, prefix = Path(text).name, text
    if not name or "/" in name:
        raise ConfigError(f"--retro-query-corpus {text!r} has no usable name", expected="PREFIX or NAME=PREFIX")
    return QueryCorpus(name, prefix)
