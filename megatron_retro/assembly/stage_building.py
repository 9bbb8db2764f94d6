"""Builds this rank's pipeline stages: the plain model on meta, less what other stages hold, cut, filled, wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from megatron_retro.assembly.materialization import materialize
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.model.costs import Trained
from megatron_retro.model.leaves import Linear
from megatron_retro.model.retro import Retro
from megatron_retro.ops.backends import backend_of
from megatron_retro.ops.fp8_linear import fp8_linear
from megatron_retro.optim.groups import part_of
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import CUTS, Cut
from megatron_retro.parallel.data_parallel import precision, sum_in_reduce_type, units, wrap_unit
from megatron_retro.parallel.deferred_gradients import DeferredWeightGradients
from megatron_retro.parallel.mesh import DATA, TENSOR, ParallelMesh
from megatron_retro.parallel.partition import StagePart
from megatron_retro.parallel.randomness import Streams, has_dropout
from megatron_retro.parallel.recompute import recompute_layers
from megatron_retro.parallel.stages import Stage
from megatron_retro.parallel.styles import cut_model, cut_prompt
from megatron_retro.peft.attach import attach, connect, is_added


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


def build_stage(settings: Settings, part: StagePart, mesh: ParallelMesh, cuts: Sequence[Cut] = CUTS) -> Stage:
    """One stage with its first values, ready to run."""
    stage = stage_without_memory(settings, part, mesh, cuts)
    multiply_in_fp8(stage.model, settings, mesh.device)
    if settings[ParallelConfig].pipeline_schedule == "zero-bubble" and part.num_stages > 1:
        stage.deferred_gradients = DeferredWeightGradients(after=partial(sum_in_reduce_type, stage))
        stage.deferred_gradients.attach(stage.model)
    if has_dropout(stage.model, settings[ModelConfig], settings[RetroConfig]):
        stage.streams = Streams(settings[TrainingConfig].seed, stage.axis)
        stage.streams.attach(stage.model)
    _fill_and_wrap(stage, settings, mesh, padded_for_cut(settings[ModelConfig], mesh.size(TENSOR)))
    return stage


def stage_without_memory(settings: Settings, part: StagePart, mesh: ParallelMesh, cuts: Sequence[Cut] = CUTS) -> Stage:
    """One stage, cut, on the meta device; also what a plan counts."""
    with torch.device("meta"):
        module = Retro(padded_for_cut(settings[ModelConfig], mesh.size(TENSOR)), settings[RetroConfig])
    module.keep_part(part.layers, embedding=part.embedding, encoder=part.encoder, head=part.last)
    if module.embedding is not None and not part.first:
        module.embedding.position = None
    axis = tensor_axis(settings, mesh)
    tunes = is_tuned(settings)
    if tunes:
        attach(module, settings[PeftConfig], is_stage=part.num_stages > 1)
    if axis is not None:
        cut_model(module, mesh.devices[TENSOR], axis, cuts)
    if tunes:
        connect(module)
        if axis is not None:
            cut_prompt(module, axis)
    freeze(module, trained_parts(settings))
    recompute_layers(module, settings[ParallelConfig].recompute_granularity)
    return Stage(module, part, axis)


def multiply_in_fp8(module: Retro, settings: Settings, device: torch.device) -> None:
    """Let the matrices of all layers be multiplied in FP8, where that is asked for; refused where nothing can."""
    if settings[OptimizerConfig].fp8_format == "none":
        return
    backend_of("fp8_linear", device.type)
    for name, part in module.named_modules():
        if isinstance(part, Linear) and "layers." in name and not is_added(name):
            vars(part)["multiply"] = fp8_linear


def is_tuned(settings: Settings) -> bool:
    """Whether the run trains something beside a frozen model."""
    return PeftConfig in settings and settings[PeftConfig].peft_method != "none"


def model_without_memory(settings: Settings) -> Retro:
    """The whole model with what is tuned beside it, on the meta device: names, shapes and what trains."""
    with torch.device("meta"):
        module = Retro(settings[ModelConfig], settings[RetroConfig])
    if is_tuned(settings):
        attach(module, settings[PeftConfig])
        connect(module)
    freeze(module, trained_parts(settings))
    return module


def trained_parts(settings: Settings) -> Trained:
    """Where a run changes something: what is tuned beside a model, what retro-fitting added, or everything."""
    if not is_tuned(settings):
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


def needs_units(settings: Settings, mesh: ParallelMesh) -> bool:
    """Whether FSDP2 has anything to do: several data ranks, or a compute type other than the parameters'."""
    return mesh.size(DATA) > 1 or compute_dtype(settings[OptimizerConfig]) != torch.float32


def _fill_and_wrap(stage: Stage, settings: Settings, mesh: ParallelMesh, model: ModelConfig) -> None:
    """Unit by unit, so that no more than one is whole on this rank at any time."""
    seed, retro = settings[TrainingConfig].seed, settings[RetroConfig]
    policy = precision(compute_dtype(settings[OptimizerConfig]), torch.float32)
    wraps, sharding = needs_units(settings, mesh), settings[ParallelConfig].sharding()
    paths = {id(module): path for path, module in stage.model.named_modules()}
    for unit in units(stage.model):
        materialize(stage.model, paths[id(unit)], model, retro, seed, mesh.device)
        if wraps:
            wrap_unit(unit, mesh.devices[DATA], sharding, policy)
    materialize(stage.model, "", model, retro, seed, mesh.device)
    if wraps:
        wrap_unit(stage, mesh.devices[DATA], sharding, policy)
