"""The feed-forward half of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig
from megatron_retro.model.leaves import Linear
from megatron_retro.ops.activation import GELU, GELU_TANH, SQUARED_RELU, SWIGLU, activate
from megatron_retro.ops.recomputation import recomputed


def activation_kind(config: ModelConfig) -> str:
    """The configured nonlinearity."""
    if config.swiglu:
        return SWIGLU
    if config.squared_relu:
        return SQUARED_RELU
    return GELU_TANH if config.gelu_tanh else GELU


class MLP(nn.Module):
    """up, nonlinearity, down; a gated one has two matrices up. The backward pass computes the nonlinearity again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.ffn_width(), not config.disable_bias_linear
        self.kind = activation_kind(config)
        self.up = Linear(config.hidden_size, (2, width) if config.swiglu else (width,), bias=bias)
        self.down = Linear(width, (config.hidden_size,), bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        projected = self.up(hidden)
        activated = activate(projected, self.kind)
        with recomputed(activated, lambda: activate(projected.detach(), self.kind)):
            output: Tensor = self.down(activated)
        return output
