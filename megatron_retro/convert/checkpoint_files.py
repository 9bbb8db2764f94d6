"""A checkpoint of ours written from a stream of tensors, without a model in memory, and read the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.artifacts.manifest import file_record, write_manifest
from megatron_retro.checkpoint.directory import KIND, STATE_NAME, VERSION, point_to, step_directory
from megatron_retro.checkpoint.live_state import MODEL
from megatron_retro.checkpoint.loading import Checkpoint, load_tensors
from megatron_retro.checkpoint.shard_files import DTYPES, PieceSpec, StoredPiece, write_shard
from megatron_retro.checkpoint.storage import INDEX_NAME, ShardFile, TensorIndex, shard_name
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.model.retro import Retro
from megatron_retro.runtime.strict_json import json_text

_SHARD_BYTES = 4 << 30


def write_checkpoint(
    run: Path,
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    inputs: Mapping[str, str],
) -> Path:
    """Step 0 of a run: weights only, float32. `load` gives each tensor when it is its turn."""
    target = step_directory(run, 0)
    with new_directory(target) as partial:
        files: dict[str, ShardFile] = {}
        pieces: dict[str, tuple[StoredPiece, ...]] = {}
        for number, names in enumerate(_shard_plan(shapes)):
            specs = [PieceSpec(MODEL + name, "F32", shapes[name], (0,) * len(shapes[name])) for name in names]
            path = partial / shard_name(number)
            written = write_shard(path, specs, lambda index, names=names: load(names[index]).float())  # type: ignore[misc]
            files[path.name] = ShardFile(written.num_bytes, written.checksums)
            pieces |= {piece.spec.name: (piece,) for piece in written.pieces}
        sizes = {MODEL + name: shape for name, shape in shapes.items()}
        index = TensorIndex(sizes, dict.fromkeys(sizes, "F32"), pieces, files)
        write_file(partial / INDEX_NAME, index.to_json())
        write_file(partial / STATE_NAME, json_text({}) + "\n")
        records = {name: file.record() for name, file in files.items()}
        records |= {name: file_record(partial / name) for name in (STATE_NAME, INDEX_NAME)}
        counts = {"step": 0, "samples": 0, "tokens": 0, "processes": 1}
        write_manifest(
            partial,
            kind=KIND,
            version=VERSION,
            inputs=inputs,
            config=settings.values(),
            counts=counts,
            files=records,
        )
    point_to(run, target, 0)
    return target


def parameter_shapes(model: ModelConfig, retro: RetroConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape with the true vocabulary."""
    with torch.device("meta"):
        built = Retro(model, retro)
    rows = {"embedding.word.weight", "output.weight", "encoder.embedding.word.weight"}
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return {name: (model.vocab_size or 0, *shape[1:]) if name in rows else shape for name, shape in shapes.items()}


def _shard_plan(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in order, cut where a shard would grow too large."""
    plan: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 4 * torch.Size(shape).numel()
        if plan[-1] and size + num_bytes > _SHARD_BYTES:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += num_bytes
    return plan


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """One parameter, every byte verified."""
    key = MODEL + name
    tensor = torch.empty(checkpoint.index.sizes[key], dtype=DTYPES[checkpoint.index.dtypes[key]])
    load_tensors(checkpoint, {key: tensor})
    return tensor
