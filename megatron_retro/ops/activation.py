"""The MLP's nonlinearity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_retro.ops.backend_names import NATIVE
from megatron_retro.ops.backends import backend_of, formula_of

GELU, GELU_TANH, SQUARED_RELU = "gelu", "gelu_tanh", "squared_relu"
SWIGLU, GEGLU, GEGLU_TANH = "swiglu", "geglu", "geglu_tanh"
GATED = (SWIGLU, GEGLU, GEGLU_TANH)
_CODES = {SWIGLU: 0, GELU: 1, GEGLU: 1, GELU_TANH: 2, GEGLU_TANH: 2, SQUARED_RELU: 3}


def activate(projected: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """[..., F] -> [..., F]; gated kinds [..., 2, F] (gate, then up) -> [..., F]. `bias` is added in front."""
    gated = kind in GATED
    backend = backend_of("gated_activation" if gated else kind, projected.device.type, projected.dtype)
    if backend == NATIVE:
        rows = projected.flatten(-2) if gated else projected
        activated: Tensor = torch.ops.megatron_retro.gated_activation(
            rows.contiguous(), None if bias is None else bias.flatten(), _CODES[kind], gated
        )
        return activated
    return formula_of(backend, _reference)(projected, kind, bias)


def _reference(projected: Tensor, kind: str, bias: Tensor | None) -> Tensor:
    projected = projected if bias is None else projected + bias
    if kind in GATED:
        if torch.compiler.is_compiling() or not (projected.requires_grad and torch.is_grad_enabled()):
            return _gated(projected, kind)
        activated: Tensor = _Gated.apply(projected, kind)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return activated
    if kind == SQUARED_RELU:
        return functional.relu(projected).square()
    return functional.gelu(projected, approximate=_approximation(kind))


def _gated(projected: Tensor, kind: str) -> Tensor:
    gate, up = projected.unbind(-2)
    return _opened(gate, kind) * up


def _opened(gate: Tensor, kind: str) -> Tensor:
    return functional.silu(gate) if kind == SWIGLU else functional.gelu(gate, approximate=_approximation(kind))


class _Gated(torch.autograd.Function):
    """The same. Autograd would keep the open gate, and join the gradients of both halves in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(projected)
        ctx.kind = kind
        return _gated(projected, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        both = torch.empty_like(projected)
        (gate, up), (of_gate, of_up) = projected.unbind(-2), both.unbind(-2)
        torch.mul(gradient, _opened(gate, ctx.kind), out=of_up)
        of_opened = gradient * up
        if ctx.kind == SWIGLU:
            torch.ops.aten.silu_backward(of_opened, gate, grad_input=of_gate)
        else:
            form = _approximation(ctx.kind)
            torch.ops.aten.gelu_backward(of_opened, gate, approximate=form, grad_input=of_gate)
        return both, None


def _approximation(kind: str) -> str:
    """Which form of GELU."""
    return "tanh" if kind in (GELU_TANH, GEGLU_TANH) else "none"
