"""The MLP's nonlinearity."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

GELU, GELU_TANH, SQUARED_RELU, SWIGLU = "gelu", "gelu_tanh", "squared_relu", "swiglu"


def activate(projected: Tensor, kind: str) -> Tensor:
    """[..., F] -> [..., F]; under `swiglu` [..., 2, F] (gate, then up) -> [..., F]."""
    if kind == SWIGLU:
        gate, up = projected.unbind(-2)
        return functional.silu(gate) * up
    if kind == SQUARED_RELU:
        return functional.relu(projected).square()
    return functional.gelu(projected, approximate="tanh" if kind == GELU_TANH else "none")
