"""The product of a linear layer: PyTorch's, or while a text is generated on a CPU our own for few rows.

A decoding step has one row for each text, and its time is that of reading every weight once. Which product serves is
decided here. Ours has no gradient and serves in inference mode only, so no step of a training run can ever see it,
not even a forward that keeps no gradients because it is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backends import uses_native

# Up to so many rows it is faster than PyTorch's: docs/kernels.md.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8}


def linear(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """[..., X] -> [..., Y]."""
    if not (torch.is_inference_mode_enabled() and _has_few_rows(hidden, weight_YX)):
        return functional.linear(hidden, weight_YX, bias_Y)
    rows_TX = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1]).contiguous()
    bias_Y = None if bias_Y is None else bias_Y.contiguous()
    product_TY: Tensor = torch.ops.megatron_retro.few_row_linear(rows_TX, weight_YX, bias_Y)
    return product_TY.view(*hidden.shape[:-1], weight_YX.shape[0])


def reads_by_outputs() -> bool:
    """Whether few rows are multiplied by a kernel that wants matrices as they are, output by output."""
    serves: bool = uses_native("few_row_linear", "cpu")
    return serves


def _has_few_rows(hidden: Tensor, weight_YX: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.shape[:-1].numel() <= MOST_ROWS.get(hidden.dtype, 0)
        and weight_YX.dtype == hidden.dtype
        and weight_YX.is_contiguous()
        and reads_by_outputs()
    )
