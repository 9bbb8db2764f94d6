"""Which implementation serves each operator, decided once per process and explained in one table.

`MEGATRON_RETRO_KERNELS` holds the wish: `auto` (the default), `reference`, `native`, or `operator=backend` pairs such
as `rotary=native,layer_norm=apex`. It is an environment variable because every thread and child process of a run
must decide alike. `auto` takes on the CPU what the committed benchmark found fastest, and on a GPU what `verdicts`
found right and fastest there; a backend that is asked for by name and cannot serve is an error with its reasons, never
a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from megatron_retro.errors import ConfigError, EnvironmentProblem
from megatron_retro.ops import library, verdicts
from megatron_retro.ops.backend_names import (
    APEX,
    AUTO,
    COMPILED,
    CPU,
    CUDA,
    FLOAT32,
    FLOAT64,
    HALF,
    NATIVE,
    NONE,
    REFERENCE,
    TORCH,
    TRANSFORMER_ENGINE,
)
from megatron_retro.ops.compilation import compiler_problems
from megatron_retro.ops.engines import (
    apex_problems,
    fp8_problems,
    scaled_product_problems,
    state_row,
    transformer_engine_problems,
)

Formula = TypeVar("Formula", bound=Callable[..., Any])

VARIABLE = "MEGATRON_RETRO_KERNELS"

# What won on the CPU against eager PyTorch and torch.compile: benchmarks/results/kernels.json.
FASTEST: Mapping[str, str] = {
    "layer_norm": NATIVE,
    "rms_norm": NATIVE,
    "residual_layer_norm": NATIVE,
    "residual_rms_norm": NATIVE,
    "rotary": NATIVE,
    "gated_activation": NATIVE,
    "gelu": REFERENCE,
    "gelu_tanh": NATIVE,
    "squared_relu": NATIVE,
    "chunked_cross_attention": NATIVE,
    "linear_cross_entropy": NATIVE,
    "small_batch_gemv": NATIVE,
    "fp8_linear": TORCH,
}
# Where float32 differs from that.
FASTEST_FLOAT32: Mapping[str, str] = {"layer_norm": REFERENCE, "residual_layer_norm": REFERENCE}

_NORMS = ("layer_norm", "rms_norm", "residual_layer_norm", "residual_rms_norm")
_PRECISIONS: Mapping[torch.dtype | None, str] = {torch.float32: FLOAT32, torch.float64: FLOAT64}
_POINTWISE = ("rotary", "gated_activation", "gelu", "gelu_tanh", "squared_relu")


@dataclass(frozen=True)
class Choice:
    """The backend of an operator on a kind of device, and why not another."""

    operator: str
    device: str
    backend: str
    reason: str


def constant_when_compiled(function: Formula) -> Formula:
    """As torch.compiler.assume_constant_result, which imports the compiler: a second and more of every start."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_when_compiled
def uses_native(operator: str, device: str, dtype: torch.dtype | None = None) -> bool:
    """Whether our compiled kernel serves `operator` on tensors of this type of device."""
    return choice(operator, device, _PRECISIONS.get(dtype, HALF)).backend == NATIVE


@constant_when_compiled
def backend_of(operator: str, device: str, dtype: torch.dtype | None = None) -> str:
    """The name of what serves; an error with all reasons where nothing does."""
    found = choice(operator, device, _PRECISIONS.get(dtype, HALF))
    if found.backend == NONE:
        raise EnvironmentProblem(
            f"nothing here serves {operator} on {device}",
            got=found.reason,
            fix=f"leave it off, or ask for the slow plain formula: {VARIABLE}={operator}={REFERENCE}",
        )
    return found.backend


def choice(operator: str, device: str, precision: str = HALF) -> Choice:
    """The decision for one operator at one precision: float32, float64 or half."""
    timed = not torch.are_deterministic_algorithms_enabled()
    return _decided(os.environ.get(VARIABLE, AUTO), operator, device, precision, timed)


def formula_of(backend: str, formula: Formula) -> Formula:
    """A formula as it stands, or compiled where that serves; inside another compilation or a trace it stands."""
    if backend != COMPILED or torch.compiler.is_compiling() or _traces():
        return formula
    compiled: Formula = _compiled(formula)
    return compiled


def backends_of(operator: str) -> tuple[str, ...]:
    """The names that may be asked for."""
    if operator == "fp8_linear":
        return (REFERENCE, TORCH, TRANSFORMER_ENGINE)
    if operator in _NORMS:
        return (REFERENCE, NATIVE, COMPILED, TRANSFORMER_ENGINE, APEX)
    return (REFERENCE, NATIVE, COMPILED) if operator in _POINTWISE else (REFERENCE, NATIVE)


def problems(backend: str, operator: str, device: str) -> Sequence[str]:
    """Why a backend cannot serve an operator on this type of device; empty where it can."""
    if backend == NATIVE:
        return _not_native(operator, device)
    if backend == TRANSFORMER_ENGINE:
        return transformer_engine_problems(device, fp8=operator == "fp8_linear")
    if backend == APEX:
        return apex_problems(device)
    if backend == COMPILED:
        return compiler_problems(device)
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
    if device == CUDA and library.cuda_problem() is None:
        rows.append(("kernels were proven", str(verdicts.verdict_path(verdicts.machine_of(device)))))
    for engine, reasons in (
        (TRANSFORMER_ENGINE, transformer_engine_problems(device)),
        (APEX, apex_problems(device)),
    ):
        rows.append((f"kernels of {engine}", state_row(reasons)))
    return rows


@cache
def _decided(wish: str, operator: str, device: str, precision: str, timed: bool) -> Choice:
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
    if device != CPU:
        return _proven(operator, device, precision, timed)
    table = FASTEST_FLOAT32 if precision == FLOAT32 and operator in FASTEST_FLOAT32 else FASTEST
    return Choice(operator, device, table[operator], "fastest in benchmarks/results/kernels.json")


def _proven(operator: str, device: str, precision: str, timed: bool) -> Choice:
    """What the verdict on this GPU says. A timing may not decide bits that must be the same again."""
    if not timed:
        return Choice(operator, device, REFERENCE, "deterministic algorithms are asked for; no timing decides")
    if precision == FLOAT64:
        return Choice(operator, device, REFERENCE, "nothing is proven in float64")
    finding = verdicts.verdict_of(device).findings[operator][precision]
    return Choice(operator, device, finding.serves, finding.reason)


def _fp8(device: str) -> Choice:
    """The plain formula would hide that the hardware has no FP8, so it never serves unasked."""
    reasons = problems(TORCH, "fp8_linear", device)
    if not reasons:
        return Choice("fp8_linear", device, TORCH, "torch's scaled product; used only where FP8 is switched on")
    return Choice("fp8_linear", device, NONE, "; ".join(reasons))


def _traces() -> bool:
    """Whether tensors made now have no memory."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@cache
def _compiled(formula: Callable[..., Any]) -> Any:
    return torch.compile(formula)


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
