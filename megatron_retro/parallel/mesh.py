"""How the processes are laid out: pipeline x data x tensor, tensor innermost, so that its ranks are neighbours.

Neighbours on the data axis share sequences: the context axis is a part of the data axis, over which gradients are
summed and parameters sharded all the same. Data rank d * C + c is context rank c of those that read the d-th share.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.errors import DistributedError
from megatron_retro.runtime.process_group import new_group

PIPELINE, DATA, CONTEXT, TENSOR = "pipeline", "data", "context", "tensor"
AXES = (PIPELINE, DATA, TENSOR)


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place on each axis, and the group of the ranks that share the other places."""

    devices: DeviceMesh
    device: torch.device
    timeout: timedelta
    context: dist.ProcessGroup | None = None

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks along this axis that this rank talks to."""
        if axis == CONTEXT:
            assert self.context is not None
            return self.context
        return self.devices.get_group(axis)

    def rank(self, axis: str) -> int:
        """This rank's place on the axis."""
        if axis == CONTEXT:
            return self.devices.get_local_rank(DATA) % self.size(CONTEXT)
        return self.devices.get_local_rank(axis)

    def size(self, axis: str) -> int:
        if axis == CONTEXT:
            return 1 if self.context is None else self.context.size()
        return int(self.devices[axis].size())


def build_mesh(config: ParallelConfig, device: torch.device) -> ParallelMesh:
    """Lay out all ranks of the default group; every rank calls it."""
    world_size = dist.get_world_size()
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    context = config.context_parallel_size
    if world_size % (tensor * pipeline * context):
        raise DistributedError(
            "the processes cannot be laid out",
            got=f"{world_size} processes",
            expected=f"a multiple of tensor {tensor} x pipeline {pipeline} x context {context}",
            fix="start that many, or change the parallel sizes",
        )
    shape = (pipeline, world_size // (tensor * pipeline), tensor)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    devices = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    mesh = ParallelMesh(devices, device, timeout, _context_group(devices, context, timeout))
    if mesh.context is not None and dist.get_backend(mesh.context) != "fake":
        _connect(mesh, CONTEXT)
    for axis in AXES:  # a group of its own gets torch's default of half an hour otherwise
        if dist.get_backend(mesh.group(axis)) != "fake":  # a planner's fake ranks never wait
            _set_pg_timeout(timeout, mesh.group(axis))
            _connect(mesh, axis)
    return mesh


def _context_group(devices: DeviceMesh, size: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Of the ranks that share this one's sequences; every rank of the world calls it, since it makes all groups."""
    mine = None
    if size > 1:
        for ranks in devices.mesh.movedim(-1, 1).reshape(-1, size).tolist():
            group = new_group(ranks, timeout=timeout)
            mine = group if dist.get_rank() in ranks else mine
    return mine


def _connect(mesh: ParallelMesh, axis: str) -> None:
    """Let the ranks of an axis meet now, all in the order of AXES.

    NCCL connects a group at its first collective. Left to the first step, stages would come to their groups in
    different orders, and sends between two stages need all stages of their group to have connected.
    """
    if mesh.size(axis) > 1:
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.group(axis))
