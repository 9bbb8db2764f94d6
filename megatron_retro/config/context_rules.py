"""Which sequences, and which models, ranks can share (context parallelism)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import Violation


def sequences_are_shared_evenly(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Each rank holds two spans of whole chunks, which sequence parallelism cuts again."""
    if not _shared(settings) or DataConfig not in settings:
        return
    parallel, length = settings[ParallelConfig], settings[DataConfig].seq_length
    size = parallel.context_parallel_size
    retrieves = RetroConfig in settings and settings[RetroConfig].retro_add_retriever
    chunk = settings[RetroConfig].retro_chunk_length if retrieves else 1
    spans = f"2 x --context-parallel-size {size}" + (f" x --retro-chunk-length {chunk}" if retrieves else "")
    unit = 2 * size * chunk
    ranks = size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    if length % unit:
        below = length // unit * unit
        fix = f"as {below or unit} or {below + unit}"
        yield Violation("seq_length", length, f"a multiple of {unit} ({spans})", fix)
    elif length % ranks:
        yield Violation(
            "seq_length",
            length,
            f"a multiple of {ranks}, the ranks that share it by context and --sequence-parallel",
            "change it, or one of the parallel sizes",
        )


def model_can_share_sequences(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Nothing of a token may hang on all tokens but through self-attention, or on where a grid of chunks ends."""
    if not _shared(settings) or not settings.has(ModelConfig, RetroConfig):
        return
    model, retro = settings[ModelConfig], settings[RetroConfig]
    for field, value, why in (
        ("position_embedding_type", "relative", "they are scores of all keys for every query"),
        ("retro_gate_type", "adaptive", "its budget is of the mean rate of all chunks"),
        ("retro_core_checkpoint", True, "its grid of chunks ends with the sequence"),
        ("retro_legacy_checkpoint", True, "its grid of chunks ends with the sequence"),
    ):
        if getattr(model if hasattr(model, field) else retro, field) == value:
            fix = "change it, or share long sequences with --sequence-parallel"
            yield Violation(field, value, f"another one with --context-parallel-size: {why}", fix)


def _shared(settings: Settings) -> bool:
    return ParallelConfig in settings and settings[ParallelConfig].context_parallel_size > 1


CONTEXT_RULES = (sequences_are_shared_evenly, model_can_share_sequences)
