"""`megatron-retro retrofit`: makes a Retro of a pretrained GPT and trains it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, ObservabilityConfig, OptimizerConfig, TrainingConfig

DESCRIPTION = """Take the decoder of a pretrained GPT (--load), add a fresh neighbour encoder and chunked
cross-attention, and train: everything, or with --freeze-decoder only what was added.

The decoder's shape and the tokenizer come from the checkpoint. The plan (parameter, source, trains?) is
printed first. The run lives in --save; the same command goes on where it stopped (exit code 75)."""
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
    """Retro-fit."""
    from megatron_retro.training.program import pretrain

    pretrain(settings, retrofit=True)
