"""What is put beside a frozen model, module by module: LoRA, adapters, (IA)3. Each starts as the model was.

LoRA: a low-rank update of a linear layer, W + (alpha / rank) * up @ down. Adapters: a bottleneck after attention and
after the MLP, in series with the block or beside it. (IA)3: learned factors of keys, values and the MLP's inner
activations, all ones at first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.training import PeftConfig
from megatron_retro.model.leaves import Dropout, HeadsToHidden, Linear
from megatron_retro.ops.local_tensors import local

LORA, ADAPTER, IA3 = "lora", "adapter", "ia3"


class LowRankUpdate(nn.Module):
    """What is added to a linear layer's output. `up` starts at zero: the model starts as it was."""

    def __init__(self, base: Linear, config: PeftConfig) -> None:
        super().__init__()
        *output_shape, input_size = base.weight.shape
        self.down = Linear(input_size, (config.lora_rank,), bias=False)
        self.up = Linear(config.lora_rank, tuple(output_shape), bias=False)
        self.scale = config.lora_alpha / config.lora_rank
        self.dropout = Dropout(config.lora_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """The update of the base's output for this input."""
        update: Tensor = self.up(self.down(self.dropout(hidden))) * self.scale
        return update


def attach_lora(base: Linear, config: PeftConfig) -> None:
    """Add the update to a linear layer; it acts before what other hooks do to the output (a reduction over ranks)."""
    base.add_module(LORA, LowRankUpdate(base, config))
    base.register_forward_hook(_add_update, prepend=True)


def _add_update(base: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    update: LowRankUpdate | None = getattr(base, LORA, None)
    if update is None:
        return output
    # The layer that closes an attention takes heads [..., N, D] and joins them itself.
    hidden = arguments[0].flatten(-2) if isinstance(base, HeadsToHidden) else arguments[0]
    added: Tensor = update(hidden)
    return output + added


def lora_merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The weight that does what base and update do, in float32 or finer."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    merged: Tensor = weight.to(kind) + scale * torch.tensordot(up.to(kind), down.to(kind), dims=1)
    return merged


class Bottleneck(nn.Module):
    """down, GELU, up; `up` starts at zero."""

    def __init__(self, width: int, config: PeftConfig) -> None:
        super().__init__()
        self.down = Linear(width, (config.adapter_size,), bias=True)
        self.up = Linear(config.adapter_size, (width,), bias=True)
        self.source: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.up(functional.gelu(self.down(hidden)))
        return added


def attach_adapter(block: nn.Module, width: int, config: PeftConfig) -> None:
    """Add a bottleneck to an attention or an MLP; `connect_adapter` lets it act."""
    block.add_module(ADAPTER, Bottleneck(width, config))
    if config.adapter_parallel:
        block.register_forward_pre_hook(_remember_input)


def connect_adapter(block: nn.Module) -> None:
    """Let the bottleneck act on what the block gives to the residual stream; after a cut, which leaves it there."""
    block.register_forward_hook(_add_bottleneck)


def _remember_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    getattr(block, ADAPTER).source = arguments[0]


def _add_bottleneck(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    bottleneck: Bottleneck = getattr(block, ADAPTER)
    source, bottleneck.source = bottleneck.source, None
    added: Tensor = bottleneck(output if source is None else source)
    return output + added


class ScalingFactors(nn.Module):
    """A vector of factors."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def forward(self, hidden: Tensor) -> Tensor:
        """Scaled; for [G, 2 * D] factors, only the last 2 * D entries of each group."""
        factors = local(self.weight)
        if factors.dim() == 1:
            return hidden * factors
        scaled = factors.shape[-1]
        return torch.cat((hidden[..., :-scaled], hidden[..., -scaled:] * factors), -1)


def attach_key_value_factors(projection: Linear, head_size: int) -> None:
    """Scale the keys and values that a projection gives, the last 2 * D entries of each group."""
    projection.add_module(IA3, ScalingFactors(projection.weight.shape[0], 2 * head_size))
    projection.register_forward_hook(_scale_output, prepend=True)


def attach_inner_factors(down: Linear) -> None:
    """Scale what the MLP's second matrix reads."""
    down.add_module(IA3, ScalingFactors(down.weight.shape[-1]))
    down.register_forward_pre_hook(_scale_input)


def _scale_output(base: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    factors: ScalingFactors | None = getattr(base, IA3, None)
    return output if factors is None else factors(output)


def _scale_input(base: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    factors: ScalingFactors | None = getattr(base, IA3, None)
    return arguments if factors is None else (factors(arguments[0]), *arguments[1:])


def ia3_merged(parameter: Tensor, factors: Tensor, *, is_bias: bool) -> Tensor:
    """The weight or the bias that does what base and factors do, in float32 or finer."""
    kind = torch.promote_types(parameter.dtype, torch.float32)
    whole, factors = parameter.to(kind, copy=True), factors.to(kind)
    if factors.dim() == 1:
        return whole if is_bias else whole * factors
    whole[:, -factors.shape[-1] :] *= factors if is_bias else factors[..., None]
    return whole
