"""This rank's part of a trained model, to be used on several processes: cut while it is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_retro.assembly.loaded_model import Loaded, chosen_dtype, open_for_use
from megatron_retro.assembly.run_parts import VOCABULARY_PARAMETERS
from megatron_retro.assembly.stage_building import is_tuned, stage_without_memory
from megatron_retro.checkpoint.live_state import model_tensors, padded_rows
from megatron_retro.checkpoint.loading import Checkpoint, load_tensors
from megatron_retro.checkpoint.stored_settings import open_base
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig, TrainingConfig
from megatron_retro.errors import ConfigError
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.stages import Stage
from megatron_retro.peft.attach import is_added


@dataclass(frozen=True)
class LoadedStage(Loaded):
    """This rank's stage of a replica."""

    stage: Stage


def load_stage(
    path: Path,
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    *,
    dtype: str = "auto",
    tokenizer: TokenizerConfig | None = None,
) -> LoadedStage:
    """The stage of this rank in evaluation mode. Every rank calls it; each data rank holds a replica of its own."""
    if parallel.sequence_parallel or parallel.num_layers_per_virtual_pipeline_stage:
        raise ConfigError(
            "a model that is only used is cut over tensor and pipeline ranks",
            got="--sequence-parallel or --num-layers-per-virtual-pipeline-stage",
            expected="no sequence parallelism, no virtual stages",
        )
    checkpoint, stored, built = open_for_use(path, tokenizer)
    kinds = (ModelConfig, RetroConfig, TokenizerConfig, PeftConfig)
    settings = Settings([*(stored[kind] for kind in kinds), parallel, TrainingConfig()])
    part = stage_parts(settings, seq_length=1)[mesh.rank(PIPELINE)]
    stage = stage_without_memory(settings, part, mesh)
    stage.to_empty(device=mesh.device)
    _fill(stage, checkpoint, stored)
    stage.to(chosen_dtype(dtype, mesh.device))
    stage.eval().requires_grad_(False)
    return LoadedStage(built, settings, checkpoint.path, checkpoint.manifest.fingerprint, stage)


def _fill(stage: Stage, checkpoint: Checkpoint, stored: Settings) -> None:
    """From the checkpoint; of a run that tuned beside a model, that model from its own."""
    tensors = model_tensors(stage.model)
    added = {name: tensor for name, tensor in tensors.items() if is_added(name)}
    sources = [(checkpoint, tensors)]
    if is_tuned(stored):
        frozen = {name: tensor for name, tensor in tensors.items() if name not in added}
        sources = [(open_base(checkpoint), frozen), (checkpoint, added)]
    for source, wanted in sources:
        rows = padded_rows(wanted, dict.fromkeys(VOCABULARY_PARAMETERS, stored[ModelConfig].vocab_size or 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load_tensors(source, wanted, rows, dist.group.WORLD)
