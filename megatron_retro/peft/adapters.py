"""Adapters: a bottleneck after attention and after the MLP, in series with the block or beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.training import PeftConfig
from megatron_retro.model.leaves import Linear

NAME = "adapter"


class Bottleneck(nn.Module):
    """down, GELU, up; `up` starts at zero."""

    def __init__(self, width: int, config: PeftConfig) -> None:
        super().__init__()
        self.down = Linear(width, (config.adapter_size,), bias=True)
        self.up = Linear(config.adapter_size, (width,), bias=True)
        self.source: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added."""
        added: Tensor = self.up(functional.gelu(self.down(hidden)))
        return added


def attach_adapter(block: nn.Module, width: int, config: PeftConfig) -> None:
    """Add a bottleneck to an attention or an MLP; `connect_adapter` lets it act."""
    block.add_module(NAME, Bottleneck(width, config))
    if config.adapter_parallel:
        block.register_forward_pre_hook(_remember_input)


def connect_adapter(block: nn.Module) -> None:
    """Let the bottleneck act on what the block gives to the residual stream; after a cut, which leaves it there."""
    block.register_forward_hook(_add_bottleneck)


def _remember_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    getattr(block, NAME).source = arguments[0]


def _add_bottleneck(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    bottleneck: Bottleneck = getattr(block, NAME)
    source, bottleneck.source = bottleneck.source, None
    added: Tensor = bottleneck(output if source is None else source)
    return output + added
