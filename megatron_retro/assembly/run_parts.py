"""From settings to the living parts of a run: tokenizer, data, model on its layout, optimizer.

Everything that can be refused is refused here, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_retro.assembly.model_assembly import build_trainable
from megatron_retro.assembly.run_data import is_instruction_run, open_loader
from megatron_retro.assembly.trainable import Trainable
from megatron_retro.config.data import InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import require_legal
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, TrainingConfig
from megatron_retro.data.loader import Loader
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.optim.optimizer import TrainingOptimizer, require_optimizer
from megatron_retro.optim.schedule import (
    BatchSizeSchedule,
    LearningRate,
    batch_size_schedule,
    learning_rate,
    run_length,
)
from megatron_retro.runtime.seeds import derived_seed, seed_everything, use_deterministic_kernels

VOCABULARY_PARAMETERS = ("embedding.word.weight", "encoder.embedding.word.weight", "output.weight")


@dataclass(frozen=True)
class RunParts:
    """What a training loop turns."""

    settings: Settings
    trainable: Trainable
    optimizer: TrainingOptimizer
    schedule: LearningRate
    batch_sizes: BatchSizeSchedule
    total_samples: int
    loader: Loader
    validation: Loader | None
    inputs: Mapping[str, str]
    true_rows: Mapping[str, int]


def resolved_settings(settings: Settings) -> Settings:
    """Settings with what only the data can tell filled in: the size of the vocabulary."""
    if settings[ModelConfig].vocab_size is not None:
        return settings
    return settings.replace(vocab_size=build_tokenizer(settings[TokenizerConfig]).vocab_size)


def build_run_parts(settings: Settings, device: torch.device, world_size: int) -> RunParts:
    """Build everything, in the order in which it can go wrong cheaply: rules, data, model."""
    require_legal(settings, world_size)
    require_optimizer(settings[OptimizerConfig], device.type)
    settings = resolved_settings(settings)
    training, retro = settings[TrainingConfig], settings[RetroConfig]
    if training.deterministic_mode:
        use_deterministic_kernels()
    tokenizer = build_tokenizer(settings[TokenizerConfig])
    batch_sizes = batch_size_schedule(training)
    trainable = build_trainable(settings, device)
    seed_everything(derived_seed(training.seed, "training", trainable.data_rank))
    loader = open_loader(settings, "train", tokenizer, trainable, batch_sizes.at)
    return RunParts(
        settings=settings,
        trainable=trainable,
        optimizer=TrainingOptimizer(trainable.module, settings[OptimizerConfig]),
        schedule=learning_rate(settings[OptimizerConfig], training),
        batch_sizes=batch_sizes,
        total_samples=run_length(training),
        loader=loader,
        validation=_validation(settings, tokenizer, trainable),
        inputs=data_inputs(loader, tokenizer, retro),
        true_rows=dict.fromkeys(VOCABULARY_PARAMETERS, settings[ModelConfig].vocab_size or 0),
    )


def _validation(settings: Settings, tokenizer: Tokenizer, trainable: Trainable) -> Loader | None:
    """The loader of the validation split, or None when there is nothing to evaluate on or no wish to."""
    if settings[TrainingConfig].eval_iters == 0:
        return None
    if is_instruction_run(settings) and settings[InstructionConfig].instruction_valid_data is None:
        return None
    return open_loader(
        settings.replace(num_workers=0), "valid", tokenizer, trainable, settings[TrainingConfig].global_batch_size
    )


def data_inputs(loader: Loader, tokenizer: Tokenizer, retro: RetroConfig) -> dict[str, str]:
    """Fingerprints of everything that the run reads."""
    samples = loader.dataset
    inputs = {"tokenizer": tokenizer.fingerprint, "order": samples.fingerprint, **samples.inputs}
    if retro.retro_add_retriever and "conversations" not in inputs and "database" not in inputs:
        raise ConfigError(
            "the model has a retriever, and the data has no neighbours",
            got="--retro-add-retriever without --neighbor-path",
            fix="give --neighbor-path and --database-path (made by `megatron-retro build-retrieval`)",
        )
    return inputs


MODEL_SECTIONS = (ModelConfig, RetroConfig)
