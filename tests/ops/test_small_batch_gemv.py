"""The small-batch GEMV: as exact as PyTorch's, for every shape and layout, in inference mode and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.config.model import ModelConfig
from megatron_retro.model.leaves import HeadsToHidden, Linear, Output
from megatron_retro.ops import library
from megatron_retro.ops.backends import VARIABLE, backend_rows, choice
from megatron_retro.ops.linear import MAX_GEMV_ROWS, linear
from megatron_retro.testing.cuda_shim import excess_over_twice

COMPILED = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
# outputs, inputs: one lane, no whole vector, a block and a bit, several groups and a rest
SIDES = ((1, 1), (3, 7), (16, 64), (17, 257), (70, 1003), (33, 2048))


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    torch.manual_seed(0)
    yield


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.megatron_retro.small_batch_gemv(rows, weight, bias)
    return result


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype: torch.dtype, num_rows: int) -> None:
    for outputs, inputs in SIDES:
        rows, weight = torch.randn(num_rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        for bias in (None, torch.randn(outputs).to(dtype)):
            assert max(excess_over_twice(product, functional.linear, (rows, weight, bias))) <= 0.0


@COMPILED
def test_float64_is_computed_in_float64() -> None:
    for num_rows in (1, 3):
        rows, weight = torch.randn(num_rows, 300).double(), torch.randn(20, 300).double()
        torch.testing.assert_close(product(rows, weight, None), functional.linear(rows, weight), rtol=0, atol=1e-12)


@COMPILED
@pytest.mark.parametrize(("num_rows", "outputs", "inputs"), [(0, 5, 8), (3, 0, 8), (1, 4, 0), (3, 4, 0), (0, 0, 0)])
def test_empty_sides(num_rows: int, outputs: int, inputs: int) -> None:
    bias = torch.randn(outputs)
    got = product(torch.randn(num_rows, inputs), torch.randn(outputs, inputs), bias)
    assert torch.equal(got, bias.expand(num_rows, outputs))


@COMPILED
def test_what_is_not_finite_reaches_its_output_alone() -> None:
    weight, rows = torch.randn(40, 90), torch.randn(5, 90)
    weight[7, 89], weight[30, 0] = float("nan"), float("inf")
    for part in (rows, rows[:1]):
        finite = product(part, weight, None).isfinite()
        assert not finite[:, [7, 30]].any() and finite.sum() == 38 * len(part)


@COMPILED
def test_a_row_among_others_does_not_depend_on_their_number() -> None:
    weight, rows = torch.randn(37, 700), torch.randn(19, 700)
    results = [product(rows[:count].contiguous(), weight, None)[:2] for count in range(2, 20)]
    assert all(torch.equal(each, results[0]) for each in results)


@COMPILED
def test_threads_change_no_bit() -> None:
    weight, rows = torch.randn(3000, 100), torch.randn(8, 100)
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append([product(part, weight, None) for part in (rows, rows[:1].contiguous())])
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def calls(monkeypatch: pytest.MonkeyPatch, wish: str | None = None) -> list[int]:
    """Rows of every call of the kernel from here on."""
    if wish is not None:
        monkeypatch.setenv(VARIABLE, wish)
    seen: list[int] = []

    class Counted:
        @staticmethod
        def small_batch_gemv(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.append(len(rows))
            return functional.linear(rows, weight, bias)

    monkeypatch.setattr(torch.ops, "megatron_retro", Counted())
    return seen


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_face_serves_any_layout(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)  # values up to 20
    wide = torch.randn(2, 3, 80).to(dtype)
    for hidden in (wide[..., :40], wide[..., ::2], wide[0, 0, :40], wide[:0, :, :40]):
        with torch.inference_mode():
            got, by_columns = linear(hidden, weight, bias), linear(hidden, weight.T.contiguous().T, bias)
        expected = functional.linear(hidden, weight, bias)
        assert got.shape == expected.shape == by_columns.shape
        for each in (got, by_columns):
            torch.testing.assert_close(each, expected, rtol=0, atol=64 * torch.finfo(dtype).eps)


@COMPILED
def test_it_serves_small_batches_in_inference_mode_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 16)
    seen = calls(monkeypatch)
    most = MAX_GEMV_ROWS[torch.float32]
    with torch.no_grad():
        linear(torch.randn(1, 16), weight)
    linear(torch.randn(1, 16, requires_grad=True), weight)
    with torch.inference_mode():
        linear(torch.randn(most + 1, 16), weight)
        linear(torch.randn(1, 16).double(), weight.double())
        assert seen == []
        linear(torch.randn(1, most, 16), weight)
        linear(torch.randn(2, 16).bfloat16(), weight.bfloat16())
        assert seen == [most, 2]
        monkeypatch.setenv(VARIABLE, "small_batch_gemv=reference")
        linear(torch.randn(1, 16), weight)
    assert seen == [most, 2]


@COMPILED
def test_every_leaf_that_multiplies_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    config = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=30, untie_embeddings_and_output_weights=True
    )
    leaves = (Linear(16, (2, 5), bias=True), HeadsToHidden(2, 8, 16, bias=False), Output(config))
    with torch.inference_mode():
        for module, shape in zip(leaves, ((1, 16), (1, 2, 8), (1, 1, 16)), strict=True):
            module(torch.zeros(shape))
    assert seen == [1, 1, 1]


@COMPILED
def test_a_gradient_is_refused() -> None:
    rows, weight = torch.randn(2, 8, requires_grad=True), torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="small_batch_gemv has no gradient"):
        product(rows, weight, None).sum().backward()


@COMPILED
def test_a_gpu_has_none_and_a_wish_for_all_kernels_does_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cuda_problem", lambda: None)
    assert "small_batch_gemv" in library.CPU_ONLY
    for wish in ("auto", "native"):
        monkeypatch.setenv(VARIABLE, wish)
        assert "cpu only" in choice("small_batch_gemv", "cuda").reason
    assert dict(backend_rows("cpu"))["kernel small_batch_gemv"].startswith("native: ")
