"""The memory layout of weight matrices while a small batch is decoded on a CPU.

A matrix times one vector only reads the matrix, and it is read fastest from large pages: our small-batch GEMV
reads 37 GB/s of matrices on them, as fast as a sum, and 28 GB/s of matrices on pages of 4 KB. PyTorch's product, which
serves where csrc is not compiled, also wants them input by input: 20 GB/s instead of 14 (`docs/decisions.md`). So the
matrices of a model that generates are moved into one block for each layer; shapes and names do not change.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_retro.model.leaves import Linear, Output
from megatron_retro.model.retro import Retro
from megatron_retro.ops.linear import has_gemv

LARGE_PAGE = 2 << 20


@torch.no_grad()
def store_for_decoding(model: Retro) -> Retro:
    """Lay out the matrices of a model that only generates; embedding tables, which are read by rows, stay.

    A table that is the output's matrix too is read whole for every token, so it moves where rows stay rows.
    """
    parts: list[nn.Module | None] = [*model.layers.values(), model.encoder, model.output]
    for part in parts:
        weights = [] if part is None else list(_matrices(part))
        if weights:
            _store(weights)
    if model.output is not None and model.output.weight is None and model.embedding is not None and has_gemv():
        table = model.embedding.word.weight
        if table.device.type == "cpu":
            _store([table])
    return model


def _matrices(part: nn.Module) -> Iterator[nn.Parameter]:
    for module in part.modules():
        if isinstance(module, (Linear, Output)) and module.weight is not None and module.weight.device.type == "cpu":
            yield module.weight


def _store(weights: list[nn.Parameter]) -> None:
    """Move matrices of one type into one block."""
    block = _block(sum(weight.numel() for weight in weights), weights[0].dtype)
    start = 0
    for weight in weights:
        place = block[start : start + weight.numel()]
        stored = place.view(weight.shape) if has_gemv() else _by_inputs(place, weight.shape)
        weight.set_(stored.copy_(weight))  # type: ignore[call-overload]  # its stub lacks the tensor alone
        start += weight.numel()


def _by_inputs(place: Tensor, shape: torch.Size) -> Tensor:
    return place.view(shape[-1], *shape[:-1]).movedim(0, -1)


def _block(length: int, dtype: torch.dtype) -> Tensor:
    """Memory on large pages where the system has them; it may say no, and then it is memory as usual."""
    num_bytes = length * dtype.itemsize
    if num_bytes < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(length, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE_PAGE
    return whole[first : first + num_bytes].view(dtype)
