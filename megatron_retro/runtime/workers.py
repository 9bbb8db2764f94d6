"""Worker i of N: from `--shard i/N`, a SLURM array or job, or MPI, all with the same numbering from 0."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_retro.errors import ConfigError
from megatron_retro.runtime.launch import Launch


@dataclass(frozen=True)
class Worker:
    """This worker's number and how many there are."""

    index: int
    count: int

    def share(self, total: int) -> range:
        """This worker's contiguous share of `total` items."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


def this_worker(shard: str | None, environment: Mapping[str, str] | None = None) -> Worker:
    """The worker that this process is; without any sign, the only one."""
    if shard is not None:
        return _from_text(shard)
    variables = os.environ if environment is None else environment
    if "SLURM_ARRAY_TASK_ID" in variables:
        first = int(variables.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(variables.get("SLURM_ARRAY_TASK_STEP", "1"))
        index = (int(variables["SLURM_ARRAY_TASK_ID"]) - first) // step
        return Worker(index, int(variables["SLURM_ARRAY_TASK_COUNT"]))
    for rank, size in (
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if rank in variables and size in variables:
            return Worker(int(variables[rank]), int(variables[size]))
    return Worker(0, 1)


def this_replica(
    shard: str | None, launch: Launch, tensor: int, pipeline: int, environment: Mapping[str, str] | None = None
) -> Worker:
    """The worker that this process's replica of a model is, where tensor x pipeline processes hold one replica.

    An array job or `--shard` divides the work first, and the replicas of each launch divide its part. Where every
    process holds a whole model, an explicit `--shard` is this process's own number.
    """
    variables = os.environ if environment is None else environment
    count = launch.world_size // (tensor * pipeline)
    if shard is not None and tensor * pipeline == 1:
        return this_worker(shard)
    whole = Worker(0, 1)
    if shard is not None or "SLURM_ARRAY_TASK_ID" in variables:
        whole = this_worker(shard, variables)
    return Worker(whole.index * count + launch.rank // tensor % count, whole.count * count)


def _from_text(shard: str) -> Worker:
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match:
        index, count = int(match[1]), int(match[2])
        if index < count:
            return Worker(index, count)
    raise ConfigError(f"--shard {shard}: no such worker", expected="i/N with 0 <= i < N, as 0/4 .. 3/4")
