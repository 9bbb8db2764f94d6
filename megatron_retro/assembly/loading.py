"""A trained model to use, from its checkpoint alone: whole in one process, or cut while it is loaded by several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.assembly.stage_building import stage_on_meta, uses_peft
from megatron_retro.checkpoint.live_state import model_tensors, padded_rows, vocabulary_rows
from megatron_retro.checkpoint.loading import (
    Checkpoint,
    base_path,
    found_tokenizer,
    load_tensors,
    open_base,
    open_checkpoint,
    open_together,
    stored_settings,
)
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig, TrainingConfig
from megatron_retro.data.model_text import FILE_SETTINGS
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer, refuse_mismatch, tokenizer_name
from megatron_retro.errors import ConfigError, EnvironmentProblem
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.stages import Stage
from megatron_retro.peft.attach import attach, connect, is_added
from megatron_retro.peft.merging import MERGEABLE, merge
from megatron_retro.peft.prompts import fold_prompt
from megatron_retro.runtime.store_channel import StoreChannel, open_channel


@dataclass(frozen=True)
class Loaded:
    """What belongs to a model in evaluation mode. `fingerprint` identifies the weights."""

    tokenizer: Tokenizer
    settings: Settings
    path: Path
    fingerprint: str

    @property
    def retro(self) -> RetroConfig:
        return self.settings[RetroConfig]


@dataclass(frozen=True)
class LoadedModel(Loaded):
    """A whole model."""

    module: Retro


@dataclass(frozen=True)
class LoadedStage(Loaded):
    """This rank's stage of a replica."""

    stage: Stage


def load_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: TokenizerConfig | None = None,
    allow_mismatch: bool = False,
) -> LoadedModel:
    """Load a checkpoint for use. `tokenizer` replaces the one that it was trained with, if its files moved."""
    checkpoint, settings, built = open_for_use(path, tokenizer, allow_mismatch)
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


def load_stage(
    path: Path,
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    *,
    dtype: str = "auto",
    tokenizer: TokenizerConfig | None = None,
    allow_mismatch: bool = False,
) -> LoadedStage:
    """The stage of this rank in evaluation mode. Every rank calls it; each data rank holds a replica of its own."""
    shares = parallel.sequence_parallel or parallel.context_parallel_size > 1
    if shares or parallel.num_layers_per_virtual_pipeline_stage:
        raise ConfigError(
            "a model that is only used is cut over tensor and pipeline ranks",
            got="--sequence-parallel, --context-parallel-size or --num-layers-per-virtual-pipeline-stage",
            expected="whole sequences on every rank, no virtual stages",
        )
    channel = open_channel("loading")

    def opened(place: Path) -> Checkpoint:
        return open_together(place, channel, mesh.device)

    checkpoint, stored, built = open_for_use(path, tokenizer, allow_mismatch, opened)
    kinds = (ModelConfig, RetroConfig, TokenizerConfig, PeftConfig)
    settings = Settings([*(stored[kind] for kind in kinds), parallel, TrainingConfig()])
    part = stage_parts(settings, seq_length=1)[mesh.rank(PIPELINE)]
    stage = stage_on_meta(settings, part, mesh)
    stage.to_empty(device=mesh.device)
    base = opened(base_path(checkpoint)) if uses_peft(stored) else None
    _fill_stage(stage, stored, checkpoint, base, channel)
    stage.to(chosen_dtype(dtype, mesh.device))
    stage.eval().requires_grad_(False)
    return LoadedStage(built, settings, checkpoint.path, checkpoint.manifest.fingerprint, stage)


def _fill(module: Retro, checkpoint: Checkpoint, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    rows = padded_rows(tensors, vocabulary_rows(settings[ModelConfig].vocab_size or 0))
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


def _fill_stage(
    stage: Stage, stored: Settings, checkpoint: Checkpoint, base: Checkpoint | None, channel: StoreChannel
) -> None:
    """From the checkpoint; of a run that tuned beside a model, that model from its own, the base."""
    tensors = model_tensors(stage.model)
    added = {name: tensor for name, tensor in tensors.items() if is_added(name)}
    sources = [(checkpoint, tensors)]
    if base is not None:
        frozen = {name: tensor for name, tensor in tensors.items() if name not in added}
        sources = [(base, frozen), (checkpoint, added)]
    for source, wanted in sources:
        rows = padded_rows(wanted, vocabulary_rows(stored[ModelConfig].vocab_size or 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load_tensors(source, wanted, rows, channel)


def open_for_use(
    path: Path,
    tokenizer: TokenizerConfig | None = None,
    allow_mismatch: bool = False,
    opened: Callable[[Path], Checkpoint] = open_checkpoint,
) -> tuple[Checkpoint, Settings, Tokenizer]:
    """A checkpoint, its model's settings, and the tokenizer that it was trained with."""
    checkpoint = opened(path)
    settings = stored_settings(checkpoint)
    files = tokenizer or found_tokenizer(settings[TokenizerConfig], checkpoint.path)
    settings = settings.replace(**{name: getattr(files, name) for name in ("tokenizer_type", *FILE_SETTINGS)})
    built = build_tokenizer(files)
    stored = checkpoint.manifest.inputs.get("tokenizer")
    if stored is not None and stored != built.fingerprint:
        trained_with = tokenizer_name(settings[TokenizerConfig].tokenizer_type, None, stored)
        refuse_mismatch(f"{checkpoint.path} was trained with another tokenizer", trained_with, built, allow_mismatch)
    return checkpoint, settings, built


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
