"""`megatron-retro finetune`: trains a finished model on conversations, whole or beside it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import DataConfig, InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import (
    CheckpointConfig,
    ObservabilityConfig,
    OptimizerConfig,
    PeftConfig,
    TrainingConfig,
)

DESCRIPTION = """Train the model of --load on conversations: {"messages"}, {"prompt", "completion"} or
{"question", "answers", "contexts"}, one JSON object per line. Loss is on the last reply.

--retro-attention-gate 0 is InstructRetro's way (the encoder off). --peft-method trains LoRA, adapters,
P-tuning or (IA)3 beside the frozen model; the run's checkpoints then hold what was added, alone."""
SECTIONS: tuple[type, ...] = (
    InstructionConfig,
    PeftConfig,
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
    from megatron_retro.training.program import finetune

    finetune(settings)
