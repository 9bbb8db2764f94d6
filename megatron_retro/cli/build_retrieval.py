"""`megatron-retro build-retrieval`: database, index and neighbour tables, with a report on their quality."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.data import TokenizerConfig, WorkersConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.retrieval import EmbedderConfig, RetrievalConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = """From token files to neighbour tables, in six stages: plan, train, encode, merge, query, verify.

Every stage is cut into blocks that any number of workers share (start the same command many times, by hand, in a
SLURM array or under mpirun), and can be stopped and run again at any moment."""
SECTIONS: tuple[type, ...] = (TokenizerConfig, RetroConfig, EmbedderConfig, RetrievalConfig, WorkersConfig)
POSITIONAL: Positional | None = None
READS: Reads = {RetroConfig: ("retro_chunk_length", "retro_num_retrieved_chunks")}


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Run the stages."""
    from megatron_retro.retrieval.stages import build_retrieval

    build_retrieval(settings)
