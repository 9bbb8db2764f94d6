"""A model loaded for generation, in one process or spread over the ranks of a replica, whose first rank drives."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.assembly.loading import load_model, load_stage
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.config.training import CheckpointConfig
from megatron_retro.errors import ConfigError, Requeue
from megatron_retro.inference.driver import DriverEngine, run_worker
from megatron_retro.inference.engine import Engine
from megatron_retro.inference.forward import StagedForward
from megatron_retro.inference.text_generator import TextGenerator, build_text_generator, index_for, limits_of
from megatron_retro.ops.agreement import settle_kernels
from megatron_retro.parallel.mesh import ParallelMesh, build_mesh
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.runtime.launch import Launch, Worker, find_launch, this_replica
from megatron_retro.runtime.process_group import choose_device, process_group
from megatron_retro.runtime.signals import STOP_SIGNALS, StopRequests

_USE_GPU = {"cpu": False, "cuda": True}


@dataclass(frozen=True)
class Replica:
    """A model ready to generate, which of its replicas it is, and where its weights come from."""

    generator: TextGenerator
    worker: Worker
    path: Path
    fingerprint: str


def checkpoint_path(settings: Settings) -> Path:
    """The path of --load."""
    path = settings[CheckpointConfig].load
    if path is None:
        raise ConfigError("which model?", expected="--load DIR", fix="give the directory of a checkpoint or of a run")
    return Path(path)


def given_tokenizer(settings: Settings) -> TokenizerConfig | None:
    """The tokenizer of the flags, in place of the one that the checkpoint names."""
    return settings[TokenizerConfig] if settings.origin("tokenizer_type") != DEFAULT_ORIGIN else None


def ask_model(
    settings: Settings,
    work: Callable[[Replica], None],
    *,
    live: LiveRetrievalConfig | None = None,
    shard: str | None = None,
    replicas: bool = False,
) -> None:
    """Call `work` with the model of --load, here or on the first rank of its replica, the driver of the others.

    With `replicas` the processes may hold any number of them, each a worker of its own.
    """
    launch, parallel = find_launch(), settings[ParallelConfig]
    _require_processes(launch, parallel.model_parallel_size(), replicas)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    live = live or LiveRetrievalConfig()
    worker = this_replica(shard, launch, tensor, pipeline)
    if parallel.model_parallel_size() == 1:
        work(_load_whole(settings, live, launch, worker))
        return
    settings[EngineConfig].refuse_to_keep_encoded()
    minutes, use_gpu = parallel.distributed_timeout_minutes, _USE_GPU.get(settings[EngineConfig].device)
    with process_group(launch, timeout_minutes=minutes, use_gpu=use_gpu) as device:
        settle_kernels(device)
        _run_on_ranks(settings, work, live, build_mesh(parallel, device), worker)


def _require_processes(launch: Launch, size: int, replicas: bool) -> None:
    count = launch.world_size
    if count % size if replicas else count != size:
        raise ConfigError(
            "the number of processes does not fit the model",
            got=f"{count} process(es)",
            expected=f"{'a multiple of ' if replicas else ''}tensor x pipeline = {size}",
            fix="start that many (torchrun --nproc-per-node), or change the parallel sizes",
        )


def _load_whole(settings: Settings, live: LiveRetrievalConfig, launch: Launch, worker: Worker) -> Replica:
    engine = settings[EngineConfig]
    choose_device(launch, use_gpu=_USE_GPU.get(engine.device))  # "cuda" is this process's own GPU from here on
    path, tokenizer = checkpoint_path(settings), given_tokenizer(settings)
    allow = settings[TokenizerConfig].allow_tokenizer_mismatch
    loaded = load_model(path, device=engine.device, dtype=engine.dtype, tokenizer=tokenizer, allow_mismatch=allow)
    generator = build_text_generator(loaded, engine, live, allow_tokenizer_mismatch=allow)
    return Replica(generator, worker, loaded.path, loaded.fingerprint)


def _run_on_ranks(
    settings: Settings,
    work: Callable[[Replica], None],
    live: LiveRetrievalConfig,
    mesh: ParallelMesh,
    worker: Worker,
) -> None:
    path, limits = checkpoint_path(settings), limits_of(settings[EngineConfig])
    dtype, tokenizer = settings[EngineConfig].dtype, given_tokenizer(settings)
    allow, parallel = settings[TokenizerConfig].allow_tokenizer_mismatch, settings[ParallelConfig]
    loaded = load_stage(path, parallel, mesh, dtype=dtype, tokenizer=tokenizer, allow_mismatch=allow)
    forward, channel = StagedForward(loaded.stage, loaded.settings, mesh), ReplicaChannel(mesh)
    stopped: Requeue | None = None
    if channel.is_first:
        with contextlib.closing(DriverEngine(forward, loaded.tokenizer, limits, channel)) as engine:
            index = index_for(loaded, live, allow_tokenizer_mismatch=allow)
            add_bos = settings[EngineConfig].add_bos
            generator = TextGenerator(forward, loaded.tokenizer, limits, index, engine, add_bos=add_bos)
            try:
                work(Replica(generator, worker, loaded.path, loaded.fingerprint))
            except Requeue as request:
                stopped = request
    else:
        with StopRequests().listening((*STOP_SIGNALS, signal.SIGINT)):  # the driver has them too, and stops us
            run_worker(Engine(forward, loaded.tokenizer, limits), channel)
    channel.barrier()
    if stopped is not None:
        raise stopped
