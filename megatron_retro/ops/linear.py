"""The product of a linear layer: PyTorch's, our small-batch GEMV while a text is generated on a CPU, or one in FP8.

A decoding step has one row for each text, and its time is that of reading every weight once. The GEMV has no gradient
and serves in inference mode only, so no step of a training run can ever see it, not even a forward that keeps no
gradients because it is computed again.

In FP8 operands are rounded to eight bits; sums and results are in the layer's own dtype. Each tensor is scaled by its
own largest value at every call, so nothing is kept between steps: values and weights in e4m3, gradients in e5m2.
`fp8_linear` takes what `functional.linear` takes and can stand in `Linear.multiply`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import ScalingType

from megatron_retro.ops.backend_names import REFERENCE, TRANSFORMER_ENGINE
from megatron_retro.ops.backends import backend_of, uses_native
from megatron_retro.ops.cpu_products import linear_product
from megatron_retro.ops.engines import transformer_engine_linear

# Up to so many rows the GEMV is faster than PyTorch's product: docs/kernels.md.
MAX_GEMV_ROWS = {torch.float32: 16, torch.bfloat16: 8}


def linear(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """[..., X] -> [..., Y]."""
    generates = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    if not (generates and _is_small_batch(hidden, weight_YX)):
        return linear_product(hidden, weight_YX, bias_Y)
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


_FP8_TILE = 16  # of rows and columns, as the hardware has it
_VALUES, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_linear(hidden: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """[..., X] -> [..., Y] in the dtype of `hidden`; all sizes are filled up to the hardware's tiles with zeros."""
    rows_TX = hidden.flatten(0, -2)
    height, width = weight_YX.shape
    columns = _missing(width)
    padded_TX = _padded(rows_TX, _missing(len(rows_TX)), columns)
    padded_YX = _padded(weight_YX, _missing(height), columns)
    backend = backend_of("fp8_linear", hidden.device.type)
    if backend == TRANSFORMER_ENGINE:
        product_TY = transformer_engine_linear(padded_TX, padded_YX)
    else:
        plain = backend == REFERENCE
        product_TY = _ScaledProduct.apply(padded_TX, padded_YX, plain)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    product_TY = product_TY[: len(rows_TX), :height]
    if bias_Y is not None:
        product_TY = product_TY + bias_Y
    return torch.unflatten(product_TY, 0, hidden.shape[:-1])


def _missing(size: int) -> int:
    """What fills a size up to whole tiles; an empty one to one tile."""
    return -size % _FP8_TILE if size else _FP8_TILE


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


class _ScaledProduct(torch.autograd.Function):
    """hidden @ weight.T; what is kept for the gradients are the eight-bit operands."""

    @staticmethod
    def forward(ctx: Any, hidden_TX: Tensor, weight_YX: Tensor, plain: bool) -> Tensor:
        ctx.plain, ctx.weight_dtype = plain, weight_YX.dtype
        hidden, hidden_scale = _rounded(hidden_TX, _VALUES)
        weight, weight_scale = _rounded(weight_YX, _VALUES)
        ctx.save_for_backward(hidden, hidden_scale, weight, weight_scale)
        return _product(hidden, hidden_scale, weight.T, weight_scale, hidden_TX.dtype, plain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TY: Tensor) -> tuple[Tensor | None, ...]:
        hidden, hidden_scale, weight, weight_scale = ctx.saved_tensors
        gradient, scale = _rounded(gradient_TY, _GRADIENTS)
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            hidden_gradient = _product(gradient, scale, weight, weight_scale, gradient_TY.dtype, ctx.plain)
        if ctx.needs_input_grad[1]:
            weight_gradient = _product(gradient.T, scale, hidden, hidden_scale, ctx.weight_dtype, ctx.plain)
        return hidden_gradient, weight_gradient, None


def _rounded(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor over its scale, in eight bits, and the scale (float32): its largest value becomes the type's."""
    limit = torch.finfo(dtype).max
    largest = torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32)
    scale = (largest / limit).clamp_min(torch.finfo(torch.float32).tiny)
    return (tensor / scale[None]).to(dtype), scale  # divided in float32, since the scale has a dimension


def _product(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype, plain: bool
) -> Tensor:
    if plain:
        return ((left.float() @ right.float()) * (left_scale * right_scale)).to(dtype)
    by_tensor = ScalingType.TensorWise
    # the library wants rows on the left and columns on the right to be contiguous
    columns = right if right.T.is_contiguous() else right.T.contiguous().T
    return functional.scaled_mm(
        left.contiguous(), columns, left_scale, by_tensor, right_scale, by_tensor, output_dtype=dtype
    )
