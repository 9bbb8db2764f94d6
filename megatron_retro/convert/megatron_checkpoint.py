"""A GPT or Retro checkpoint of Megatron-LM (its older model code) into a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.convert.megatron_files import FILE, read_megatron
from megatron_retro.convert.megatron_names import not_understood, parts_of, settings_of
from megatron_retro.errors import ArtifactError

_EMBEDDING = "language_model.embedding.word_embeddings.weight"


def import_megatron(source: Path, run: Path, say: Callable[[str], None]) -> Path:
    """Write step 0 of `run`; says what was left behind. The vocabulary is the checkpoint's, padding included."""
    checkpoint = read_megatron(source)
    if _EMBEDDING not in checkpoint.shards[0]:
        raise ArtifactError(f"{checkpoint.path} is no model of the older code", expected=_EMBEDDING)
    names = list(checkpoint.shards[0])
    vocabulary = sum(len(shard[_EMBEDDING]) for shard in checkpoint.shards)
    model, retro = settings_of(checkpoint.arguments, names, vocabulary)
    parts = parts_of(model, retro)
    shapes = parameter_shapes(model, retro)
    problems = [f"{parts[name].theirs} is missing" for name in shapes if parts[name].theirs not in names]
    problems += [f"{name} is not understood" for name in not_understood(names, parts)]
    if problems:
        raise ArtifactError(
            f"{checkpoint.path} is not the model that its arguments describe", got="; ".join(problems[:6])
        )

    def load(name: str) -> Tensor:
        tensor = parts[name].merge([shard[parts[name].theirs] for shard in checkpoint.shards])
        if tuple(tensor.shape) != shapes[name]:
            raise ArtifactError(
                f"{checkpoint.path}: {parts[name].theirs} has another shape than its arguments say",
                got=tuple(tensor.shape),
                expected=shapes[name],
            )
        return tensor.to(torch.float32)

    first = checkpoint.path / "mp_rank_00" / FILE
    settings = Settings([model, retro, TokenizerConfig()])
    written = write_checkpoint(run, settings, shapes, load, {FILE: file_record(first).sha256})
    say(f"{len(checkpoint.shards)} shards merged, {len(shapes)} parameters; skipped: {', '.join(checkpoint.skipped)}")
    say("no tokenizer is in such a checkpoint: give --tokenizer-type and --tokenizer-model when you use it")
    return written
