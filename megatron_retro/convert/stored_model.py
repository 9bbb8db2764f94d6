"""A model of ours as an export reads it: parameter by parameter, with what was tuned beside it merged when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_retro.checkpoint.live_state import MODEL
from megatron_retro.checkpoint.loading import Checkpoint, open_checkpoint
from megatron_retro.checkpoint.stored_settings import open_base, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes, read_parameter, write_checkpoint
from megatron_retro.errors import ConfigError
from megatron_retro.peft.merging import merged, require_mergeable


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint's parameters by name."""

    path: Path
    settings: Settings
    names: frozenset[str]
    load: Callable[[str], Tensor]
    inputs: Mapping[str, str]


def open_stored(source: Path, *, merge: bool) -> StoredModel:
    """A whole model; a run that tuned beside one counts as a whole model once it is merged."""
    checkpoint = open_checkpoint(source)
    settings = stored_settings(checkpoint)
    tuned = settings[PeftConfig].peft_method != "none"
    if merge and not tuned:
        raise ConfigError(
            f"{checkpoint.path} has nothing to merge: it is a whole model", fix="leave out --convert-merge"
        )
    if tuned and not merge:
        raise ConfigError(
            f"{checkpoint.path} holds what was tuned beside a model, not the model",
            got=f"--peft-method {settings[PeftConfig].peft_method}",
            fix="give --convert-merge, or --convert-to peft",
        )
    if merge:
        return _merged_model(checkpoint, settings)
    return StoredModel(
        checkpoint.path,
        settings,
        parameter_names(checkpoint),
        lambda name: read_parameter(checkpoint, name),
        {"checkpoint": checkpoint.manifest.fingerprint},
    )


def parameter_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The parameters that a checkpoint holds."""
    return frozenset(name.removeprefix(MODEL) for name in checkpoint.index.sizes if name.startswith(MODEL))


def _merged_model(checkpoint: Checkpoint, settings: Settings) -> StoredModel:
    config = settings[PeftConfig]
    require_mergeable(config.peft_method)
    base, tuned = open_base(checkpoint), parameter_names(checkpoint)

    def added(name: str) -> Tensor | None:
        return read_parameter(checkpoint, name) if name in tuned else None

    def load(name: str) -> Tensor:
        return merged(name, read_parameter(base, name), added, config)

    inputs = {"base": base.manifest.fingerprint, "tuned": checkpoint.manifest.fingerprint}
    tokenizer = checkpoint.manifest.inputs.get("tokenizer")
    if tokenizer is not None:
        inputs["tokenizer"] = tokenizer
    return StoredModel(checkpoint.path, settings, parameter_names(base), load, inputs)


def write_merged(source: Path, run: Path) -> Path:
    """A run whose step 0 is the tuned model, whole."""
    stored = open_stored(source, merge=True)
    model, retro = stored.settings[ModelConfig], stored.settings[RetroConfig]
    settings = Settings([model, retro, stored.settings[TokenizerConfig]])
    return write_checkpoint(run, settings, parameter_shapes(model, retro), stored.load, stored.inputs)
