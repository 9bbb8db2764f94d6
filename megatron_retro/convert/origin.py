"""Which model of Hugging Face a checkpoint was imported from, and what it has in its weights since."""

from __future__ import annotations

from pathlib import Path

from megatron_retro.checkpoint.loading import Described, base_path, describe_checkpoint
from megatron_retro.config.settings import section_name
from megatron_retro.config.training import CheckpointConfig
from megatron_retro.errors import ArtifactError

ORIGIN = "hugging_face"  # of a checkpoint's inputs: a hub's name at its commit, or a folder
FOLDED = "folded_multipliers"  # the family whose multipliers of activations went into the weights


def origin_of(checkpoint: Described) -> str | None:
    """That of a run, or of the first of those that it went on from; None where it is one of ours, or is gone."""
    return first_input(checkpoint, ORIGIN)


def first_input(checkpoint: Described, name: str) -> str | None:
    """An input of a run, or of the first of those that it went on from that has it."""
    seen: set[Path] = set()
    while checkpoint.path not in seen:
        seen.add(checkpoint.path)
        if (found := checkpoint.manifest.inputs.get(name)) is not None:
            return found
        if not checkpoint.manifest.config.get(section_name(CheckpointConfig), {}).get("load"):
            return None
        try:
            checkpoint = describe_checkpoint(base_path(checkpoint))
        except ArtifactError:
            return None
    return None
