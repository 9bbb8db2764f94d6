"""The shape of a model that a recipe does not hold itself: of the run it starts from, or of a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig
from megatron_retro.errors import ConfigError


def with_model_shape(settings: Settings) -> Settings:
    """The same settings with the decoder's shape filled in, where there is something to take it from."""
    folder = settings[PlanningConfig].plan_model
    if folder is not None:
        return settings.replace(**_hugging_face_shape(Path(folder)))
    source = settings[CheckpointConfig].load
    if settings[ModelConfig].vocab_size is None and source is not None and Path(source).is_dir():
        from megatron_retro.assembly.retrofitting import inherited_settings
        from megatron_retro.checkpoint.loading import open_checkpoint

        return inherited_settings(settings, open_checkpoint(Path(source)))
    return settings


def _hugging_face_shape(folder: Path) -> dict[str, Any]:
    from megatron_retro.convert.hugging_face_config import model_from_hugging_face

    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        return asdict(model_from_hugging_face(json.loads(text)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is no Hugging Face model", got=error, expected="a folder with a config.json"
        ) from None
