"""Static embeddings: a sentence encoder distilled into one vector per token, by model2vec.

`distillation.py` writes the folder once; `StaticEmbedder` reads it. A text's vector is the mean of its tokens', of
length one: no forward pass, so a CPU embeds thousands of chunks a second.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.console import Advance, unseen
from megatron_retro.runtime.environment import require

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class StaticEmbedder:
    """A folder of model2vec. Chunks are decoded by our tokenizer and tokenized by the folder's."""

    folder: Path
    tokenizer: Tokenizer

    @cached_property
    def dimension(self) -> int:
        """Width of a vector."""
        return int(self._model.dim)

    @cached_property
    def fingerprint(self) -> str:
        """Covers the vectors, the vocabulary and our tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for name in FILES:
            digest.update(f"{name} {file_record(self.folder / name).sha256}".encode())
        return f"static {digest.hexdigest()}"

    @cached_property
    def _model(self) -> Any:
        from model2vec import StaticModel

        return StaticModel.from_pretrained(self.folder, force_download=False)

    def embed(
        self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_], advance: Advance = unseen
    ) -> NDArray[np.float32]:
        """Vectors of length one; nothing for a chunk without text."""
        if not len(tokens_NM):
            return np.zeros((0, self.dimension), np.float32)
        texts = [self.tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens_NM, present_NM, strict=True)]
        vectors = self._model.encode(texts, normalize=True, max_length=None, use_multiprocessing=False)
        advance(len(texts))
        return np.asarray(vectors, np.float32)


def build_static_embedder(config: EmbedderConfig, tokenizer: Tokenizer) -> StaticEmbedder:
    """The embedder in --retro-embedder-path, its folder checked."""
    require("model2vec", "--retro-embedder static")
    how = "megatron-retro distill-embedder FOLDER --retro-embedder minilm"
    if config.retro_embedder_path is None:
        raise ConfigError("--retro-embedder static needs a folder", fix=f"give --retro-embedder-path; {how} makes one")
    folder = Path(config.retro_embedder_path)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ArtifactError(
            f"{folder} holds no static embeddings",
            got="lacks " + ", ".join(missing),
            expected="a folder that model2vec wrote",
            fix=how,
        )
    return StaticEmbedder(folder, tokenizer)
