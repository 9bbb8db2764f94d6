"""Small recipes to plan."""

from __future__ import annotations

from typing import Any

from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings

SMALL: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "swiglu": True,
    "disable_bias_linear": True,
    "vocab_size": 4096,
    "untie_embeddings_and_output_weights": True,
    "retro_add_retriever": True,
    "retro_layers": (3, 5, 7),
    "seq_length": 512,
    "global_batch_size": 16,
    "train_iters": 100,
    "bf16": True,
}


def recipe(**changes: Any) -> Settings:
    """The small Retro with some fields changed; None leaves a field to its default."""
    values = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    return build_settings(ALL_SECTIONS, values, {})
