"""Which conversion a source and a wish call for."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_retro.config.convert import ConvertConfig
from megatron_retro.convert.hugging_face import CONFIG, export_hugging_face, import_hugging_face
from megatron_retro.convert.megatron_checkpoint import import_megatron
from megatron_retro.convert.megatron_files import is_megatron
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.console import say


def convert(config: ConvertConfig, source_name: str, destination_name: str) -> None:
    """Convert, and say what was written."""
    source, destination = Path(source_name), Path(destination_name)
    if not source.is_dir():
        raise ArtifactError(f"{source} is no directory", expected="a model's folder")
    if config.convert_to == "huggingface":
        written = export_hugging_face(
            source,
            destination,
            dtype=getattr(torch, config.convert_dtype),
            shard_bytes=config.convert_shard_megabytes << 20,
            decoder_only=config.convert_decoder_only,
        )
    elif (source / CONFIG).is_file():
        written = import_hugging_face(source, destination)
    elif is_megatron(source):
        written = import_megatron(source, destination, say)
    else:
        raise ConfigError(
            f"{source} is no model that can be imported",
            expected=f"{CONFIG} with safetensors beside it, or mp_rank_XX folders",
            fix="a checkpoint of ours is exported with --convert-to huggingface",
        )
    say(f"wrote {written}")
