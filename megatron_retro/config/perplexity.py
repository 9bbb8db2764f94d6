"""How perplexity is measured."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity: sliding windows, variants of neighbours, leakage curve"""

    perplexity_split: str = option("valid", "documents to measure on", choices=SPLITS, ours=True)
    perplexity_stride: int | None = option(
        None, "tokens that each window scores, a multiple of the chunk length; half the sequence when not set",
        minimum=1, ours=True,
    )  # fmt: skip
    perplexity_windows: int | None = option(
        None, "windows at most, evenly over the text; all when not set", minimum=1, ours=True
    )
    perplexity_batch_size: int = option(8, "windows of one forward", minimum=1, ours=True)
    leakage_neighbors: int = option(
        10, "nearest neighbours that the leakage curve compares each chunk with; 0 = no curve", minimum=0, ours=True
    )
