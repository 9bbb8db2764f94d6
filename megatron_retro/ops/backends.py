"""Which implementation serves each operator, decided once per process and explained in one table.

`MEGATRON_RETRO_KERNELS` holds the wish: `auto` (the default), `reference`, `native`, or `operator=backend` pairs such
as `rotary=native,layer_norm=reference`. It is an environment variable because every thread and child process of a run
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

VARIABLE = "MEGATRON_RETRO_KERNELS"
AUTO, REFERENCE, NATIVE = "auto", "reference", "native"
CPU, CUDA = "cpu", "cuda"

# Where the native kernel won against eager PyTorch and torch.compile: benchmarks/results/kernels.json.
# CUDA kernels run in CI on a host shim; until they are measured on a device, they serve only by request.
FASTEST: Mapping[str, Mapping[str, str]] = {
    "layer_norm": {CPU: REFERENCE, CUDA: REFERENCE},
    "rms_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "residual_norm": {CPU: NATIVE, CUDA: REFERENCE},
    "rotary": {CPU: NATIVE, CUDA: REFERENCE},
    "activation": {CPU: NATIVE, CUDA: REFERENCE},
    "masked_softmax": {CPU: NATIVE, CUDA: REFERENCE},
    "chunked_cross_attention": {CPU: NATIVE, CUDA: REFERENCE},
    "linear_cross_entropy": {CPU: NATIVE, CUDA: REFERENCE},
}


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


def choice(operator: str, device: str) -> Choice:
    """The decision for one operator."""
    return _decided(os.environ.get(VARIABLE, AUTO), operator, device)


def backend_rows(device: str = CPU) -> list[tuple[str, str]]:
    """Operator and decision, for the table that is printed at start."""
    choices = [choice(operator, device) for operator in FASTEST]
    return [(f"kernel {each.operator}", f"{each.backend}: {each.reason}") for each in choices]


@cache
def _decided(wish: str, operator: str, device: str) -> Choice:
    wanted = _parsed(wish).get(operator, AUTO)
    reasons = _not_native(device)
    if wanted == NATIVE and reasons:
        raise EnvironmentProblem(
            f"the native kernel of {operator} cannot serve on {device}",
            got="; ".join(reasons),
            fix=f"set {VARIABLE}=auto, or remove the reasons",
        )
    if wanted != AUTO:
        return Choice(operator, device, wanted, f"asked for in {VARIABLE}")
    if reasons:
        return Choice(operator, device, REFERENCE, "no native kernel: " + "; ".join(reasons))
    fastest = FASTEST[operator].get(device, REFERENCE)
    return Choice(operator, device, fastest, _why(fastest, device))


def _why(fastest: str, device: str) -> str:
    if device == CPU:
        return "fastest in benchmarks/results/kernels.json"
    return "the native kernel has not been measured on a device; ask for it by name" if fastest == REFERENCE else ""


def _not_native(device: str) -> Sequence[str]:
    problem = library.problem()
    if problem is not None:
        return (problem,)
    if device == CPU:
        return ()
    if device != CUDA:
        return (f"there are kernels for cpu and cuda, not for {device}",)
    return () if library.has_cuda_kernels() else ("csrc was compiled without nvcc",)


@cache
def _parsed(wish: str) -> Mapping[str, str]:
    if wish in (AUTO, REFERENCE, NATIVE):
        return dict.fromkeys(FASTEST, wish)
    wanted: dict[str, str] = {}
    for pair in wish.split(","):
        operator, _, backend = pair.partition("=")
        if operator not in FASTEST or backend not in (AUTO, REFERENCE, NATIVE):
            raise ConfigError(
                f"{VARIABLE} cannot be read",
                got=pair,
                expected=f"auto, reference, native, or OPERATOR=BACKEND with an operator of {', '.join(FASTEST)}",
            )
        wanted[operator] = backend
    return wanted
