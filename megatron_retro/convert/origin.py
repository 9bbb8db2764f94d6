"""Which model of Hugging Face a checkpoint was imported from."""

from __future__ import annotations

from pathlib import Path

from megatron_retro.checkpoint.loading import Described, base_path, describe_checkpoint
from megatron_retro.config.settings import section_name
from megatron_retro.config.training import CheckpointConfig
from megatron_retro.errors import ArtifactError

ORIGIN = "hugging_face"  # of a checkpoint's inputs: a hub's name at its commit, or a folder


def origin_of(checkpoint: Described) -> str | None:
    """That of a run, or of the first of those that it went on from; None where it is one of ours, or is gone."""
    seen: set[Path] = set()
    while checkpoint.path not in seen:
        seen.add(checkpoint.path)
        if (origin := checkpoint.manifest.inputs.get(ORIGIN)) is not None:
            return origin
        if not checkpoint.manifest.config.get(section_name(CheckpointConfig), {}).get("load"):
            return None
        try:
            checkpoint = describe_checkpoint(base_path(checkpoint))
        except ArtifactError:
            return None
    return None
