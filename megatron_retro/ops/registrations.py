"""Shapes without data (fake) and gradients (autograd) of the compiled operators, registered once after loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor


def _returns_nothing(*_arguments: object) -> None:
    return None


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ---- gated_activation -----------------------------------------------------------------------------


def _activation_fake(projected: Tensor, bias: Tensor | None, kind: int, gated: bool) -> Tensor:
    width = projected.shape[-1] // 2 if gated else projected.shape[-1]
    return projected.new_empty((*projected.shape[:-1], width))


def _activation_backward_fake(
    grad_output: Tensor, projected: Tensor, bias: Tensor | None, kind: int, gated: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(projected), projected.new_empty(projected.shape[-1])


def _activation_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    projected, bias, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(projected, bias)


def _activation_gradient(ops: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    projected, bias = ctx.saved_tensors
    grad_projected, grad_bias = ops.gated_activation_backward(
        grad_output.contiguous(), projected, bias, ctx.kind, ctx.gated
    )
    return grad_projected, None if bias is None else grad_bias.view_as(bias), None, None


# ---- residual_norm --------------------------------------------------------------------------------


def _norm_fake(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, ...]:
    rows = hidden.shape[:-1].numel()
    statistics = hidden.new_empty(rows, dtype=_compute_dtype(hidden))
    summed = hidden.new_empty(0) if residual is None else torch.empty_like(hidden)
    return torch.empty_like(hidden), summed, statistics, torch.empty_like(statistics)


def _norm_backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = torch.empty_like(weight if bias is None else bias)
    return torch.empty_like(hidden), torch.empty_like(weight), grad_bias


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, residual, weight, bias, _, ctx.centered, ctx.weight_offset = inputs
    _, summed, mean, inverse_deviation = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, inverse_deviation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed if ctx.has_residual else hidden, weight, bias, mean, inverse_deviation)


def _norm_gradient(
    ops: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: object
) -> tuple[Any, ...]:
    summed, weight, bias, mean, inverse_deviation = ctx.saved_tensors
    if grad_output is None:
        return grad_sum, grad_sum, None, None, None, None, None
    grad_hidden, grad_weight, grad_bias = ops.residual_norm_backward(
        grad_output.contiguous(),
        grad_sum.contiguous() if grad_sum is not None and ctx.has_residual else None,
        summed,
        mean,
        inverse_deviation,
        weight,
        bias,
        ctx.centered,
        ctx.weight_offset,
    )
    grad_residual = grad_hidden if ctx.has_residual else None
    return grad_hidden, grad_residual, grad_weight, None if bias is None else grad_bias, None, None, None


# ---- rotary ---------------------------------------------------------------------------------------


def _rotary_fake(heads: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return heads.new_empty(heads.shape)


def _rotary_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cosine, sine)


def _rotary_gradient(ops: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    cosine, sine = ctx.saved_tensors
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    grad_heads = ops.rotary(grad_output, cosine, sine, ctx.interleaved, not ctx.inverse)
    return grad_heads, None, None, None, None


# ---- chunked_cross_attention ----------------------------------------------------------------------


def _cross_attention_fake(query_BSND: Tensor, *_arguments: object) -> tuple[Tensor, Tensor]:
    batch, positions, heads, _ = query_BSND.shape
    statistics = query_BSND.new_empty((batch, heads, positions), dtype=_compute_dtype(query_BSND))
    return query_BSND.new_empty(query_BSND.shape), statistics


def _cross_attention_backward_fake(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _cross_attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, *ctx.numbers, ctx.interleaved = inputs
    ctx.numbers, tables = ctx.numbers[:3], ctx.numbers[3:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, mask, *output, *tables)


def _cross_attention_gradient(ops: Any, ctx: Any, grad_output: Tensor, _: object) -> tuple[Any, ...]:
    query, key, value, mask, output, log_normalizer, *tables = ctx.saved_tensors
    grads = ops.chunked_cross_attention_backward(
        grad_output.contiguous(),
        query,
        key,
        value,
        mask,
        output,
        log_normalizer,
        *ctx.numbers,
        *tables,
        ctx.interleaved,
    )
    return (*grads, *(None,) * 9)


# ---- small_batch_gemv -----------------------------------------------------------------------------


def _gemv_fake(rows_TX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None) -> Tensor:
    return rows_TX.new_empty(rows_TX.shape[0], weight_YX.shape[0])


def _gemv_gradient(ops: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("small_batch_gemv has no gradient: it is for generation, training takes functional.linear")


# ---- registration ---------------------------------------------------------------------------------

FAKES: Mapping[str, Callable[..., Any]] = {
    "gated_activation": _activation_fake,
    "gated_activation_backward": _activation_backward_fake,
    "residual_norm": _norm_fake,
    "residual_norm_backward": _norm_backward_fake,
    "rotary": _rotary_fake,
    "rotary_": _returns_nothing,
    "vocabulary_statistics": _returns_nothing,
    "vocabulary_gradient_": _returns_nothing,
    "chunked_cross_attention": _cross_attention_fake,
    "chunked_cross_attention_backward": _cross_attention_backward_fake,
    "small_batch_gemv": _gemv_fake,
}
_GRADIENTS: Mapping[str, tuple[Callable[..., None] | None, Callable[..., Any]]] = {
    "gated_activation": (_activation_context, _activation_gradient),
    "residual_norm": (_norm_context, _norm_gradient),
    "rotary": (_rotary_context, _rotary_gradient),
    "chunked_cross_attention": (_cross_attention_context, _cross_attention_gradient),
    "small_batch_gemv": (None, _gemv_gradient),
}


def register(namespace: str = "megatron_retro") -> None:
    """Every operator's fake, then every gradient. Tests load the CUDA sources, built for the host, as a second name."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    for name, (context, gradient) in _GRADIENTS.items():
        backward = partial(gradient, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=context)
