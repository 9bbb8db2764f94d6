"""First values. Each depends on the seed and the parameter's name alone, so every layout of ranks starts the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig

_BLOCK = 1 << 24
_VECTOR = 16  # torch draws normal numbers sixteen at a time, so blocks of that give the same stream as the whole


def initialize(module: nn.Module, model: ModelConfig, retro: RetroConfig, seed: int) -> None:
    """Fill every parameter of a model (or of a part of it) that lies on a real device."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, model, retro, seed))


def initial_value(
    name: str, shape: torch.Size | tuple[int, ...], model: ModelConfig, retro: RetroConfig, seed: int
) -> Tensor:
    """The whole tensor of a parameter, float32 on the CPU."""
    blocks = [block for _, block in initial_blocks(name, shape, model, retro, seed)]
    return torch.cat(blocks).view(shape)


def initial_blocks(
    name: str, shape: torch.Size | tuple[int, ...], model: ModelConfig, retro: RetroConfig, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """The same in blocks of rows (the last dimension), each with its first row; for what is never held whole."""
    width = shape[-1]
    num_rows = math.prod(shape[:-1])
    deviation = standard_deviation(name, model, retro)
    generator = torch.Generator().manual_seed(_seed_of(name, seed))
    is_norm_weight = name.endswith("norm.weight") and not model.apply_layernorm_1p
    step = max(1, _BLOCK // (_VECTOR * width)) * _VECTOR
    for start in range(0, num_rows, step):
        block = (min(step, num_rows - start), width)
        if deviation is not None:
            yield start, torch.randn(block, generator=generator) * deviation
        else:
            yield start, torch.full(block, 1.0 if is_norm_weight else 0.0)


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
