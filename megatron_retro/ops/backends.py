"""Which implementation serves each operator, decided once per process and explained in one table.

`MEGATRON_RETRO_KERNELS` holds the wish: `auto` (the default), `reference`, `native`, or `operator=backend` pairs such
as `rotary=native,layer_norm=apex`. It is an environment variable because every thread and child process of a run
must decide alike. `auto` takes the backend that the committed benchmark found fastest on the device; a backend that is
asked for by name and cannot serve is an error with its reasons, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from megatron_retro.errors import ConfigError, EnvironmentProblem
from megatron_retro.ops import library
from megatron_retro.ops.engines import (
    apex_problems,
    fp8_problems,
    scaled_product_problems,
    state_row,
    transformer_engine_problems,
)

VARIABLE = "MEGATRON_RETRO_KERNELS"
AUTO, REFERENCE, NATIVE = "auto", "reference", "native"
TORCH, TRANSFORMER_ENGINE, APEX = "torch", "transformer_engine", "apex"
NONE = "none"
CPU, CUDA = "cpu", "cuda"
FLOAT32 = "float32"

# Where the native kernel won against eager PyTorch and torch.compile: benchmarks/results/kernels.json.
# CUDA kernels run in CI on a host shim; until they are measured on a device, they serve only by request.
FASTEST: Mapping[str, Mapping[str, str]] = {
    "layer_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "rms_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "residual_layer_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "residual_rms_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "rotary": {CPU: NATIVE, CUDA: REFERENCE},
    "gated_activation": {CPU: NATIVE, CUDA: REFERENCE},
    "gelu": {CPU: REFERENCE, CUDA: REFERENCE},
    "gelu_tanh": {CPU: NATIVE, CUDA: REFERENCE},
    "squared_relu": {CPU: NATIVE, CUDA: REFERENCE},
    "chunked_cross_attention": {CPU: NATIVE, CUDA: REFERENCE},
    "linear_cross_entropy": {CPU: NATIVE, CUDA: REFERENCE},
    "small_batch_gemv": {CPU: NATIVE},
    "fp8_linear": {CPU: TORCH, CUDA: TORCH},
}
# Where float32 differs from that.
FASTEST_FLOAT32: Mapping[str, Mapping[str, str]] = {
    "layer_norm": {CPU: REFERENCE},
    "residual_layer_norm": {CPU: REFERENCE},
}

_NORMS = ("layer_norm", "rms_norm", "residual_layer_norm", "residual_rms_norm")


@dataclass(frozen=True)
class Choice:
    """The backend of an operator on a kind of device, and why not another."""

    operator: str
    device: str
    backend: str
    reason: str


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def uses_native(operator: str, device: str) -> bool:
    """Whether our compiled kernel serves `operator` on tensors of this device type."""
    return choice(operator, device).backend == NATIVE


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend_of(operator: str, device: str, dtype: torch.dtype | None = None) -> str:
    """The name of what serves; an error with all reasons where nothing does."""
    found = choice(operator, device, FLOAT32 if dtype == torch.float32 else "")
    if found.backend == NONE:
        raise EnvironmentProblem(
            f"nothing here serves {operator} on {device}",
            got=found.reason,
            fix=f"leave it off, or ask for the slow plain formula: {VARIABLE}={operator}={REFERENCE}",
        )
    return found.backend


def choice(operator: str, device: str, dtype: str = "") -> Choice:
    """The decision for one operator; `dtype` is float32 or empty, for any other."""
    return _decided(os.environ.get(VARIABLE, AUTO), operator, device, dtype)


def backends_of(operator: str) -> tuple[str, ...]:
    """The names that may be asked for."""
    if operator == "fp8_linear":
        return (REFERENCE, TORCH, TRANSFORMER_ENGINE)
    return (REFERENCE, NATIVE, TRANSFORMER_ENGINE, APEX) if operator in _NORMS else (REFERENCE, NATIVE)


def problems(backend: str, operator: str, device: str) -> Sequence[str]:
    """Why a backend cannot serve an operator on this type of device; empty where it can."""
    if backend == NATIVE:
        return _not_native(operator, device)
    if backend == TRANSFORMER_ENGINE:
        return transformer_engine_problems(device, fp8=operator == "fp8_linear")
    if backend == APEX:
        return apex_problems(device)
    if backend == TORCH:
        return fp8_problems() if device == CUDA else scaled_product_problems(device)
    return ()


def backend_rows(device: str = CPU) -> list[tuple[str, str]]:
    """Operator and decision, then the optional engines, for the table that is printed at start."""
    rows = []
    for operator in FASTEST:
        found = choice(operator, device)
        text = f"{found.backend}: {found.reason}"
        exact = choice(operator, device, FLOAT32)
        if exact != found:
            text += f"; in float32 {exact.backend}: {exact.reason}"
        rows.append((f"kernel {operator}", text))
    for engine, reasons in (
        (TRANSFORMER_ENGINE, transformer_engine_problems(device)),
        (APEX, apex_problems(device)),
    ):
        rows.append((f"kernels of {engine}", state_row(reasons)))
    return rows


@cache
def _decided(wish: str, operator: str, device: str, dtype: str) -> Choice:
    wanted = _parsed(wish).get(operator, AUTO)
    if wish == NATIVE and operator in library.CPU_ONLY and device == CUDA:
        wanted = AUTO  # the wish was for all operators, not for this one by name
    if wanted != AUTO:
        reasons = problems(wanted, operator, device)
        if reasons:
            raise EnvironmentProblem(
                f"the {wanted} kernel of {operator} cannot serve on {device}",
                got="; ".join(reasons),
                fix=f"set {VARIABLE}=auto, or remove the reasons",
            )
        return Choice(operator, device, wanted, f"asked for in {VARIABLE}")
    if operator == "fp8_linear":
        return _fp8(device)
    reasons = _not_native(operator, device)
    if reasons:
        return Choice(operator, device, REFERENCE, "no native kernel: " + "; ".join(reasons))
    table = FASTEST_FLOAT32 if dtype == FLOAT32 and device in FASTEST_FLOAT32.get(operator, {}) else FASTEST
    fastest = table[operator].get(device, REFERENCE)
    return Choice(operator, device, fastest, _why(fastest, device))


def _fp8(device: str) -> Choice:
    """The plain formula would hide that the hardware has no FP8, so it never serves unasked."""
    reasons = problems(TORCH, "fp8_linear", device)
    if not reasons:
        return Choice("fp8_linear", device, TORCH, "torch's scaled product; used only where FP8 is switched on")
    return Choice("fp8_linear", device, NONE, "; ".join(reasons))


def _why(fastest: str, device: str) -> str:
    if device == CPU:
        return "fastest in benchmarks/results/kernels.json"
    return "the native kernel has not been measured on a device; ask for it by name" if fastest == REFERENCE else ""


def _not_native(operator: str, device: str) -> Sequence[str]:
    problem = library.problem()
    if problem is not None:
        return (problem,)
    if device == CPU:
        return ()
    if device != CUDA:
        return (f"there are kernels for cpu and cuda, not for {device}",)
    if operator in library.CPU_ONLY:
        return (f"{operator} has a kernel for the cpu only",)
    lost = library.cuda_problem()
    return () if lost is None else (lost,)


@cache
def _parsed(wish: str) -> Mapping[str, str]:
    if wish in (AUTO, REFERENCE, NATIVE):
        return {operator: wish if wish in (AUTO, *backends_of(operator)) else AUTO for operator in FASTEST}
    wanted: dict[str, str] = {}
    for pair in wish.split(","):
        operator, _, backend = pair.partition("=")
        if operator not in FASTEST:
            raise ConfigError(
                f"{VARIABLE} cannot be read",
                got=pair,
                expected=f"auto, reference, native, or OPERATOR=BACKEND with an operator of {', '.join(FASTEST)}",
            )
        if backend not in (AUTO, *backends_of(operator)):
            expected = ", ".join((AUTO, *backends_of(operator)))
            raise ConfigError(f"{VARIABLE} names no backend of {operator}", got=pair, expected=expected)
        wanted[operator] = backend
    return wanted
