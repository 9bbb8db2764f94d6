"""Passages for conversations."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class ContextsConfig:
    """Passages retrieved for conversations"""

    retrieved_contexts: int = option(5, "passages per conversation", minimum=1, ours=True)
    retrieved_context_chunks: int = option(
        2, "chunks of a passage: the one found and what follows it in its document", minimum=1, ours=True
    )
    replace_contexts: bool = option(
        False, "search for conversations that have passages, too, and drop those", ours=True
    )
