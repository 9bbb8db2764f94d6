"""First values. Each depends on the seed and the parameter's name alone, so every layout of ranks starts the same.

A parameter is drawn in blocks of rows of about 16 million numbers, so that a rank draws for what it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig

_BLOCK = 1 << 24
_VECTOR = 16  # torch draws normal numbers sixteen at a time: whole vectors in every block but the last


def initialize(module: nn.Module, model: ModelConfig, retro: RetroConfig, seed: int) -> None:
    """Fill every parameter of a model (or of a part of it) that lies on a real device."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, model, retro, seed))


def initial_value(
    name: str, shape: torch.Size | tuple[int, ...], model: ModelConfig, retro: RetroConfig, seed: int
) -> Tensor:
    """The whole tensor of a parameter, float32 on the CPU."""
    return initial_slice(name, shape, (0,) * len(shape), shape, model, retro, seed)


def initial_slice(
    name: str,
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    model: ModelConfig,
    retro: RetroConfig,
    seed: int,
) -> Tensor:
    """A slice of the same, for which no more is drawn than the blocks that it touches."""
    deviation = standard_deviation(name, model, retro)
    if deviation is None:
        is_norm_weight = name.endswith(("norm.weight", "norm.heads")) and not model.apply_layernorm_1p
        return torch.full(tuple(sizes), 1.0 if is_norm_weight else 0.0)
    found = torch.empty(tuple(sizes))
    columns = slice(offsets[-1], offsets[-1] + sizes[-1])
    rows = rows_of_slice(shape, offsets, sizes)
    for number, block_rows in _blocks(shape, rows):
        block = _normals((len(block_rows), shape[-1]), name, number, seed)
        begin, end = torch.searchsorted(rows, torch.tensor([block_rows.start, block_rows.stop])).tolist()
        found.view(-1, sizes[-1])[begin:end] = block[rows[begin:end] - block_rows.start, columns] * deviation
    return found


def numbers_drawn(
    name: str,
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    model: ModelConfig,
    retro: RetroConfig,
) -> int:
    """How many `initial_slice` draws."""
    if standard_deviation(name, model, retro) is None:
        return 0
    return sum(len(rows) for _, rows in _blocks(shape, rows_of_slice(shape, offsets, sizes))) * shape[-1]


def _blocks(shape: Sequence[int], rows: Tensor) -> Iterator[tuple[int, range]]:
    """The blocks of a whole tensor that some rows touch: the number of each, and its rows."""
    step = max(1, _BLOCK // (_VECTOR * shape[-1])) * _VECTOR
    for number in torch.unique(rows // step).tolist():
        yield number, range(number * step, min((number + 1) * step, math.prod(shape[:-1])))


def rows_of_slice(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Which rows (of the last dimension) of a whole tensor a slice lies in, in their order."""
    rows = torch.zeros(1, dtype=torch.int64)
    for whole, offset, size in zip(shape[:-1], offsets[:-1], sizes[:-1], strict=True):
        rows = (rows[:, None] * whole + torch.arange(offset, offset + size)).flatten()
    return rows


def _normals(shape: tuple[int, int], name: str, number: int, seed: int) -> Tensor:
    """Block `number` of a parameter: each has a stream of its own, so a rank draws those that it needs."""
    generator = torch.Generator().manual_seed(_seed_of(f"{name}/{number}" if number else name, seed))
    return torch.randn(shape, generator=generator)


def standard_deviation(name: str, model: ModelConfig, retro: RetroConfig) -> float | None:
    """Of a matrix's first values; projections that close a residual branch are smaller. None: a constant."""
    if "norm" in name.rsplit(".", 2)[-2] or name.endswith("bias") or ".gate." in name:
        return None
    in_encoder = name.startswith("encoder.")
    if name.endswith("cross_attention.output.weight") and retro.retro_zero_init_output and not in_encoder:
        return None
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        num_layers = retro.retro_encoder_layers if in_encoder else model.num_layers
        return model.init_method_std / math.sqrt(2.0 * num_layers)
    return model.init_method_std


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
