"""How the processes are laid out: pipeline x data x tensor, tensor innermost, so that its ranks are neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.errors import DistributedError

PIPELINE, DATA, TENSOR = "pipeline", "data", "tensor"
AXES = (PIPELINE, DATA, TENSOR)


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place on each axis, and the group of the ranks that share the other places."""

    devices: DeviceMesh
    device: torch.device
    timeout: timedelta

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks along this axis that this rank talks to."""
        return self.devices.get_group(axis)

    def rank(self, axis: str) -> int:
        """This rank's place on the axis."""
        return self.devices.get_local_rank(axis)

    def size(self, axis: str) -> int:
        return int(self.devices[axis].size())


def build_mesh(config: ParallelConfig, device: torch.device) -> ParallelMesh:
    """Lay out all ranks of the default group; every rank calls it."""
    world_size = dist.get_world_size()
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise DistributedError(
            "the processes cannot be laid out",
            got=f"{world_size} processes",
            expected=f"a multiple of tensor {tensor} x pipeline {pipeline}",
            fix="start that many, or change the parallel sizes",
        )
    shape = (pipeline, world_size // (tensor * pipeline), tensor)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    mesh = ParallelMesh(init_device_mesh(device.type, shape, mesh_dim_names=AXES), device, timeout)
    for axis in AXES:  # a group of its own gets torch's default of half an hour otherwise
        if dist.get_backend(mesh.group(axis)) != "fake":  # a planner's fake ranks never wait
            _set_pg_timeout(timeout, mesh.group(axis))
            _connect(mesh, axis)
    return mesh


def _connect(mesh: ParallelMesh, axis: str) -> None:
    """Let the ranks of an axis meet now, all in the order of AXES.

    NCCL connects a group at its first collective. Left to the first step, stages would come to their groups in
    different orders, and sends between two stages need all stages of their group to have connected.
    """
    if mesh.size(axis) > 1:
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.group(axis))
