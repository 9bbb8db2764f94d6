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


def attach_key_value_factors(projection: Linear, head_size: int) -> None:
    """Scale the keys and values that a projection gives, the last 2 * D entries of each group."""
    projection.add_module(NAME, Factors(projection.weight.shape[0], 2 * head_size))
    projection.register_forward_hook(_scale_output, prepend=True)


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


def merged_weight(parameter: Tensor, factors: Tensor, *, is_bias: bool) -> Tensor:
    """The weight or the bias that does what base and factors do, in float32 or finer."""
    kind = torch.promote_types(parameter.dtype, torch.float32)
    whole, factors = parameter.to(kind, copy=True), factors.to(kind)
    if factors.dim() == 1:
        return whole if is_bias else whole * factors
    whole[:, -factors.shape[-1] :] *= factors if is_bias else factors[..., None]
    return whole
