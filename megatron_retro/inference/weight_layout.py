"""How matrices lie in memory while single tokens are decoded on a CPU by PyTorch's product.

A matrix times one vector only reads the matrix. PyTorch reads it fastest when it is stored input by input and all
matrices of a layer lie in one block of memory: 20 GB/s instead of the 14 GB/s of matrices stored output by output, one
by one (`docs/decisions.md`). So that is how a model that generates is stored where csrc is not compiled; shapes and
names do not change. Our own product of few rows reads matrices faster as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_retro.model.leaves import Linear, Output
from megatron_retro.model.retro import Retro
from megatron_retro.ops.linear import reads_by_outputs


@torch.no_grad()
def store_by_inputs(model: Retro) -> Retro:
    """Lay out the matrices of a model that only generates; embedding tables, which are read by rows, stay."""
    if reads_by_outputs():
        return model
    parts: list[nn.Module | None] = [*model.layers.values(), model.encoder, model.output]
    for part in parts:
        weights = [] if part is None else list(_matrices(part))
        if weights:
            _store(weights)
    return model


def _matrices(part: nn.Module) -> Iterator[nn.Parameter]:
    for module in part.modules():
        if isinstance(module, (Linear, Output)) and module.weight is not None and module.weight.device.type == "cpu":
            yield module.weight


def _store(weights: list[nn.Parameter]) -> None:
    """Move matrices of one type into one block."""
    block = torch.empty(sum(weight.numel() for weight in weights), dtype=weights[0].dtype)
    start = 0
    for weight in weights:
        place: Tensor = block[start : start + weight.numel()].view(weight.shape[-1], *weight.shape[:-1])
        place.copy_(weight.movedim(-1, 0))
        weight.set_(place.movedim(0, -1))  # type: ignore[call-overload]
        start += weight.numel()
