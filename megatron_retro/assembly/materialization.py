"""First values of parameters that are never whole: built on meta, filled part by part.

A value depends on the seed and the parameter's name alone, so every layout starts from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.initialization import initial_blocks
from megatron_retro.peft.attach import initial_value, is_added


@torch.no_grad()
def materialize(
    root: nn.Module, path: str, model: ModelConfig, retro: RetroConfig, seed: int, device: torch.device
) -> None:
    """Give every meta parameter below `path` of `root` its memory on the device and its first values."""
    for name, parameter in list(root.get_submodule(path).named_parameters(prefix=path)):
        if parameter.is_meta:
            filled = _filled(name, parameter, model, retro, seed, device)
            owner, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(owner), leaf, nn.Parameter(filled, requires_grad=parameter.requires_grad))


def _filled(
    name: str, parameter: Tensor, model: ModelConfig, retro: RetroConfig, seed: int, device: torch.device
) -> Tensor:
    if not isinstance(parameter, DTensor):
        part = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        _fill(part, name, tuple(parameter.shape), None, 0, model, retro, seed)
        return part
    placement = parameter.placements[0]
    part = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
    dim = placement.dim if isinstance(placement, Shard) else None
    start = 0 if dim is None else parameter.device_mesh.get_local_rank() * part.shape[dim]
    _fill(part, name, tuple(parameter.shape), dim, start, model, retro, seed)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _first_blocks(
    name: str, shape: tuple[int, ...], model: ModelConfig, retro: RetroConfig, seed: int
) -> Iterable[tuple[int, Tensor]]:
    if is_added(name):
        return [(0, initial_value(name, shape, seed).view(-1, shape[-1]))]
    return initial_blocks(name, shape, model, retro, seed)


def _fill(
    part: Tensor,
    name: str,
    shape: tuple[int, ...],
    dim: int | None,
    start: int,
    model: ModelConfig,
    retro: RetroConfig,
    seed: int,
) -> None:
    """Copy what of each block of whole rows lies in this part: indices [start, start + length) of dimension `dim`."""
    rows = part.view(-1, part.shape[-1])
    columns = slice(None)
    if dim == len(shape) - 1:
        columns = slice(start, start + part.shape[dim])
    for first, block in _first_blocks(name, shape, model, retro, seed):
        if dim is None or dim == len(shape) - 1:
            rows[first : first + len(block)] = block[:, columns]
            continue
        whole_rows = torch.arange(first, first + len(block))
        inner = math.prod(shape[dim + 1 : -1])
        index = whole_rows // inner % shape[dim]
        held = (index >= start) & (index < start + part.shape[dim])
        outer = whole_rows // (inner * shape[dim])
        own_rows = (outer * part.shape[dim] + index - start) * inner + whole_rows % inner
        rows[own_rows[held]] = block[held].to(rows.device)
