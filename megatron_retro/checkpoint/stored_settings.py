"""What a checkpoint's manifest says of its model: shape, retriever, tokenizer, and what was tuned beside which base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.checkpoint.loading import Checkpoint, open_checkpoint
from megatron_retro.config.data import InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings, build_settings, section_name, specs_by_name
from megatron_retro.config.training import CheckpointConfig, PeftConfig
from megatron_retro.errors import ArtifactError

_SECTIONS = (ModelConfig, RetroConfig, TokenizerConfig, PeftConfig)


def stored_settings(checkpoint: Checkpoint) -> Settings:
    """The sections that make the model, as they were when it was trained."""
    return _stored(checkpoint, _SECTIONS)


def stored_instructions(checkpoint: Checkpoint) -> InstructionConfig | None:
    """How its conversations were written, if it was tuned on any."""
    if section_name(InstructionConfig) not in checkpoint.manifest.config:
        return None
    return _stored(checkpoint, (InstructionConfig,))[InstructionConfig]


def _stored(checkpoint: Checkpoint, sections: Sequence[type]) -> Settings:
    values: dict[str, Any] = {}
    known = specs_by_name(sections)
    for section in sections:
        stored: Mapping[str, Any] = checkpoint.manifest.config.get(section_name(section), {})
        unknown = [name for name in stored if name not in known]
        if unknown:
            raise ArtifactError(
                f"{checkpoint.path} has settings that this version does not know",
                got=", ".join(unknown),
                fix="use the version of megatron_retro that wrote it",
            )
        values.update({name: value for name, value in stored.items() if value is not None})
    return build_settings(sections, values, {})


def open_base(checkpoint: Checkpoint) -> Checkpoint:
    """The frozen model that a run tuned beside."""
    stored = str(checkpoint.manifest.config.get(section_name(CheckpointConfig), {}).get("load") or "")
    return open_checkpoint(seen_from(stored, checkpoint.path))


def seen_from(stored: str, checkpoint: Path) -> Path:
    """A path as a run noted it; a relative one also counts from a folder above the run."""
    path = Path(stored)
    if path.is_absolute() or path.exists():
        return path
    places = (folder / path for folder in checkpoint.resolve().parents)
    return next((place for place in places if place.exists()), path)
