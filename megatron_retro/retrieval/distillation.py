"""The verb `distill-embedder`: a sentence encoder becomes static embeddings, by model2vec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_retro.artifacts.files import new_directory
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval.embedders import encoder_folder
from megatron_retro.runtime.console import say
from megatron_retro.runtime.environment import require


def distill_embedder(settings: Settings, paths: Sequence[str]) -> None:
    """Distil the encoder that --retro-embedder names into the folder."""
    config = settings[EmbedderConfig]
    if len(paths) != 1:
        raise ConfigError("distill-embedder takes one path", got=" ".join(paths) or "none", expected="FOLDER")
    if config.retro_embedder not in ("minilm", "huggingface"):
        raise ConfigError(
            f"--retro-embedder {config.retro_embedder} has no encoder to distil",
            expected="minilm, or huggingface with --retro-embedder-path",
            fix="add --retro-embedder minilm",
        )
    target = Path(paths[0])
    if target.exists():
        raise ArtifactError(f"{target} exists already", fix="remove it, or give another path")
    for module in ("transformers", "model2vec", "skeletoken"):
        require(module, "distill-embedder")
    from model2vec.distill import distill

    model = distill(
        str(encoder_folder(config)),
        device="cpu",
        pca_dims=config.retro_embedder_dimension,
        quantize_to="float32",
        pooling="first" if config.retro_embedder_pooling == "cls" else "mean",
    )
    with new_directory(target) as unfinished:
        model.save_pretrained(unfinished)
    say(f"wrote {target}: {len(model.tokens):,} tokens, {model.dim} wide")
