"""A trained model to use, from its checkpoint alone: weights, shape and tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.assembly.run_parts import VOCABULARY_PARAMETERS
from megatron_retro.checkpoint.live_state import model_tensors, padded_rows
from megatron_retro.checkpoint.loading import Checkpoint, load_tensors, open_checkpoint
from megatron_retro.checkpoint.stored_settings import open_base, seen_from, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import ArtifactError, EnvironmentProblem
from megatron_retro.model.retro import Retro
from megatron_retro.peft.attach import attach, connect, is_added
from megatron_retro.peft.merging import MERGEABLE, merge
from megatron_retro.peft.prompts import fold_prompt

_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


@dataclass(frozen=True)
class Loaded:
    """What belongs to a model in evaluation mode. `fingerprint` identifies the weights."""

    tokenizer: Tokenizer
    settings: Settings
    path: Path
    fingerprint: str

    @property
    def retro(self) -> RetroConfig:
        """Retrieval in the model."""
        return self.settings[RetroConfig]


@dataclass(frozen=True)
class LoadedModel(Loaded):
    """A whole model."""

    module: Retro


def load_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: TokenizerConfig | None = None,
) -> LoadedModel:
    """Load a checkpoint for use. `tokenizer` replaces the one that it was trained with, if its files moved."""
    checkpoint, settings, built = open_for_use(path, tokenizer)
    place = chosen_device(device)
    kind = chosen_dtype(dtype, place)
    if settings[PeftConfig].peft_method == "none":
        with torch.device("meta"):
            module = Retro(settings[ModelConfig], settings[RetroConfig]).to(kind)
        module.to_empty(device=place)  # filled where it is used, never whole in another type or place
        _fill(module, checkpoint, settings, model_tensors(module))
    else:
        module = Retro(settings[ModelConfig], settings[RetroConfig])
        _fill_tuned(module, checkpoint, settings)
        module.to(place, kind)
    module.eval().requires_grad_(False)
    return LoadedModel(built, settings, checkpoint.path, checkpoint.manifest.fingerprint, module)


def _fill(module: Retro, checkpoint: Checkpoint, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    rows = padded_rows(tensors, dict.fromkeys(VOCABULARY_PARAMETERS, settings[ModelConfig].vocab_size or 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, on purpose
        load_tensors(checkpoint, tensors, rows)


def _fill_tuned(module: Retro, checkpoint: Checkpoint, settings: Settings) -> None:
    """The model that was tuned beside, and what was tuned: merged where that is exact, else left in place."""
    _fill(module, open_base(checkpoint), settings, model_tensors(module))
    attach(module, settings[PeftConfig])
    added = {name: tensor for name, tensor in model_tensors(module).items() if is_added(name)}
    _fill(module, checkpoint, settings, added)
    connect(module)
    if settings[PeftConfig].peft_method in MERGEABLE:
        merge(module, settings[PeftConfig])
    elif module.embedding is not None:
        fold_prompt(module.embedding)


def open_for_use(path: Path, tokenizer: TokenizerConfig | None = None) -> tuple[Checkpoint, Settings, Tokenizer]:
    """A checkpoint, what its model is, and the tokenizer that it was trained with."""
    checkpoint = open_checkpoint(path)
    settings = stored_settings(checkpoint)
    built = build_tokenizer(tokenizer or _found_files(settings[TokenizerConfig], checkpoint.path))
    _require_tokenizer(checkpoint, built)
    return checkpoint, settings, built


def _found_files(config: TokenizerConfig, checkpoint: Path) -> TokenizerConfig:
    """The tokenizer's files as they are seen from here: a relative path also counts from a folder above the run."""
    stored = {name: getattr(config, name) for name in _TOKENIZER_FILES}
    found = {name: str(seen_from(value, checkpoint)) for name, value in stored.items() if value is not None}
    return dataclasses.replace(config, **found)


def chosen_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("there is no usable GPU", got=f"--device {name}", fix="use --device cpu or auto")
    return device


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _require_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    stored = checkpoint.manifest.inputs.get("tokenizer")
    if stored is not None and stored != tokenizer.fingerprint:
        raise ArtifactError(
            f"{checkpoint.path} was trained with another tokenizer",
            got=tokenizer.fingerprint,
            expected=stored,
            fix="give --tokenizer-type and --tokenizer-model of the training run",
        )
