"""Rules of FP8: what its products can be cut into, and what they cannot stand beside."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_retro.config.model import ModelConfig
from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import Violation

_TILE = 16


def fp8_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Both sides of every matrix of a layer are whole tiles on every tensor rank."""
    if not _in_fp8(settings) or ModelConfig not in settings:
        return
    size = settings[ParallelConfig].tensor_model_parallel_size
    models = [settings[ModelConfig]]
    if RetroConfig in settings and settings[RetroConfig].retro_add_retriever:
        models.append(settings[RetroConfig].encoder_model(settings[ModelConfig]))
    for model, prefix in zip(models, ("", "retro_encoder_"), strict=False):
        heads = model.head_size() * model.num_attention_heads
        groups = model.head_size() * model.num_key_value_heads()
        for field, number, parts in (
            ("hidden_size", model.hidden_size, 1),
            ("ffn_hidden_size", model.ffn_width(), size),
            ("num_attention_heads", math.gcd(heads, 2 * groups), size),
        ):
            if number % (_TILE * parts):
                what = f"a multiple of {_TILE}" + (f" on each of {parts} tensor ranks" if parts > 1 else "")
                yield Violation(prefix + field, number, f"{what} with --fp8-format", "change sizes, or leave FP8 off")


def fp8_products_are_not_put_off(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Zero-bubble schedules compute weight gradients later, by products of their own."""
    if not _in_fp8(settings) or settings[ParallelConfig].pipeline_model_parallel_size == 1:
        return
    schedule = settings[ParallelConfig].pipeline_schedule
    if schedule == "zero-bubble":
        yield Violation("pipeline_schedule", schedule, "another one with --fp8-format", "take 1f1b or interleaved")


def _in_fp8(settings: Settings) -> bool:
    sections = ParallelConfig in settings and OptimizerConfig in settings
    return sections and settings[OptimizerConfig].fp8_format != "none"
