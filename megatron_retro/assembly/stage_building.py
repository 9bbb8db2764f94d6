"""Builds this rank's pipeline stages: a plain model, to which a fixed list of transformations is applied in order.

A stage is built, cut and sharded on the meta device; only what this rank holds gets memory, and is drawn unless a
checkpoint gives it. A first value depends on the seed and the parameter's name alone, so every layout starts from the
same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig, against_compiling
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.model.costs import Trained
from megatron_retro.model.initialization import initial_slice, numbers_drawn
from megatron_retro.model.retro import Retro
from megatron_retro.ops.compilation import compiler_problems
from megatron_retro.ops.local_tensors import local
from megatron_retro.optim.groups import part_of
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import CUTS, Cut
from megatron_retro.parallel.data_parallel import (
    accumulate_in_reduce_dtype,
    fsdp_units,
    gather_ahead,
    mixed_precision,
    reduce_without_stalls,
    shard_unit,
)
from megatron_retro.parallel.gradient_sums import GradientSums
from megatron_retro.parallel.layer_transforms import (
    DeferredWeightGradients,
    compile_layers,
    layers_of,
    multiply_in_fp8,
    recompute_layers,
)
from megatron_retro.parallel.mesh import CONTEXT, DATA, TENSOR, ParallelMesh
from megatron_retro.parallel.partition import StagePart
from megatron_retro.parallel.randomness import RandomStreams, has_dropout
from megatron_retro.parallel.sequence_parts import ContextAxis
from megatron_retro.parallel.stages import Stage
from megatron_retro.parallel.tensor_parallel import cut_model, cut_prompt
from megatron_retro.peft.attach import attach, connect, initial_value, is_added
from megatron_retro.runtime.console import warn

_REDUCED_AT_ONCE = 2  # units, where gradients are reduced with every microbatch
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
        _share_sequences,
        _recompute,  # around the regions' hooks, so collectives are repeated; the layers' own hooks stay outside
    )
    for transform in transformations:
        transform(stage, settings, mesh)
    return stage


def build_stage(settings: Settings, part: StagePart, mesh: ParallelMesh, cuts: Sequence[Cut] = CUTS) -> Stage:
    """One stage in this rank's memory, without values: `draw_first_values` or a checkpoint gives them."""
    stage = stage_on_meta(settings, part, mesh, cuts)
    transformations: tuple[Transformation, ...] = (
        _compile,  # acts inside of recomputation and of the layers' own hooks, when a layer first runs
        _multiply_in_fp8,  # this and the next change how matrices are multiplied: the settings allow one of them
        _defer_weight_gradients,
        _draw_from_streams,  # outside of recomputation, which brings the streams' states back
        _shard,  # FSDP2 takes over the parameters, and its hooks go around all others
        _sum_gradients,  # into FSDP2's sums; around what is compiled, inside of recomputation
        _allocate,
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
        # FP8 multiplies its own way
        overlaps = OptimizerConfig not in settings or settings[OptimizerConfig].fp8_format == "none"
        cut_model(stage.model, mesh.devices[TENSOR], stage.axis, cuts, overlaps=overlaps)


def _connect_peft(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if uses_peft(settings):
        connect(stage.model)
        if stage.axis is not None:
            cut_prompt(stage.model, stage.axis)


def _freeze(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    freeze(stage.model, trained_parts(settings))


def _share_sequences(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    stage.model.contexts.share = context_axis(mesh)


def _compile(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if compiles(settings, mesh.device):
        compile_layers(stage.model)


def compiles(settings: Settings, device: torch.device) -> bool:
    """Whether layers are compiled: as it is asked for, or on GPUs where nothing speaks against it."""
    wanted = settings[ParallelConfig].compile
    if wanted is None:
        wanted = device.type == "cuda" and not any(against_compiling(settings))
    problems = compiler_problems(device.type) if wanted else ()
    if problems:
        warn(f"layers are not compiled: {'; '.join(problems)}")
    return wanted and not problems


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
        stage.streams = RandomStreams(settings[TrainingConfig].seed, stage.axis, mesh.rank(CONTEXT))
        stage.streams.attach(stage.model)


def _allocate(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    stage.to_empty(device=mesh.device)


def _shard(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if needs_fsdp(settings, mesh):
        policy = mixed_precision(compute_dtype(settings[OptimizerConfig]), torch.float32)
        sharding, units = settings[ParallelConfig].sharding(), [*fsdp_units(stage.model), stage]
        for unit in units:
            shard_unit(unit, mesh.devices[DATA], sharding, policy)
        if sharding != "none":
            gather_ahead(list(stage.model.layers.values()))
        often = sharding in ("gradients", "full") and stage.part.num_stages == 1
        reduce_without_stalls(stage, _REDUCED_AT_ONCE if often else len(units))


def _sum_gradients(stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
    if needs_fsdp(settings, mesh):
        stage.gradient_sums = GradientSums(torch.float32)
        stage.gradient_sums.attach(stage, layers_of(stage.model), stage.deferred_gradients)


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


def context_axis(mesh: ParallelMesh) -> ContextAxis | None:
    """The ranks that share sequences; None where each has its own."""
    return None if mesh.size(CONTEXT) == 1 else ContextAxis(mesh.group(CONTEXT))


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
def draw_first_values(stage: Stage, settings: Settings, mesh: ParallelMesh, given: Container[str] = ()) -> None:
    """Fill what this rank holds of every parameter but the `given` ones, and draw for nothing else."""
    model = padded_for_cut(settings[ModelConfig], mesh.size(TENSOR))
    seed, retro = settings[TrainingConfig].seed, settings[RetroConfig]
    for name, parameter in _not_given(stage, given):
        for offsets, sizes in _slices_here(parameter):
            if is_added(name):
                whole = initial_value(name, tuple(parameter.shape), seed)
                value = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
            else:
                value = initial_slice(name, parameter.shape, offsets, sizes, model, retro, seed)
            local(parameter).copy_(value)


def numbers_drawn_at_start(settings: Settings, part: StagePart, mesh: ParallelMesh, given: Container[str] = ()) -> int:
    """How many numbers `draw_first_values` draws on this rank for a stage, but for what is tuned beside a model."""
    stage = stage_on_meta(settings, part, mesh)
    _shard(stage, settings, mesh)
    model, retro = padded_for_cut(settings[ModelConfig], mesh.size(TENSOR)), settings[RetroConfig]
    return sum(
        numbers_drawn(name, parameter.shape, offsets, sizes, model, retro)
        for name, parameter in _not_given(stage, given)
        if not is_added(name)
        for offsets, sizes in _slices_here(parameter)
    )


def _not_given(stage: Stage, given: Container[str]) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in stage.model.named_parameters() if name not in given]


def _slices_here(parameter: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of what this rank holds of a parameter: one slice, or nothing."""
    if not isinstance(parameter, DTensor):
        return [((0,) * parameter.dim(), tuple(parameter.shape))]
    chunks = parameter.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if math.prod(chunk.sizes)]
