"""The verb `convert`: chooses the conversion by the source's format and --convert-to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_retro.config.conversion import ConvertConfig
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.convert.checkpoint_files import require_free, write_merged
from megatron_retro.convert.hugging_face import CONFIG, export_hugging_face, import_hugging_face
from megatron_retro.convert.hugging_face_peft import ADAPTER_CONFIG, export_peft
from megatron_retro.convert.megatron_export import export_megatron
from megatron_retro.convert.megatron_files import is_megatron
from megatron_retro.convert.megatron_import import import_megatron
from megatron_retro.convert.peft_import import import_peft
from megatron_retro.convert.remote_code import export_remote_code, import_remote_code, is_remote_code
from megatron_retro.data.hub import MODEL_PATTERNS, folder_of, lasting_name
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.console import say


def convert(settings: Settings, paths: Sequence[str]) -> None:
    """Convert SOURCE into DESTINATION, and say what was written."""
    if len(paths) != 2:
        raise ConfigError("convert takes two paths", got=" ".join(paths) or "none", expected="SOURCE DESTINATION")
    config, destination = settings[ConvertConfig], Path(paths[1])
    source = folder_of(paths[0], MODEL_PATTERNS)
    if not source.is_dir():
        raise ArtifactError(f"{source} is no directory", expected="a model's folder or its name on the hub")
    _require_fitting(config, source)
    named = settings.origin("tokenizer_type") != DEFAULT_ORIGIN
    if named and not (source / CONFIG).is_file() and not is_megatron(source):
        raise ConfigError(
            "--tokenizer-type is read with a model of Hugging Face or Megatron-LM alone", fix="leave it out"
        )
    tokenizer = settings[TokenizerConfig] if named else None
    say(f"wrote {_written(config, source, destination, tokenizer, lasting_name(paths[0], source))}")


def _written(
    config: ConvertConfig, source: Path, destination: Path, tokenizer: TokenizerConfig | None, origin: str
) -> Path:
    dtype, decoder_only = getattr(torch, config.convert_dtype), config.convert_decoder_only
    if config.convert_to == "peft":
        return export_peft(source, destination, dtype=dtype, decoder_only=decoder_only, base=config.convert_base)
    shard_bytes, merge = config.convert_shard_megabytes << 20, config.convert_merge
    if config.convert_to == "remote-code":
        return export_remote_code(source, destination, dtype=dtype, shard_bytes=shard_bytes, merge=merge)
    if config.convert_to == "huggingface":
        return export_hugging_face(
            source, destination, dtype=dtype, shard_bytes=shard_bytes, decoder_only=decoder_only, merge=merge
        )
    if config.convert_to == "megatron-core":
        return export_megatron(source, destination, dtype=dtype, decoder_only=decoder_only, merge=merge)
    require_free(destination)
    if merge:
        return write_merged(source, destination, dtype)
    if config.convert_base is not None:
        return import_peft(source, Path(config.convert_base), destination)
    if is_remote_code(source):
        return import_remote_code(source, destination, tokenizer, dtype)
    if (source / CONFIG).is_file():
        return import_hugging_face(source, destination, tokenizer, dtype, origin)
    if is_megatron(source):
        neutral = config.convert_neutral_arguments or ()
        vocab_size, optimizer = config.convert_vocab_size, config.convert_optimizer
        return import_megatron(source, destination, tokenizer, say, neutral, vocab_size, dtype, optimizer)
    raise ConfigError(
        f"{source} is no model that can be imported",
        expected=f"{CONFIG} with safetensors beside it, {ADAPTER_CONFIG}, mp_rank_XX folders, or a torch_dist folder",
        fix="a checkpoint of ours is exported with --convert-to huggingface or megatron-core, or merged with "
        "--convert-merge",
    )


def _require_fitting(config: ConvertConfig, source: Path) -> None:
    """Refuse flags that this conversion would not read."""
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter and config.convert_base is None:
        raise ConfigError(f"{source} is an adapter", fix="give --convert-base, the checkpoint that it belongs to")
    if config.convert_base is not None and not is_adapter and config.convert_to != "peft":
        raise ConfigError(f"{source} holds no {ADAPTER_CONFIG}", got="--convert-base", expected="a folder of peft")
    if config.convert_optimizer == "required" and not is_megatron(source):
        raise ConfigError(
            f"{source} is no checkpoint of Megatron-LM", got="--convert-optimizer required", fix="leave it out"
        )
    if config.convert_merge and config.convert_to == "peft":
        raise ConfigError("--convert-merge and --convert-to peft exclude each other", fix="give one of them")
