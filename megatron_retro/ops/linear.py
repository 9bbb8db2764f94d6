"""The product of a linear layer: PyTorch's, or our small-batch GEMV while a text is generated on a CPU.

A decoding step has one row for each text, and its time is that of reading every weight once. Which product serves is
decided here. Ours has no gradient and serves in inference mode only, so no step of a training run can ever see it,
not even a forward that keeps no gradients because it is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backends import uses_native

# Up to so many rows the GEMV is faster than PyTorch's product: docs/kernels.md.
MAX_GEMV_ROWS = {torch.float32: 16, torch.bfloat16: 8}


def linear(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """[..., X] -> [..., Y]."""
    if not (torch.is_inference_mode_enabled() and _is_small_batch(hidden, weight_YX)):
        return functional.linear(hidden, weight_YX, bias_Y)
    rows_TX = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1]).contiguous()
    bias_Y = None if bias_Y is None else bias_Y.contiguous()
    product_TY: Tensor = torch.ops.megatron_retro.small_batch_gemv(rows_TX, weight_YX, bias_Y)
    return product_TY.view(*hidden.shape[:-1], weight_YX.shape[0])


def has_gemv() -> bool:
    """Whether small batches are multiplied by our GEMV, which wants matrices as they are, output by output."""
    serves: bool = uses_native("small_batch_gemv", "cpu")
    return serves


def _is_small_batch(hidden: Tensor, weight_YX: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.shape[:-1].numel() <= MAX_GEMV_ROWS.get(hidden.dtype, 0)
        and weight_YX.dtype == hidden.dtype
        and weight_YX.is_contiguous()
        and has_gemv()
    )
