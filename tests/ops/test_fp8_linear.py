"""Products in eight bits: torch's scaled product against the same rounding written out, errors where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.errors import ConfigError
from megatron_retro.ops.backends import REFERENCE, TORCH, VARIABLE, problems
from megatron_retro.ops.linear import fp8_linear
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


def test_a_matrix_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="47 x 64"):
        fp8_linear(torch.ones(2, 64), torch.ones(47, 64))
