"""(IA)3: learned factors of keys, values and the MLP's inner activations, all ones at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_retro.model.leaves import Linear
from megatron_retro.ops.local_tensors import local

NAME = "ia3"


class Factors(nn.Module):
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


def attach_key_value_factors(query_key_value: Linear, head_size: int) -> None:
    """Scale the keys and values that a projection gives."""
    query_key_value.add_module(NAME, Factors(query_key_value.weight.shape[0], 2 * head_size))
    query_key_value.register_forward_hook(_scale_output, prepend=True)


def attach_inner_factors(down: Linear) -> None:
    """Scale what the MLP's second matrix reads."""
    down.add_module(NAME, Factors(down.weight.shape[-1]))
    down.register_forward_pre_hook(_scale_input)


def _scale_output(base: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    factors: Factors | None = getattr(base, NAME, None)
    return output if factors is None else factors(output)


def _scale_input(base: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    factors: Factors | None = getattr(base, NAME, None)
    return arguments if factors is None else (factors(arguments[0]), *arguments[1:])


def merge_factors(base: Linear) -> None:
    """Write the factors into the weight (in float32) and remove them."""
    factors: Tensor = getattr(base, NAME).weight.float()
    with torch.no_grad():
        weight = base.weight.float()
        if factors.dim() == 1:
            weight = weight * factors
        else:
            weight[:, -factors.shape[-1] :] *= factors[..., None]
            if base.bias is not None:
                base.bias[:, -factors.shape[-1] :] *= factors.to(base.bias.dtype)
        base.weight.copy_(weight)
    delattr(base, NAME)
