"""The MLP's nonlinearity."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backend_names import NATIVE
from megatron_retro.ops.backends import backend_of, formula_of
from megatron_retro.ops.recomputation import recomputed

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
        gate, up = projected.unbind(-2)
        open_gate = functional.silu if kind == SWIGLU else partial(functional.gelu, approximate=_approximation(kind))
        opened = open_gate(gate)
        with recomputed(opened, lambda: open_gate(gate.detach())):
            return opened * up
    if kind == SQUARED_RELU:
        return functional.relu(projected).square()
    return functional.gelu(projected, approximate=_approximation(kind))


def _approximation(kind: str) -> str:
    """Which form of GELU."""
    return "tanh" if kind in (GELU_TANH, GEGLU_TANH) else "none"
