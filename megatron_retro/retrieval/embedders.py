"""Chunks as vectors. An embedder is frozen, deterministic and knows its fingerprint.

`hashed` needs nothing; the ones that read text are in `text_embedders.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.native import embed_hashed

NGRAM_WEIGHTS = (3, 2, 1)


class Embedder(Protocol):
    """What turns chunks into vectors."""

    @property
    def dimension(self) -> int:
        """Width of a vector."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the vectors can."""

    def embed(self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Vectors [N, dimension]; positions that are not present are no text."""


@dataclass(frozen=True)
class HashedEmbedder:
    """Signed random projection of hashed n-grams: the cosine of two chunks is about their shared n-grams."""

    dimension: int

    def __post_init__(self) -> None:
        if self.dimension % 64:
            raise ConfigError(
                "--retro-embedder-dimension is no multiple of 64",
                got=self.dimension,
                fix=f"give {-(-self.dimension // 64) * 64}",
            )

    @property
    def fingerprint(self) -> str:
        """Version and width."""
        return f"hashed n-grams 1, {self.dimension} wide"

    def embed(self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Vectors of length one."""
        return embed_hashed(tokens_NM, present_NM, NGRAM_WEIGHTS, self.dimension)


def build_embedder(config: EmbedderConfig, tokenizer: Tokenizer) -> Embedder:
    """The embedder that the settings name."""
    if config.retro_embedder == "hashed":
        return HashedEmbedder(config.retro_embedder_dimension)
    from megatron_retro.retrieval.text_embedders import build_text_embedder

    return build_text_embedder(config, tokenizer)
