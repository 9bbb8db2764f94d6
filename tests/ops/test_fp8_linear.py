"""Products in eight bits: torch's scaled product against the same rounding written out, errors where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.ops.backends import REFERENCE, TORCH, VARIABLE, problems
from megatron_retro.ops.linear import _rounded, fp8_linear
from megatron_retro.ops.precision import values_and_gradients

needs_torchs = pytest.mark.skipif(
    bool(problems(TORCH, "fp8_linear", "cpu")), reason="; ".join(problems(TORCH, "fp8_linear", "cpu"))
)


def case(dtype: torch.dtype, rows: tuple[int, ...] = (2, 9)) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((*rows, 64), (48, 64), (48,))
    hidden, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return hidden, weight, bias


@needs_torchs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(2, 9), (32,), (1, 1, 1), (0,)])
def test_torch_equals_the_written_out_formula(
    dtype: torch.dtype, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of rows; sums in another order are all that may differ."""
    results = {}
    for backend in (TORCH, REFERENCE):
        monkeypatch.setenv(VARIABLE, f"fp8_linear={backend}")
        results[backend] = values_and_gradients(fp8_linear, case(dtype, rows))
    for got, expected in zip(results[TORCH], results[REFERENCE], strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        allowed = 4 * torch.finfo(dtype).eps * float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("backend", [pytest.param(TORCH, marks=needs_torchs), REFERENCE])
def test_the_error_is_that_of_eight_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """e4m3 has 3 bits after the point, e5m2 has 2: the mean error of a product of 64 random terms follows."""
    monkeypatch.setenv(VARIABLE, f"fp8_linear={backend}")
    inputs = case(torch.float32, (128,))
    got, exact = values_and_gradients(fp8_linear, inputs), values_and_gradients(functional.linear, inputs)
    shares = [float((left - right).norm() / right.norm()) for left, right in zip(got, exact, strict=True)]
    output, hidden_gradient, weight_gradient, bias_gradient = shares
    assert 0.005 < output < 0.05
    assert 0.01 < hidden_gradient < 0.08 and 0.01 < weight_gradient < 0.08
    assert bias_gradient < 1e-6


@needs_torchs
def test_scales_follow_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor a million times larger or smaller loses nothing, zeros give zeros."""
    monkeypatch.setenv(VARIABLE, f"fp8_linear={TORCH}")
    hidden, weight, _ = case(torch.float32, (16,))
    expected = fp8_linear(hidden, weight)
    for factor in (2.0**20, 2.0**-20):
        torch.testing.assert_close(fp8_linear(hidden * factor, weight), expected * factor, rtol=1e-5, atol=0)
    assert not fp8_linear(torch.zeros(16, 64), weight.detach()).any()


@needs_torchs
def test_sizes_that_are_no_tiles_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """27 columns and 41 rows, as 2728 is under tensor 8: the numbers of the formula, which needs no tiles."""
    results = {}
    for backend in (TORCH, REFERENCE):
        monkeypatch.setenv(VARIABLE, f"fp8_linear={backend}")
        torch.manual_seed(0)
        inputs = [torch.randn(shape).requires_grad_() for shape in ((2, 9, 27), (41, 27), (41,))]
        results[backend] = values_and_gradients(fp8_linear, inputs)
    torch.testing.assert_close(results[TORCH], results[REFERENCE], rtol=1e-5, atol=1e-5)


def test_rounding_reads_a_tensor_three_times() -> None:
    large: list[str] = []

    class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            if not function.is_view and any(isinstance(each, Tensor) and each.numel() > 1 for each in arguments):
                large.append(str(function))
            return function(*arguments, **(keywords or {}))

    with Reads():
        _rounded(torch.ones(64, 64, dtype=torch.bfloat16), torch.float8_e4m3fn)
    assert len(large) == 3, large
