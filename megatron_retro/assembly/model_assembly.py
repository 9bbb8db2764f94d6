"""The model of a run on its layout, ready to train."""

from __future__ import annotations

import torch

from megatron_retro.assembly.single_process import SingleProcess
from megatron_retro.assembly.trainable import Trainable
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro


def compute_dtype(config: OptimizerConfig) -> torch.dtype:
    """What the model computes in."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else torch.float32


def build_trainable(settings: Settings, device: torch.device) -> Trainable:
    """The model with its first values, on this rank's part of the layout."""
    model, retro = settings[ModelConfig], settings[RetroConfig]
    module = Retro(model, retro).to(device)
    initialize(module, model, retro, settings[TrainingConfig].seed)
    return SingleProcess(module, device, compute_dtype(settings[OptimizerConfig]))
