"""Small corpora in which text comes back, and projects of `build-retrieval` over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.sections import INDEX_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.testing.corpora import write_documents

EOD = 256
CHUNK = 16


def echoing_documents(seed: int, count: int, *, longest: int = 120, echo: float = 0.5) -> list[list[int]]:
    """Documents of bytes, partly passages of earlier ones or of their own; some empty, some shorter than a chunk."""
    random = np.random.default_rng(seed)
    documents: list[list[int]] = []
    stock: list[list[int]] = []
    for _ in range(count):
        text: list[int] = []
        while len(text) < random.integers(0, longest):
            if stock and random.random() < echo:
                passage = list(stock[random.integers(len(stock))])
                passage[random.integers(len(passage))] = int(random.integers(256))
            else:
                passage = random.integers(0, 256, random.integers(5, 40)).tolist()
            stock.append(passage)
            text += passage
        documents.append(text)
    return documents


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """A token file of the documents, each ended by EOD; returns its prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_documents(prefix, ([*document, EOD] for document in documents))
    return str(prefix)


def project_settings(directory: Path, corpora: Sequence[str], **changes: Any) -> Settings:
    """Settings of a build over bytes in small chunks."""
    values: dict[str, Any] = {
        "retro_project_dir": str(directory),
        "retro_database_corpus": list(corpora),
        "retro_chunk_length": CHUNK,
        "retro_embedder_dimension": 64,
        "retro_query_num_neighbors_save": 6,
        "retro_query_num_neighbors_query": 40,
        "retro_verify_queries": 60,
    }
    return build_settings(INDEX_SECTIONS, values | changes, {})


def owners_of_tokens(documents: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """The document of every token of the stream, its EOD included."""
    return np.concatenate([np.full(len(document) + 1, number) for number, document in enumerate(documents)])


def cut_chunks(documents: Sequence[Sequence[int]], length: int = CHUNK) -> list[tuple[int, list[int]]]:
    """Document and tokens of every database chunk, cut by hand."""
    return [
        (number, list(document[start : start + length]))
        for number, document in enumerate(documents)
        for start in range(0, len(document), length)
    ]
