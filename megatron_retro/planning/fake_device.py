"""One rank of a cluster that is not there: torch's fake process group at real size, tensors without memory.

A GPU is stood in for by torch's `meta` device, on every machine: its tensors have shapes and no values, operators take
them for a GPU's, and they cost a fifth of what fake tensors do. Fake tensors on `cuda` have no backward where there is
no GPU, whatever torch was built for (autograd asks the device for its streams). Where torch is built for CUDA, tests
hold forwards on `meta` to those on a fake `cuda`. For the CPU, which tests measure, fake tensors on `cpu` serve.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  (collectives of tensors without memory)
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.errors import DistributedError
from megatron_retro.parallel.mesh import ParallelMesh, build_mesh
from megatron_retro.runtime.process_group import end_process_group

GPU, CPU = torch.device("meta"), torch.device("cpu")
_KEYS = {"meta": "Meta", "cuda": "CUDA"}


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[ParallelMesh]:
    """Be `rank` of `world_size`, on its mesh."""
    if dist.is_initialized():
        raise DistributedError("a plan needs a process without a process group", fix="run megatron-retro plan alone")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_mesh(parallel, CPU)
    finally:
        end_process_group()


@contextlib.contextmanager
def without_memory(device: torch.device) -> Iterator[None]:
    """What is made and computed inside on `device` takes no memory and has no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        nothing = contextlib.nullcontext()
        kernels = nothing if device == CPU else _kernels_of_a_gpu(device)
        with kernels, nothing if device == GPU else FakeTensorMode():
            yield


@contextlib.contextmanager
def _kernels_of_a_gpu(device: torch.device) -> Iterator[None]:
    """Torch would unfold attention into products of whole score matrices, and on `meta` RMSNorm into elementwise steps;
    a GPU has kernels for both."""
    kernels: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch leaves it untyped
    kernels.impl("scaled_dot_product_attention", _fused_attention, f"Autograd{_KEYS[device.type]}")
    if device == GPU:
        kernels.impl("rms_norm", _fused_rms_norm, f"Autograd{_KEYS[device.type]}")
    try:
        yield
    finally:
        kernels._destroy()


def _fused_attention(
    query_BNSD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch calls on a GPU: flash attention, or with a mask or in float32 the memory-efficient kernel."""
    operators: Any = torch.ops.aten
    attended_BNSD: Tensor
    if attn_mask is None and query_BNSD.dtype in (torch.bfloat16, torch.float16):
        heads = (query_BNSD, key_BGTD, value_BGTD)
        attended_BNSD, *_ = operators._scaled_dot_product_flash_attention(*heads, dropout_p, is_causal, scale=scale)
        return attended_BNSD
    if enable_gqa:
        share = query_BNSD.shape[1] // key_BGTD.shape[1]
        key_BGTD, value_BGTD = (each.repeat_interleave(share, 1) for each in (key_BGTD, value_BGTD))
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query_BNSD.dtype).expand(*query_BNSD.shape[:-1], key_BGTD.shape[2])
    attended_BNSD, *_ = operators._scaled_dot_product_efficient_attention(
        query_BNSD, key_BGTD, value_BGTD, bias, True, dropout_p, is_causal, scale=scale
    )
    return attended_BNSD


def _fused_rms_norm(hidden: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """LayerNorm's kernel, which reads, writes and keeps what RMSNorm's does; that one has no form on `meta`."""
    normed: Tensor = torch.ops.aten.native_layer_norm(hidden, shape, weight, None, eps or 0.0)[0]
    return normed
