"""Losses of a trained model's tokens, wherever it is: whole in this process, or cut over the processes of a replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_retro.assembly.loading import Loaded, LoadedModel, LoadedStage, load_model, load_stage
from megatron_retro.assembly.pipeline_runs import PipelineRuns
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.inference import EngineConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Microbatch
from megatron_retro.ops.agreement import settle_kernels
from megatron_retro.parallel.mesh import PIPELINE, TENSOR, ParallelMesh, build_mesh
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.runtime.launch import Worker, find_launch, this_replica
from megatron_retro.runtime.process_group import choose_device, process_group

Losses = Callable[[Microbatch[Tensor]], NDArray[np.float32] | None]
_USE_GPU = {"cpu": False, "cuda": True}


@dataclass(frozen=True)
class ReplicaLosses:
    """`losses` gives [B, S] on the one rank of the replica that `writes`, else None; all its ranks call it.

    `agree` gives everyone's list on the first rank's word, so that all of them do the same work.
    """

    loaded: Loaded
    device: torch.device
    worker: Worker
    writes: bool
    losses: Losses
    agree: Callable[[list[int]], list[int]]


@contextmanager
def replica_losses(settings: Settings, path: Path, shard: str | None) -> Iterator[ReplicaLosses]:
    """The model at `path` on the processes of this launch, as many replicas as they make."""
    launch, parallel, engine = find_launch(), settings[ParallelConfig], settings[EngineConfig]
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if launch.world_size % (tensor * pipeline):
        raise ConfigError(
            "the processes cannot be divided into replicas of the model",
            got=f"{launch.world_size} process(es)",
            expected=f"a multiple of tensor x pipeline = {tensor * pipeline}",
            fix="start that many (torchrun --nproc-per-node), or change the parallel sizes",
        )
    allow = settings[TokenizerConfig].allow_tokenizer_mismatch
    worker, use_gpu = this_replica(shard, launch, tensor, pipeline), _USE_GPU.get(engine.device)
    if tensor * pipeline == 1:
        choose_device(launch, use_gpu=use_gpu)  # "cuda" is this process's own GPU from here on
        loaded = load_model(path, device=engine.device, dtype=engine.dtype, allow_mismatch=allow)
        loaded.module.keep_encodings(engine.keep_encoded_mb)
        device = next(loaded.module.parameters()).device
        yield ReplicaLosses(loaded, device, worker, True, losses_of_model(loaded), list)
        return
    engine.refuse_to_keep_encoded()
    with process_group(launch, timeout_minutes=parallel.distributed_timeout_minutes, use_gpu=use_gpu) as device:
        settle_kernels(device)
        mesh = build_mesh(parallel, device)
        stage = load_stage(path, parallel, mesh, dtype=engine.dtype, allow_mismatch=allow)
        channel = ReplicaChannel(mesh)
        writes = stage.stage.part.last and mesh.rank(TENSOR) == 0

        def agree(numbers: list[int]) -> list[int]:
            said = np.frombuffer(channel.broadcast(np.array(numbers, np.int64).tobytes()), np.int64)
            return [int(number) for number in said]

        yield ReplicaLosses(stage, device, worker, writes, _losses_of_stage(stage, mesh), agree)
        channel.barrier()


def losses_of_model(loaded: LoadedModel) -> Losses:
    """Of a whole model."""
    module = loaded.module

    @torch.no_grad()
    def losses(batch: Microbatch[Tensor]) -> NDArray[np.float32]:
        found = module(
            batch.tokens_BS,
            batch.neighbors,
            labels_BS=batch.labels_BS,
            position_ids_BS=batch.position_ids_BS,
            document_ids_BS=batch.document_ids_BS,
        )
        return _on_host(found)

    return losses


def _losses_of_stage(loaded: LoadedStage, mesh: ParallelMesh) -> Losses:
    stage = loaded.stage
    runs = PipelineRuns(loaded.settings, mesh, [stage], next(stage.parameters()).dtype)

    @torch.no_grad()
    def losses(batch: Microbatch[Tensor]) -> NDArray[np.float32] | None:
        if mesh.size(PIPELINE) > 1:
            found = runs.evaluate([batch])
        else:
            found = [stage(batch=batch)]
        return _on_host(found[0]) if found is not None else None

    return losses


def _on_host(losses_BS: Tensor) -> NDArray[np.float32]:
    host: NDArray[np.float32] = losses_BS.float().cpu().numpy()
    return host
