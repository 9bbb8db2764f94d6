"""Checkpoints of megatron_retro read and written parameter by parameter, without a model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.artifacts.manifest import file_record, write_manifest
from megatron_retro.checkpoint.directory import (
    KIND,
    LATEST_NAME,
    STATE_NAME,
    VERSION,
    complete_checkpoints,
    point_to,
    step_directory,
)
from megatron_retro.checkpoint.live_state import MODEL, OPTIMIZER
from megatron_retro.checkpoint.loading import (
    Checkpoint,
    describe_checkpoint,
    load_tensors,
    open_base,
    open_checkpoint,
    stored_settings,
)
from megatron_retro.checkpoint.shard_files import (
    DTYPE_NAMES,
    DTYPES,
    StoredSlice,
    TensorSlice,
    WrittenShard,
    write_shard,
)
from megatron_retro.checkpoint.storage import INDEX_NAME, ShardFile, TensorIndex, shard_name
from megatron_retro.checkpoint.training_state import TrainingState
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.convert.begun_run import BegunRun
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.model.retro import Retro
from megatron_retro.peft.merging import merged, require_mergeable
from megatron_retro.runtime.strict_json import json_text

_SHARD_BYTES = 4 << 30
VOCABULARY_ROWS = frozenset({"embedding.word.weight", "output.weight", "encoder.embedding.word.weight"})


@dataclass(frozen=True)
class _Unwritten:
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_checkpoint(
    run: Path,
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    inputs: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    progress: BegunRun | None = None,
) -> Path:
    """Step 0 of a run, weights only, or the step of `progress`. `load` gives each tensor when it is its turn."""
    tensors = {MODEL + name: _Unwritten(shape, dtype, partial(load, name)) for name, shape in shapes.items()}
    for name, read in progress.tensors(shapes).items() if progress else ():
        shape = shapes.get(name.removeprefix(OPTIMIZER).rpartition(".")[0], ()) if not name.endswith(".step") else ()
        tensors[name] = _Unwritten(shape, torch.float32, read)
    training = progress.training if progress else TrainingState()
    target = step_directory(run, training.step)
    with new_directory(target, replace=_was_stopped(target, inputs, settings)) as partial_target:
        files: dict[str, ShardFile] = {}
        slices: dict[str, tuple[StoredSlice, ...]] = {}
        for number, names in enumerate(_names_by_shard(tensors)):
            path = partial_target / shard_name(number)
            written = _write_shard(path, {name: tensors[name] for name in names})
            files[path.name] = ShardFile(written.num_bytes, written.checksums)
            slices |= {stored.spec.name: (stored,) for stored in written.slices}
        sizes = {name: tensor.shape for name, tensor in tensors.items()}
        dtypes = {name: DTYPE_NAMES[tensor.dtype] for name, tensor in tensors.items()}
        write_file(partial_target / INDEX_NAME, TensorIndex(sizes, dtypes, slices, files).to_json())
        write_file(partial_target / STATE_NAME, json_text(progress.state() if progress else {}) + "\n")
        records = {name: file.record() for name, file in files.items()}
        records |= {name: file_record(partial_target / name) for name in (STATE_NAME, INDEX_NAME)}
        counts = {"step": training.step, "samples": training.samples, "tokens": training.tokens, "processes": 1}
        write_manifest(
            partial_target,
            kind=KIND,
            version=VERSION,
            inputs=inputs,
            config=settings.values(),
            counts=counts,
            files=records,
        )
    point_to(run, target, training.step)
    return target


def _write_shard(path: Path, tensors: Mapping[str, _Unwritten]) -> WrittenShard:
    specs = [
        TensorSlice(name, DTYPE_NAMES[tensor.dtype], tensor.shape, (0,) * len(tensor.shape))
        for name, tensor in tensors.items()
    ]
    unwritten = list(tensors.values())
    return write_shard(path, specs, lambda index: unwritten[index].load().to(unwritten[index].dtype))


def require_free(run: Path) -> None:
    """Refuse to write over a run, before anything of it is touched."""
    found = complete_checkpoints(run)
    if found and ((run / LATEST_NAME).exists() or len(found) > 1):
        raise ArtifactError(f"{found[-1]} exists already", fix="remove it, or give another path")


def _was_stopped(target: Path, inputs: Mapping[str, str], settings: Settings) -> bool:
    """Whether it stands there with nothing that points to it, as a kill leaves it, made from the same."""
    found = complete_checkpoints(target.parent)
    if (target.parent / LATEST_NAME).exists() or not found:
        return False
    if found != [target]:
        raise ArtifactError(f"{found[-1]} exists already", expected=target, fix="remove it, or give another path")
    manifest = describe_checkpoint(target).manifest
    return manifest.inputs == dict(inputs) and manifest.config == json.loads(json_text(settings.values()))


def parameter_shapes(model: ModelConfig, retro: RetroConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape with the true vocabulary."""
    with torch.device("meta"):
        built = Retro(model, retro)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    rows = model.vocab_size or 0
    return {name: (rows, *shape[1:]) if name in VOCABULARY_ROWS else shape for name, shape in shapes.items()}


def _names_by_shard(tensors: Mapping[str, _Unwritten]) -> list[list[str]]:
    """The names of each shard, in order; a new shard begins where one would grow too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = 4 * torch.Size(tensor.shape).numel()
        if shards[-1] and size + num_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """One parameter, with every byte verified."""
    key = MODEL + name
    tensor = torch.empty(checkpoint.index.sizes[key], dtype=DTYPES[checkpoint.index.dtypes[key]])
    load_tensors(checkpoint, {key: tensor})
    return tensor


@dataclass(frozen=True)
class StoredModel:
    """The parameters of a checkpoint by name, those of PEFT merged where asked."""

    path: Path
    settings: Settings
    names: frozenset[str]
    load: Callable[[str], Tensor]
    inputs: Mapping[str, str]


def open_stored(source: Path, *, merge: bool) -> StoredModel:
    """Open a whole model; a PEFT run is one once it is merged into its base."""
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
    """The names of a checkpoint's parameters."""
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


def write_merged(source: Path, run: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a run whose step 0 is the tuned model, merged into its base."""
    stored = open_stored(source, merge=True)
    model, retro = stored.settings[ModelConfig], stored.settings[RetroConfig]
    settings = Settings([model, retro, stored.settings[TokenizerConfig]])
    return write_checkpoint(run, settings, parameter_shapes(model, retro), stored.load, stored.inputs, dtype)
