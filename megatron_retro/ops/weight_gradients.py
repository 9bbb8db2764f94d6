"""Products of linear layers whose backward adds the weight's gradient to a sum, in the product that makes it.

A weight's gradient of each microbatch is a product. Kept by itself it is written, read again and added: twelve bytes of
traffic for a weight in bfloat16. On a GPU the library's product adds to the sum in float32 instead, and nothing is
rounded in between. The sum is an argument, so that one graph of a compiler serves all layers of a kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_retro.ops.cpu_products import is_slow, linear_product, product

# torch leaves it untyped
_OPERATORS: Any = torch.library.Library("megatron_retro", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define("add_product(Tensor(a!) sums, Tensor left, Tensor right) -> ()")


@torch.library.impl(_OPERATORS, "add_product", "CompositeExplicitAutograd")
def _add_product(sums_YX: Tensor, left_YT: Tensor, right_TX: Tensor) -> None:
    if left_YT.dtype == sums_YX.dtype:
        sums_YX.addmm_(left_YT, right_TX)
    elif is_slow(left_YT):
        sums_YX.addmm_(left_YT.float(), right_TX.float())
    elif left_YT.device.type == "cpu":
        sums_YX += left_YT @ right_TX
    else:
        torch.addmm(sums_YX, left_YT, right_TX, out_dtype=sums_YX.dtype, out=sums_YX)


def add_product(sums_YX: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """sums += gradient.T @ hidden, over all leading dimensions; a compiler takes it as one operator."""
    torch.ops.megatron_retro.add_product(sums_YX, gradient.flatten(0, -2).T, hidden.flatten(0, -2))


def adding_linear(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, sums_YX: Tensor) -> Tensor:
    """[..., X] -> [..., Y]; autograd finds no gradient of the weight, which is added to `sums`."""
    given = hidden, weight_YX, bias_Y, sums_YX
    result: Tensor = _AddingLinear.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _AddingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, sums_YX: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight_YX, sums_YX)
        return linear_product(hidden, weight_YX, bias_Y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        hidden, weight_YX, sums_YX = ctx.saved_tensors
        hidden_gradient = product(gradient, weight_YX) if ctx.needs_input_grad[0] else None
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        add_product(sums_YX, gradient, hidden)  # last, so that what the input's gradient goes into need not wait
        return hidden_gradient, None, bias_gradient, None
