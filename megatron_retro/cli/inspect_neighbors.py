"""`megatron-retro inspect-neighbors`: look at the neighbours of a table, on one page that works offline."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.retrieval import InspectorConfig, RetrievalConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = """Write a page of query chunks with their neighbours, continuations, distances and documents.

Runs of tokens that a neighbour shares with the chunk or with what follows it are marked. The tables of the database's
own corpora are found by themselves; name others as --retro-query-corpus NAME=PREFIX."""
SECTIONS: tuple[type, ...] = (RetrievalConfig, InspectorConfig)
POSITIONAL: Positional | None = None
READS: Reads = {RetrievalConfig: ("retro_project_dir", "retro_query_corpus")}


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write a page per table."""
    from megatron_retro.retrieval.inspector import write_pages

    for path in write_pages(settings[RetrievalConfig], settings[InspectorConfig]):
        print(path)
