"""`megatron-retro pretrain`: trains a GPT, or a Retro with --retro-add-retriever."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, ObservabilityConfig, OptimizerConfig, TrainingConfig

DESCRIPTION = """Train a GPT, or with --retro-add-retriever a Retro, from token files (and neighbour tables).

The run lives in --save: checkpoints, events, report. The same command goes on where it stopped;
exit code 75 means: saved before the end, run me again."""
SECTIONS: tuple[type, ...] = (
    ModelConfig,
    RetroConfig,
    DataConfig,
    TokenizerConfig,
    TrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    CheckpointConfig,
    ObservabilityConfig,
)
POSITIONAL: Positional | None = None


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Train."""
    from megatron_retro.training.program import pretrain

    pretrain(settings)
