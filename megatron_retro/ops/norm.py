"""Normalization over the last dimension: LayerNorm, LayerNorm with its weight stored as 1 + w, RMSNorm.

`residual_norm` adds the residual in front and gives both the normed and the summed hidden state, in one pass;
`norm_of_sum` gives what it gave once more, from a sum that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backend_names import APEX, COMPILED, NATIVE, REFERENCE, TRANSFORMER_ENGINE
from megatron_retro.ops.backends import backend_of, formula_of
from megatron_retro.ops.engines import apex_norm, transformer_engine_norm

_RESIDUAL = {True: "residual_layer_norm", False: "residual_rms_norm"}

# hidden, weight, bias, epsilon, centered, weight_plus_one
_Form = Callable[[Tensor, Tensor, "Tensor | None", float, bool, bool], Tensor]


def layer_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, epsilon: float, weight_plus_one: bool = False
) -> Tensor:
    """LayerNorm."""
    return _form("layer_norm", hidden)(hidden, weight, bias, epsilon, True, weight_plus_one)


def rms_norm(hidden: Tensor, weight: Tensor, *, epsilon: float, weight_plus_one: bool = False) -> Tensor:
    """RMSNorm."""
    return _form("rms_norm", hidden)(hidden, weight, None, epsilon, False, weight_plus_one)


def residual_norm(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    epsilon: float,
    centered: bool,
    weight_plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm (LayerNorm when centered, RMSNorm otherwise) of hidden + residual, and that sum."""
    form = _form(_RESIDUAL[centered], hidden)
    if form is _native:
        return _native_operator(hidden, residual, weight, bias, epsilon, centered, weight_plus_one)
    summed = hidden + residual
    return form(summed, weight, bias, epsilon, centered, weight_plus_one), summed


def norm_of_sum(
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    epsilon: float,
    centered: bool,
    weight_plus_one: bool = False,
) -> Tensor:
    """The first result of `residual_norm`, bit for bit, from the second."""
    return _form(_RESIDUAL[centered], summed)(summed, weight, bias, epsilon, centered, weight_plus_one)


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, weight_plus_one: bool
) -> Tensor:
    scale = weight + 1 if weight_plus_one else weight
    if centered:
        return functional.layer_norm(hidden, hidden.shape[-1:], scale, bias, epsilon)
    return functional.rms_norm(hidden, hidden.shape[-1:], scale, epsilon)


def _compiled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, weight_plus_one: bool
) -> Tensor:
    return formula_of(COMPILED, _reference)(hidden, weight, bias, epsilon, centered, weight_plus_one)


def _native(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, weight_plus_one: bool
) -> Tensor:
    return _native_operator(hidden, None, weight, bias, epsilon, centered, weight_plus_one)[0]


def _native_operator(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centered: bool,
    weight_plus_one: bool,
) -> tuple[Tensor, Tensor]:
    normed, summed, _, _ = torch.ops.megatron_retro.residual_norm(
        hidden.contiguous(),
        None if residual is None else residual.contiguous(),
        weight,
        bias,
        epsilon,
        centered,
        1.0 if weight_plus_one else 0.0,
    )
    return normed, summed


_FORMS: Mapping[str, _Form] = {
    REFERENCE: _reference,
    NATIVE: _native,
    COMPILED: _compiled,
    TRANSFORMER_ENGINE: transformer_engine_norm,
    APEX: apex_norm,
}


def _form(operator: str, hidden: Tensor) -> _Form:
    return _FORMS[backend_of(operator, hidden.device.type, hidden.dtype)]
