"""Builds this rank's pipeline stages: a plain model, to which a fixed list of transformations is applied in order.

A stage is built on the meta device, and its parameters are filled part by part, so none is ever whole. A first value
depends on the seed and the parameter's name alone, so every layout starts from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.model.costs import Trained
from megatron_retro.model.initialization import initial_blocks
from megatron_retro.model.retro import Retro
from megatron_retro.optim.groups import part_of
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import CUTS, Cut
from megatron_retro.parallel.data_parallel import accumulate_in_reduce_dtype, fsdp_units, mixed_precision, shard_unit
from megatron_retro.parallel.layer_transforms import DeferredWeightGradients, multiply_in_fp8, recompute_layers
from megatron_retro.parallel.mesh import DATA, TENSOR, ParallelMesh
from megatron_retro.parallel.partition import StagePart
from megatron_retro.parallel.randomness import RandomStreams, has_dropout
from megatron_retro.parallel.stages import Stage
from megatron_retro.parallel.tensor_parallel import cut_model, cut_prompt
from megatron_retro.peft.attach import attach, connect, initial_value, is_added

Transformation = Callable[[Stage, Settings, ParallelMesh], None]


def stage_on_meta(settings: Settings, part: StagePart, mesh: ParallelMesh, cuts: Sequence[Cut] = CUTS) -> Stage:
    """One stage, cut, on the meta device: what a model in use is filled into, and what a plan counts."""
    with torch.device("meta"):
        model = Retro(padded_for_cut(settings[ModelConfig], mesh.size(TENSOR)), settings[RetroConfig])
    stage = Stage(model, part, tensor_axis(settings, mesh))
    transformations: tuple[Transformation, ...] = (
        _drop_other_stages,  # first: nothing below is done to what another stage holds
        _attach_peft,  # before the cut, which cuts what is added too; LoRA then acts before a region reduces
        partial(_cut, cuts=cuts),
        _connect_peft,  # after the cut: adapters act on what a region has reduced
        _freeze,  # after the cut, which makes new parameters
        _recompute,  # around the regions' hooks, so collectives are repeated; the layers' own hooks stay outside
    )
    for transform in transformations:
        transform(stage, settings, mesh)
    return stage


def build_stage(settings: Settings, part: StagePart, mesh: ParallelMesh, cuts: Sequence[Cut] = CUTS) -> Stage:
    """One stage with its first values, ready to train."""
    stage = stage_on_meta(settings, part, mesh, cuts)
    transformations: tuple[Transformation, ...] = (
        _multiply_in_fp8,  # this and the next change how matrices are multiplied: the settings allow one of them
        _defer_weight_gradients,
        _draw_from_streams,  # outside of recomputation, which brings the streams' states back
        _fill_and_shard,  # last: FSDP2 takes over the parameters, and its hooks go around all others
    )
    for transform in transformations:
        transform(stage, settings, mesh)
    return stage


def _drop_other_stages(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    part, model = stage.part, stage.model
    model.keep_part(part.layers, embedding=part.embedding, encoder=part.encoder, head=part.last)
    if model.embedding is not None and not part.first:
        model.embedding.position = None


def _attach_peft(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if uses_peft(settings):
        attach(stage.model, settings[PeftConfig], is_stage=stage.part.num_stages > 1)


def _cut(stage: Stage, settings: Settings, mesh: ParallelMesh, cuts: Sequence[Cut]) -> None:
    if stage.axis is not None:
        cut_model(stage.model, mesh.devices[TENSOR], stage.axis, cuts)


def _connect_peft(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if uses_peft(settings):
        connect(stage.model)
        if stage.axis is not None:
            cut_prompt(stage.model, stage.axis)


def _freeze(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    freeze(stage.model, trained_parts(settings))


def _recompute(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    recompute_layers(stage.model, settings[ParallelConfig].recompute_granularity)


def _multiply_in_fp8(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if settings[OptimizerConfig].fp8_format != "none":
        multiply_in_fp8(stage.model, mesh.device, exempt=is_added)


def _defer_weight_gradients(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if settings[ParallelConfig].pipeline_schedule == "zero-bubble" and stage.part.num_stages > 1:
        stage.deferred_gradients = DeferredWeightGradients(after=partial(accumulate_in_reduce_dtype, stage))
        stage.deferred_gradients.attach(stage.model)


def _draw_from_streams(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if has_dropout(stage.model, settings[ModelConfig], settings[RetroConfig]):
        stage.streams = RandomStreams(settings[TrainingConfig].seed, stage.axis)
        stage.streams.attach(stage.model)


def _fill_and_shard(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    """Unit by unit, so that no more than one is whole on this rank at any time."""
    model = padded_for_cut(settings[ModelConfig], mesh.size(TENSOR))
    seed, retro = settings[TrainingConfig].seed, settings[RetroConfig]
    policy = mixed_precision(compute_dtype(settings[OptimizerConfig]), torch.float32)
    shards, sharding = needs_fsdp(settings, mesh), settings[ParallelConfig].sharding()
    paths = {id(module): path for path, module in stage.model.named_modules()}
    for unit in fsdp_units(stage.model):
        materialize(stage.model, paths[id(unit)], model, retro, seed, mesh.device)
        if shards:
            shard_unit(unit, mesh.devices[DATA], sharding, policy)
    materialize(stage.model, "", model, retro, seed, mesh.device)
    if shards:
        shard_unit(stage, mesh.devices[DATA], sharding, policy)


def compute_dtype(config: OptimizerConfig) -> torch.dtype:
    """What the model computes in."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else torch.float32


def padded_for_cut(model: ModelConfig, tensor_size: int) -> ModelConfig:
    """The same model with a vocabulary padded so that it can be cut; where it can be already, the same padding."""
    if model.padded_vocab_size() % tensor_size == 0:
        return model
    return replace(model, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by * tensor_size)


def tensor_axis(settings: Settings, mesh: ParallelMesh) -> TensorAxis | None:
    """The tensor ranks; None when there is only one."""
    if mesh.size(TENSOR) == 1:
        return None
    return TensorAxis(mesh.group(TENSOR), settings[ParallelConfig].sequence_parallel)


def uses_peft(settings: Settings) -> bool:
    """Whether the run trains something beside a frozen model."""
    return PeftConfig in settings and settings[PeftConfig].peft_method != "none"


def model_on_meta(settings: Settings) -> Retro:
    """The whole model with what is tuned beside it, on the meta device: names, shapes and what trains."""
    with torch.device("meta"):
        module = Retro(settings[ModelConfig], settings[RetroConfig])
    if uses_peft(settings):
        attach(module, settings[PeftConfig])
        connect(module)
    freeze(module, trained_parts(settings))
    return module


def checkpoint_bytes(settings: Settings) -> int:
    """Bytes of one checkpoint of a run: weights and two moments in four bytes each, and the weights that stay."""
    whole = not uses_peft(settings)
    parameters = model_on_meta(settings).parameters()
    return sum(4 * each.numel() * (3 if each.requires_grad else whole) for each in parameters)


def trained_parts(settings: Settings) -> Trained:
    """Where a run changes something: what is tuned beside a model, what retro-fitting added, or everything."""
    if not uses_peft(settings):
        training = settings[TrainingConfig]
        return Trained(decoder=not training.freeze_decoder, encoder=not training.freeze_encoder)
    peft = settings[PeftConfig]
    parts = ("decoder",) if peft.peft_method == "p-tuning" else peft.peft_parts
    return Trained("decoder" in parts, "cross-attention" in parts, "encoder" in parts, weights=False)


def trains(name: str, trained: Trained) -> bool:
    """Whether a run changes a parameter."""
    if not trained.weights:
        return is_added(name)
    return {"decoder": trained.decoder, "encoder": trained.encoder}.get(part_of(name), trained.cross_attention)


def freeze(module: nn.Module, trained: Trained) -> None:
    """Leave gradients to what trains."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains(name, trained))


def needs_fsdp(settings: Settings, mesh: ParallelMesh) -> bool:
    """Whether FSDP2 has anything to do: several data ranks, or a compute type other than the parameters'."""
    return mesh.size(DATA) > 1 or compute_dtype(settings[OptimizerConfig]) != torch.float32


@torch.no_grad()
def materialize(
    root: nn.Module, path: str, model: ModelConfig, retro: RetroConfig, seed: int, device: torch.device
) -> None:
    """Give every meta parameter below `path` of `root` its memory on the device and its first values."""
    for name, parameter in list(root.get_submodule(path).named_parameters(prefix=path)):
        if parameter.is_meta:
            filled = _filled(name, parameter, model, retro, seed, device)
            owner, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(owner), leaf, nn.Parameter(filled, requires_grad=parameter.requires_grad))


def _filled(
    name: str, parameter: Tensor, model: ModelConfig, retro: RetroConfig, seed: int, device: torch.device
) -> Tensor:
    if not isinstance(parameter, DTensor):
        part = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        _fill(part, name, tuple(parameter.shape), None, 0, model, retro, seed)
        return part
    placement = parameter.placements[0]
    part = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
    dim = placement.dim if isinstance(placement, Shard) else None
    start = 0 if dim is None else parameter.device_mesh.get_local_rank() * part.shape[dim]
    _fill(part, name, tuple(parameter.shape), dim, start, model, retro, seed)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _first_blocks(
    name: str, shape: tuple[int, ...], model: ModelConfig, retro: RetroConfig, seed: int
) -> Iterable[tuple[int, Tensor]]:
    if is_added(name):
        return [(0, initial_value(name, shape, seed).view(-1, shape[-1]))]
    return initial_blocks(name, shape, model, retro, seed)


def _fill(
    part: Tensor,
    name: str,
    shape: tuple[int, ...],
    dim: int | None,
    start: int,
    model: ModelConfig,
    retro: RetroConfig,
    seed: int,
) -> None:
    """Copy what of each block of whole rows lies in this part: indices [start, start + length) of dimension `dim`."""
    rows = part.view(-1, part.shape[-1])
    columns = slice(None)
    if dim == len(shape) - 1:
        columns = slice(start, start + part.shape[dim])
    for first, block in _first_blocks(name, shape, model, retro, seed):
        if dim is None or dim == len(shape) - 1:
            rows[first : first + len(block)] = block[:, columns]
            continue
        whole_rows = torch.arange(first, first + len(block))
        inner = math.prod(shape[dim + 1 : -1])
        index = whole_rows // inner % shape[dim]
        held = (index >= start) & (index < start + part.shape[dim])
        outer = whole_rows // (inner * shape[dim])
        own_rows = (outer * part.shape[dim] + index - start) * inner + whole_rows % inner
        rows[own_rows[held]] = block[held].to(rows.device)
