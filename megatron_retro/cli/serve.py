"""`megatron-retro serve`: an OpenAI-compatible endpoint and a page that shows what each chunk read."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.inference import (
    READ_BY_A_GENERATOR,
    ChatConfig,
    EngineConfig,
    LiveRetrievalConfig,
    ServeConfig,
)
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig

DESCRIPTION = "Serve a checkpoint (--load): /v1/completions, /v1/chat/completions, metrics, and a page at /."
SECTIONS: tuple[type, ...] = (
    ServeConfig,
    ChatConfig,
    EngineConfig,
    LiveRetrievalConfig,
    CheckpointConfig,
    TokenizerConfig,
    ParallelConfig,
)
POSITIONAL: Positional | None = None
READS: Reads = READ_BY_A_GENERATOR


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Serve until a signal comes."""
    from megatron_retro.runtime.environment import require

    require("fastapi", "serving")
    from megatron_retro.cli.generation_ranks import Replica, ask_model
    from megatron_retro.inference.serving.program import serve

    def answer(replica: Replica) -> None:
        serve(replica.generator, replica.path, settings[ServeConfig], settings[ChatConfig])

    ask_model(settings, answer, live=settings[LiveRetrievalConfig])
