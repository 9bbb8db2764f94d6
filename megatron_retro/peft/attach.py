"""Attach a method to a model, freeze everything else, say what trains."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_retro.config.training import PeftConfig
from megatron_retro.errors import ConfigError
from megatron_retro.model.attention import CrossAttention, SelfAttention
from megatron_retro.model.layers import MLP
from megatron_retro.model.leaves import Linear
from megatron_retro.model.retro import Retro
from megatron_retro.peft.methods import (
    ADAPTER,
    IA3,
    LORA,
    attach_adapter,
    attach_inner_factors,
    attach_key_value_factors,
    attach_lora,
    connect_adapter,
)
from megatron_retro.peft.prompts import PROMPT, attach_prompt
from megatron_retro.runtime.console import render_table
from megatron_retro.runtime.seeds import derived_seed

ADDED_NAMES = frozenset({LORA, ADAPTER, IA3, PROMPT})
_SMALL_STD = 0.02


def attach(model: Retro, config: PeftConfig, *, is_stage: bool = False) -> None:
    """Add the configured method's modules (values still to be initialized) and freeze the base.

    `connect` must follow, after the model was cut. A pipeline's stage may hold nothing to attach to, a model may not.
    """
    model.requires_grad_(False)
    if config.peft_method == "p-tuning":
        if model.embedding is not None:
            attach_prompt(model.embedding, config)
    else:
        for part in config.peft_parts:
            for name, module in part_modules(model, part):
                _attach_to(name, module, config)
    if not is_stage and not added_parameters(model):
        raise ConfigError(
            f"--peft-method {config.peft_method} finds nothing to attach to",
            got=f"--peft-parts {' '.join(config.peft_parts)}, --lora-targets {' '.join(config.lora_targets)}",
            expected="parts and targets that this model has",
        )


def connect(model: nn.Module) -> None:
    """Let adapters act; the rest acts since it was attached."""
    for module in model.modules():
        if hasattr(module, ADAPTER):
            connect_adapter(module)


def part_modules(model: Retro, part: str) -> Iterator[tuple[str, nn.Module]]:
    """The named modules of a part: decoder, encoder, or the decoder's cross-attention."""
    for name, module in model.named_modules():
        words = name.split(".")
        if part == "encoder":
            inside = words[0] == "encoder"
        else:
            inside = words[0] == "layers" and ("cross_attention" in words) == (part == "cross-attention")
        if inside and not ADDED_NAMES & set(words):
            yield name, module


def _attach_to(name: str, module: nn.Module, config: PeftConfig) -> None:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    with device:
        if config.peft_method == "lora" and isinstance(module, Linear):
            if any(f".{name}".endswith(f".{target}") for target in config.lora_targets):
                attach_lora(module, config)
        elif config.peft_method == "adapter" and isinstance(module, (SelfAttention, MLP)):
            attach_adapter(module, _width(module), config)
        elif config.peft_method == "ia3" and isinstance(module, SelfAttention):
            attach_key_value_factors(module.query_key_value, module.head_size)
        elif config.peft_method == "ia3" and isinstance(module, CrossAttention):
            attach_key_value_factors(module.key_value, module.head_size)
        elif config.peft_method == "ia3" and isinstance(module, MLP):
            attach_inner_factors(module.down)


def _width(block: SelfAttention | MLP) -> int:
    closing = block.output if isinstance(block, SelfAttention) else block.down
    return int(closing.weight.shape[0])


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a method added, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_added(name)}


def is_added(name: str) -> bool:
    """Whether a parameter belongs to a method and not to the base."""
    return bool(ADDED_NAMES & set(name.split(".")))


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole first value of an added parameter: updates start at nothing, factors at one.

    It depends on the seed and the name alone, as the base's do.
    """
    words = name.split(".")
    if IA3 in words:
        return torch.ones(shape)
    starts_at_zero = words[-2] == "up" and PROMPT not in words
    if words[-1] == "bias" or starts_at_zero:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    if LORA in words:
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, _SMALL_STD, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill what was added, in one process."""
    for name, parameter in added_parameters(model).items():
        parameter.copy_(initial_value(name, parameter.shape, seed))


def trainable_table(model: nn.Module) -> str:
    """What trains, group by group, and its share of the whole."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pattern = ".".join("*" if word.isdigit() else word for word in name.split("."))
            groups[pattern] = groups.get(pattern, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(groups.values())
    rows: list[tuple[object, ...]] = [*groups.items(), (f"all ({100 * trained / total:.3f} % of {total:,})", trained)]
    return render_table(("trains", "parameters"), rows)
