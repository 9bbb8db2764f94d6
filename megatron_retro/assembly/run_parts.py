"""From settings to the living parts of a run: tokenizer, data, model on its layout, optimizer.

Everything that can be refused is refused here, before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_retro.assembly.parallel_model import ParallelModel, build_parallel_model
from megatron_retro.assembly.stage_building import uses_peft
from megatron_retro.checkpoint.live_state import vocabulary_rows
from megatron_retro.config.data import DataConfig, InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import require_legal
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.data.builders import build_loader
from megatron_retro.data.dataset import Dataset
from megatron_retro.data.instructions.dataset import InstructionDataset, open_instructions
from megatron_retro.data.instructions.rows import Buckets, RowShape
from megatron_retro.data.instructions.templates import ConversationTokenizer, build_template
from megatron_retro.data.loader import Loader
from megatron_retro.data.model_text import text_folder
from megatron_retro.data.tokenizers import Tokenizer, require_tokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.optim.optimizer import TrainingOptimizer, require_optimizer
from megatron_retro.optim.schedule import (
    BatchSizeSchedule,
    LearningRate,
    batch_size_schedule,
    learning_rate,
    run_length,
)
from megatron_retro.peft.prompts import configured_virtual_tokens
from megatron_retro.runtime.seeds import derived_seed, seed_everything, use_deterministic_kernels

MODEL_SECTIONS = (ModelConfig, RetroConfig)


@dataclass(frozen=True)
class RunParts:
    """What a training loop drives."""

    settings: Settings
    model: ParallelModel
    optimizer: TrainingOptimizer
    schedule: LearningRate
    batch_sizes: BatchSizeSchedule
    total_samples: int
    loader: Loader
    validation: Loader | None
    inputs: Mapping[str, str]
    true_rows: Mapping[str, int]


def resolved_settings(settings: Settings, tokenizer: Tokenizer) -> Settings:
    """Settings with what only the tokenizer can tell filled in: the size of the vocabulary."""
    if settings[ModelConfig].vocab_size is not None:
        return settings
    return settings.replace(vocab_size=tokenizer.vocab_size)


def build_run_parts(
    settings: Settings, tokenizer: Tokenizer, device: torch.device, world_size: int, *, draw: bool = True
) -> RunParts:
    """Build everything, in the order in which it can go wrong cheaply: rules, data, model.

    Without `draw` the model has no values yet.
    """
    require_legal(settings, world_size)
    require_optimizer(settings[OptimizerConfig], device.type)
    settings = resolved_settings(settings, tokenizer)
    training, retro = settings[TrainingConfig], settings[RetroConfig]
    if training.deterministic_mode:
        use_deterministic_kernels()
    batch_sizes = batch_size_schedule(training)
    model = build_parallel_model(settings, device, draw=draw)
    seed_everything(derived_seed(training.seed, "training", model.data_rank))
    loader = open_loader(settings, "train", tokenizer, model, batch_sizes.at)
    return RunParts(
        settings=settings,
        model=model,
        optimizer=TrainingOptimizer(model.module, settings[OptimizerConfig]),
        schedule=learning_rate(settings[OptimizerConfig], training),
        batch_sizes=batch_sizes,
        total_samples=run_length(training),
        loader=loader,
        validation=_validation(settings, tokenizer, model),
        inputs=data_inputs(loader, tokenizer, retro),
        true_rows=vocabulary_rows(settings[ModelConfig].vocab_size or 0),
    )


def _validation(settings: Settings, tokenizer: Tokenizer, model: ParallelModel) -> Loader | None:
    """The loader of the validation split, or None when there is nothing to evaluate on or no wish to."""
    if settings[TrainingConfig].eval_iters == 0:
        return None
    if is_instruction_run(settings) and settings[InstructionConfig].instruction_valid_data is None:
        return None
    return open_loader(settings, "valid", tokenizer, model, settings[TrainingConfig].global_batch_size)


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


def is_instruction_run(settings: Settings) -> bool:
    """Whether the run reads conversations."""
    return InstructionConfig in settings


def open_loader(
    settings: Settings,
    split: str,
    tokenizer: Tokenizer,
    model: ParallelModel,
    global_batch_size: int | Callable[[int], int],
) -> Loader:
    """This data rank's loader of a split: of token files with neighbour tables, or of conversations."""
    loader = build_loader(
        settings,
        split,
        eod=tokenizer.eod,
        samples=instruction_dataset(settings, split, tokenizer) if is_instruction_run(settings) else None,
        data_rank=model.data_rank,
        data_size=model.data_size,
        global_batch_size=global_batch_size,
        device=model.device,
        own_part=model.own_part,
    )
    if isinstance(loader.dataset, Dataset):
        allowed = settings[TokenizerConfig].allow_tokenizer_mismatch
        require_tokenizer(loader.dataset.token_files, tokenizer, allow_mismatch=allowed)
    return loader


def instruction_dataset(settings: Settings, split: str, tokenizer: Tokenizer) -> InstructionDataset:
    """The rows of the training or the validation conversations."""
    config = settings[InstructionConfig]
    words = config.instruction_data if split == "train" else config.instruction_valid_data
    if words is None:
        raise ConfigError("--instruction-data is not set", fix="give files of conversations, one JSON object per line")
    return open_instructions(
        words,
        conversation_encoder(settings, tokenizer),
        row_shape(settings, tokenizer),
        seed=settings[TrainingConfig].seed,
        packed=config.pack_examples,
        skip_long=config.skip_long_examples,
        buckets=row_buckets(settings) if config.bucket_by_length and split == "train" else None,
        vocab_size=settings[ModelConfig].vocab_size,
    )


def row_buckets(settings: Settings) -> Buckets:
    """Lengths that chunks and ranks of a cut sequence divide."""
    parallel, retro = settings[ParallelConfig], settings[RetroConfig]
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    ranks = context * (tensor if parallel.sequence_parallel else 1)
    chunk = retro.retro_chunk_length if retro.reads_neighbors() else 1
    spans = chunk if context == 1 else 2 * context * chunk
    return Buckets(settings[TrainingConfig].global_batch_size, math.lcm(8, ranks, spans))


def conversation_encoder(settings: Settings, tokenizer: Tokenizer) -> ConversationTokenizer:
    """How conversations become tokens, in training and afterwards."""
    config = settings[InstructionConfig]
    return ConversationTokenizer(
        tokenizer,
        build_template(config.instruction_template, text_folder(settings[TokenizerConfig])),
        config.context_place,
        config.num_contexts,
        config.loss_on_all_replies,
        configured_virtual_tokens(settings[PeftConfig]) if uses_peft(settings) else (),
        config.instruction_bos,
    )


def row_shape(settings: Settings, tokenizer: Tokenizer) -> RowShape:
    """Rows with room for neighbours when the encoder reads passages."""
    length, retro = settings[DataConfig].seq_length, settings[RetroConfig]
    if not retro.reads_neighbors():
        return RowShape(length, tokenizer.eod)
    return RowShape(
        length, tokenizer.eod, retro.retro_chunk_length, retro.retro_num_neighbors, retro.retrieved_length()
    )
