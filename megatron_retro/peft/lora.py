"""LoRA: a low-rank update of a linear layer, W + (alpha / rank) * up @ down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_retro.config.training import PeftConfig
from megatron_retro.model.dropout import Dropout
from megatron_retro.model.leaves import HeadsToHidden, Linear

NAME = "lora"


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
    base.add_module(NAME, LowRankUpdate(base, config))
    base.register_forward_hook(_add_update, prepend=True)


def _add_update(base: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    update: LowRankUpdate | None = getattr(base, NAME, None)
    if update is None:
        return output
    # The layer that closes an attention takes heads [..., N, D] and joins them itself.
    hidden = arguments[0].flatten(-2) if isinstance(base, HeadsToHidden) else arguments[0]
    added: Tensor = update(hidden)
    return output + added


def merged_weight(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The weight that does what base and update do, in float32 or finer."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    merged: Tensor = weight.to(kind) + scale * torch.tensordot(up.to(kind), down.to(kind), dims=1)
    return merged
