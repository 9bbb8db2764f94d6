"""How far a kernel is from the exact value, next to how far the plain formula at the same precision is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Formula = Callable[..., "Tensor | tuple[Tensor, ...]"]


def values_and_gradients(formula: Formula, inputs: Sequence[Tensor | None], seed: int = 1) -> list[Tensor]:
    """Outputs, then gradients of the inputs that need one, for fixed random gradients of the outputs."""
    leaves = [each for each in inputs if each is not None and each.requires_grad]
    outputs = formula(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    directions = [_direction(each, generator) for each in outputs]
    gradients = torch.autograd.grad(outputs, leaves, directions) if leaves else ()
    return [*(each.detach() for each in outputs), *gradients]


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values exactly, in float64; whole numbers and masks stay."""
    return [
        each.detach().double().requires_grad_(each.requires_grad)
        if each is not None and each.is_floating_point()
        else each
        for each in inputs
    ]


@dataclass(frozen=True)
class Comparison:
    """The largest error of an output or gradient, what is allowed, and one rounding of the largest value."""

    error: float
    allowed: float
    rounding: float

    @property
    def excess(self) -> float:
        """Error beyond what is allowed, in roundings; positive means worse than allowed."""
        return (self.error - self.allowed) / self.rounding


def comparisons(ours: Formula, plain: Formula, inputs: Sequence[Tensor | None]) -> list[Comparison]:
    """Per output and gradient that is not empty, our error beside twice the plain formula's at the same precision.

    Errors are against the plain formula in float64; one rounding of the largest value is always allowed, as the plain
    formula may be exact by luck.
    """
    exact = values_and_gradients(plain, in_float64(inputs))
    got, usual = values_and_gradients(ours, inputs), values_and_gradients(plain, inputs)
    found = []
    for ours_each, usual_each, exact_each in zip(got, usual, exact, strict=True):
        if exact_each.numel() == 0:
            continue
        finite = bool(torch.isfinite(ours_each).all())
        rounding = torch.finfo(ours_each.dtype).eps * float(exact_each.abs().max()) + 1e-30
        error = float((ours_each.double() - exact_each).abs().max()) if finite else math.inf
        allowed = 2 * float((usual_each.double() - exact_each).abs().max()) + rounding
        found.append(Comparison(error, allowed, rounding))
    return found


def _direction(output: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return values.to(torch.bfloat16).to(output.device, output.dtype)
