"""TransformerEngine and Apex behind our faces: why one of them cannot serve, their norms, FP8 products and Adams.

Both are found, never required. Their modules own parameters; ours are handed in with every call
(`torch.func.functional_call`), so that a cut or tied weight stays where it is.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

FP8_CAPABILITY = (8, 9)
_TRANSFORMER_ENGINE, _APEX = "transformer_engine.pytorch", "apex.normalization.fused_layer_norm"
TE_ADAM, APEX_ADAM = "te-adam", "apex-adam"
# by name of the optimizer: where its class is, then what it needs beside
_ADAMS: Mapping[str, Sequence[str]] = {
    TE_ADAM: ("transformer_engine.pytorch.optimizers",),
    APEX_ADAM: ("apex.optimizers", "amp_C"),  # Apex installs without its CUDA part, and then Adam is a shell
}


def transformer_engine_problems(device: str, *, fp8: bool = False) -> Sequence[str]:
    """Why TransformerEngine cannot serve on this type of device; empty where it can."""
    reasons = [*_module_problems(_TRANSFORMER_ENGINE), *_device_problems(device)]
    return reasons + (fp8_problems() if fp8 and not reasons else [])


def apex_problems(device: str) -> Sequence[str]:
    """Why Apex cannot serve on this type of device; empty where it can."""
    return [*_module_problems(_APEX), *_device_problems(device)]


def adam_problems(optimizer: str, device: str) -> Sequence[str]:
    """Why an engine's Adam cannot serve on this type of device; empty where it can."""
    missing = [problem for module in _ADAMS[optimizer] for problem in _module_problems(module)]
    return [*missing[:1], *_device_problems(device)]


def fused_adam(optimizer: str) -> Any:
    """The class of an engine's Adam, where there are no problems."""
    return importlib.import_module(_ADAMS[optimizer][0]).FusedAdam


def state_row(reasons: Sequence[str]) -> str:
    """What a table says of something optional."""
    return "cannot serve: " + "; ".join(reasons) if reasons else "at hand, serves where it is asked for by name"


def scaled_product_problems(device: str) -> list[str]:
    """Why this torch multiplies nothing in FP8 on a type of device; 2.11 does not on a CPU."""
    served = device == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")
    return [] if served else [f"torch {torch.__version__} has no scaled product for {device}"]


def fp8_problems() -> list[str]:
    """Why this GPU has no FP8 products."""
    if not torch.cuda.is_available():
        return ["no CUDA device on this machine"]
    capability = torch.cuda.get_device_capability()
    if capability >= FP8_CAPABILITY:
        return []
    have, need = (".".join(map(str, each)) for each in (capability, FP8_CAPABILITY))
    return [f"FP8 needs compute capability {need}, this GPU has {have}"]


@cache
def _module_problems(name: str) -> list[str]:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return [f"{package} is not installed"]
    try:
        importlib.import_module(name)
    except Exception as error:  # a build for another CUDA or torch fails in ways of its own
        return [f"{package} does not load: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    return []


def _device_problems(device: str) -> list[str]:
    if device != "cuda":
        return [f"it serves on cuda, not on {device}"]
    return [] if torch.cuda.is_available() else ["no CUDA device on this machine"]


def transformer_engine_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, weight_plus_one: bool
) -> Tensor:
    """Its LayerNorm or RMSNorm with our weights."""
    module = _norm_module(weight.shape[0], epsilon, centered, weight_plus_one)
    parameters = {"weight": weight}
    if centered:
        parameters["bias"] = torch.zeros_like(weight) if bias is None else bias
    normed: Tensor = functional_call(module, parameters, (hidden,))
    return normed


@cache
def _norm_module(width: int, epsilon: float, centered: bool, weight_plus_one: bool) -> nn.Module:
    engine: Any = importlib.import_module(_TRANSFORMER_ENGINE)
    build = engine.LayerNorm if centered else engine.RMSNorm
    module: nn.Module = build(width, eps=epsilon, zero_centered_gamma=weight_plus_one)
    return module


def apex_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, weight_plus_one: bool
) -> Tensor:
    """Its fused LayerNorm or RMSNorm."""
    engine: Any = importlib.import_module(_APEX)
    scale = weight + 1 if weight_plus_one else weight
    shape = hidden.shape[-1:]
    normed: Tensor
    if centered:
        shift = torch.zeros_like(scale) if bias is None else bias
        normed = engine.fused_layer_norm_affine(hidden, scale, shift, shape, epsilon)
    else:
        normed = engine.fused_rms_norm_affine(hidden, scale, shape, epsilon)
    return normed


def transformer_engine_linear(hidden_TX: Tensor, weight_YX: Tensor) -> Tensor:
    """[T, Y] by its FP8 linear layer, every tensor scaled by its own largest value (no history is kept)."""
    engine: Any = importlib.import_module(_TRANSFORMER_ENGINE)
    recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    module = _linear_module(weight_YX.shape[1], weight_YX.shape[0], hidden_TX.dtype)
    with engine.fp8_autocast(enabled=True, fp8_recipe=recipe.Float8CurrentScaling()):
        product: Tensor = functional_call(module, {"weight": weight_YX}, (hidden_TX,))
    return product


@cache
def _linear_module(columns: int, rows: int, dtype: torch.dtype) -> nn.Module:
    engine: Any = importlib.import_module(_TRANSFORMER_ENGINE)
    module: nn.Module = engine.Linear(columns, rows, bias=False, params_dtype=dtype)
    return module
