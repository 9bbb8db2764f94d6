"""Products in bfloat16 on a CPU that has no instructions for them.

PyTorch multiplies bfloat16 there up to 80 times slower than float32. The operands are exact in float32, so a product of
these, rounded once, is the same number or a better one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CAPABILITY = torch.backends.cpu.get_cpu_capability()  # a constant where a compiler traces this code


def is_slow(operand: Tensor) -> bool:
    """Whether products of such a tensor are computed in float32."""
    return operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and not _has_instructions()


def _has_instructions() -> bool:
    """PyTorch's library multiplies bfloat16 fast from AVX-512 on; of other architectures nothing is assumed."""
    return _CAPABILITY not in ("AVX2", "NO AVX")


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right."""
    if not is_slow(left):
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def product_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The same into a matrix that exists."""
    if is_slow(left):
        out.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out=out)


def linear_product(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias."""
    if not is_slow(hidden):
        return torch.nn.functional.linear(hidden, weight_YX, bias_Y)
    bias_Y = None if bias_Y is None else bias_Y.float()
    return torch.nn.functional.linear(hidden.float(), weight_YX.float(), bias_Y).to(hidden.dtype)
