"""What a run reads: token files with neighbour tables, or conversations."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_retro.assembly.stage_building import is_tuned
from megatron_retro.assembly.trainable import Trainable
from megatron_retro.config.data import DataConfig, InstructionConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig, TrainingConfig
from megatron_retro.data.builders import build_loader
from megatron_retro.data.instructions.buckets import Buckets
from megatron_retro.data.instructions.conversation_tokens import ConversationEncoder
from megatron_retro.data.instructions.dataset import InstructionDataset, open_instructions
from megatron_retro.data.instructions.rows import RowShape
from megatron_retro.data.instructions.templates import build_template
from megatron_retro.data.loader import Loader
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.peft.prompts import configured_virtual_tokens


def is_instruction_run(settings: Settings) -> bool:
    """Whether the run reads conversations."""
    return InstructionConfig in settings


def open_loader(
    settings: Settings,
    split: str,
    tokenizer: Tokenizer,
    trainable: Trainable,
    global_batch_size: int | Callable[[int], int],
) -> Loader:
    """This data rank's loader of a split."""
    if not is_instruction_run(settings):
        return build_loader(
            settings,
            split,
            eod=tokenizer.eod,
            data_rank=trainable.data_rank,
            data_size=trainable.data_size,
            global_batch_size=global_batch_size,
        )
    return Loader(
        instruction_dataset(settings, split, tokenizer),
        micro_batch_size=settings[TrainingConfig].micro_batch_size,
        global_batch_size=global_batch_size,
        data_rank=trainable.data_rank,
        data_size=trainable.data_size,
        num_threads=settings[DataConfig].num_workers,
    )


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
    )


def row_buckets(settings: Settings) -> Buckets:
    """Lengths that chunks and ranks of a cut sequence divide."""
    parallel, retro = settings[ParallelConfig], settings[RetroConfig]
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    chunk = retro.retro_chunk_length if retro.reads_neighbors() else 1
    return Buckets(settings[TrainingConfig].global_batch_size, math.lcm(8, ranks, chunk))


def conversation_encoder(settings: Settings, tokenizer: Tokenizer) -> ConversationEncoder:
    """How conversations become tokens, in training and afterwards."""
    config = settings[InstructionConfig]
    return ConversationEncoder(
        tokenizer,
        build_template(config.instruction_template),
        config.context_place,
        config.num_contexts,
        config.loss_on_all_replies,
        configured_virtual_tokens(settings[PeftConfig]) if is_tuned(settings) else (),
    )


def row_shape(settings: Settings, tokenizer: Tokenizer) -> RowShape:
    """Rows with room for neighbours when the encoder reads passages."""
    length, retro = settings[DataConfig].seq_length, settings[RetroConfig]
    if not retro.reads_neighbors():
        return RowShape(length, tokenizer.eod)
    return RowShape(
        length, tokenizer.eod, retro.retro_chunk_length, retro.retro_num_neighbors, retro.retrieved_length()
    )
