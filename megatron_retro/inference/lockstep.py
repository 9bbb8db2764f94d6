"""A model on several processes that all ask it the same, for programs of others that run whole on every process.

Where this package's own programs have one process that asks (`replicas.py`), a library's program is started on all of
them: the processes of one replica go through the same requests in step, and replicas share the requests.
"""

from __future__ import annotations

import atexit
import contextlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_retro.assembly.loading import load_model, load_stage
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.inference.driver import BroadcastSource
from megatron_retro.inference.forward import StagedForward
from megatron_retro.inference.neighbor_sources import NeighborSource
from megatron_retro.inference.text_generator import TextGenerator, build_text_generator, index_for, limits_of
from megatron_retro.ops.agreement import settle_kernels
from megatron_retro.parallel.mesh import DATA, ParallelMesh, build_mesh
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.runtime.launch import Launch, find_launch
from megatron_retro.runtime.process_group import new_group, process_group

# A replica that waits for the others' share of the work has not failed.
_TIMEOUT = timedelta(days=30)
_USE_GPU = {"cpu": False, "cuda": True}


@dataclass(frozen=True)
class Replicas:
    """The replica of this process among the others; `everyone` is None for a process that is alone."""

    index: int = 0
    count: int = 1
    everyone: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """The value of each replica, by number; the processes of one have the same, and all of them call it."""
        if self.everyone is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.index, value), group=self.everyone)
        by_replica = dict(found)
        return [by_replica[number] for number in range(self.count)]


@dataclass(frozen=True)
class Lockstep:
    """What generates, where its neighbours come from, and which replica it is."""

    generator: TextGenerator
    source: NeighborSource | None
    replicas: Replicas


def open_in_step(
    path: Path,
    engine: EngineConfig,
    retro_index: str | None,
    retrieval: str,
    parallel: ParallelConfig,
    *,
    allow_tokenizer_mismatch: bool = False,
) -> Lockstep:
    """Load the model on the processes of this launch; they belong together until the program ends."""
    launch, live = find_launch(), LiveRetrievalConfig(retro_index=retro_index)
    allow, mode = allow_tokenizer_mismatch, "none" if retro_index is None else retrieval
    mesh, replicas = None, Replicas()
    if launch.world_size > 1 or parallel.model_parallel_size() > 1:
        mesh = _mesh(launch, engine, parallel)
        replicas = Replicas(mesh.rank(DATA), mesh.size(DATA), new_group(backend="gloo", timeout=_TIMEOUT))
    if mesh is None or parallel.model_parallel_size() == 1:
        whole = load_model(path, device=engine.device, dtype=engine.dtype, allow_mismatch=allow)
        generator = build_text_generator(whole, engine, live, allow_tokenizer_mismatch=allow)
        return Lockstep(generator, generator.source(mode), replicas)
    loaded = load_stage(path, parallel, mesh, dtype=engine.dtype, allow_mismatch=allow)
    forward, channel = StagedForward(loaded.stage, loaded.settings, mesh), ReplicaChannel(mesh)
    index = index_for(loaded, live, allow_tokenizer_mismatch=allow) if channel.is_first else None
    generator = TextGenerator(forward, loaded.tokenizer, limits_of(engine), index, add_bos=engine.add_bos)
    if mode == "none" or not forward.reads_neighbors:
        return Lockstep(generator, None, replicas)
    found = generator.source(mode) if channel.is_first else None
    return Lockstep(generator, BroadcastSource(channel, forward.neighbor_shape, found), replicas)


def _mesh(launch: Launch, engine: EngineConfig, parallel: ParallelConfig) -> ParallelMesh:
    stack = contextlib.ExitStack()
    device = stack.enter_context(process_group(launch, use_gpu=_USE_GPU.get(engine.device)))
    atexit.register(stack.close)
    settle_kernels(device)
    return build_mesh(parallel, device)
