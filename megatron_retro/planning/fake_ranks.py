"""One rank of a cluster that is not there: torch's fake process group at real size, tensors without memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.errors import DistributedError
from megatron_retro.parallel.mesh import ParallelMesh, build_mesh
from megatron_retro.runtime.process_group import end_process_group


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[ParallelMesh]:
    """Be `rank` of `world_size`, on its mesh."""
    if dist.is_initialized():
        raise DistributedError("a plan needs a process without a process group", fix="run megatron-retro plan alone")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_mesh(parallel, torch.device("cpu"))
    finally:
        end_process_group()


@contextlib.contextmanager
def without_memory(value_type: torch.dtype) -> Iterator[None]:
    """Tensors made inside have no memory, and `value_type` as default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(value_type)
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.set_default_dtype(before)
