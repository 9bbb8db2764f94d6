"""Native kernels against the plain formula: never more than twice its error, both against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.ops import library
from megatron_retro.ops.activation import GATED, GEGLU, GELU, GELU_TANH, SQUARED_RELU, SWIGLU, activate
from megatron_retro.ops.attention import attention
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.norm import layer_norm, residual_norm, rms_norm
from megatron_retro.ops.precision import values_and_gradients
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, apply_rotary, rotary_table
from megatron_retro.testing.cuda_shim import excess_over_twice

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Formula = Callable[..., "Tensor | tuple[Tensor, ...]"]


def pair(face: Formula, monkeypatch: pytest.MonkeyPatch) -> tuple[Formula, Formula]:
    """The face with the native kernels, and with the reference."""

    def under(wish: str) -> Formula:
        def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            monkeypatch.setenv(VARIABLE, wish)
            return face(*inputs)

        return call

    return under("native"), under("reference")


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def assert_within_twice(ours: Formula, plain: Formula, *inputs: Tensor | None) -> None:
    assert max(excess_over_twice(ours, plain, inputs), default=0.0) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1), (2, 129), (4, 1000), (0, 16), (7, 17)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norms(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], plus_one: bool) -> None:
    hidden, residual = leaf(*shape, dtype=dtype, scale=3.0), leaf(*shape, dtype=dtype)
    weight, bias = leaf(shape[-1], dtype=dtype, scale=0.3), leaf(shape[-1], dtype=dtype)
    settings = {"epsilon": 1e-5, "weight_plus_one": plus_one}
    layer = pair(lambda h, w, b: layer_norm(h, w, b, **settings), monkeypatch)
    assert_within_twice(*layer, hidden, weight, bias)
    rms = pair(lambda h, w: rms_norm(h, w, **settings), monkeypatch)
    assert_within_twice(*rms, hidden, weight)
    for centered, shift in ((True, bias), (False, None)):
        both = pair(lambda h, r, w, b, c=centered: residual_norm(h, r, w, b, centered=c, **settings), monkeypatch)
        assert_within_twice(*both, hidden, residual, weight, shift)


def test_norm_of_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance is taken around the mean: 10,000 with a spread of 1 loses no digits that the input has."""
    hidden = (10_000 + torch.randn(8, 512)).requires_grad_()
    ours, plain = pair(lambda h, w: layer_norm(h, w, None, epsilon=1e-5), monkeypatch)
    assert_within_twice(ours, plain, hidden, leaf(512, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_sum_many_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Thousands of rows in one thread: the error of a weight's gradient does not grow with their number."""
    hidden, weight, bias = leaf(5000, 32, dtype=dtype), leaf(32, dtype=dtype), leaf(32, dtype=dtype)
    ours, plain = pair(lambda h, w, b: layer_norm(h, w, b, epsilon=1e-5), monkeypatch)
    assert_within_twice(ours, plain, hidden, weight, bias)
    ours, plain = pair(lambda x, b: activate(x, SQUARED_RELU, b), monkeypatch)
    assert_within_twice(ours, plain, hidden, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [SWIGLU, GEGLU, GELU, GELU_TANH, SQUARED_RELU])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activations(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, with_bias: bool) -> None:
    for rows, width in ((9, 100), (1, 1), (2, 64), (0, 8)):
        shape = (rows, 2, width) if kind in GATED else (rows, width)
        projected, bias = leaf(*shape, dtype=dtype, scale=3.0), leaf(*shape[1:], dtype=dtype)
        ours, plain = pair(lambda x, b: activate(x, kind, b), monkeypatch)
        assert_within_twice(ours, plain, projected, bias if with_bias else None)


@pytest.mark.parametrize("kind", [SWIGLU, GELU, GELU_TANH])
def test_activations_far_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nothing overflows where the exponential would; NaN stays NaN, infinity what the formula makes of it."""
    values = torch.tensor([-1e4, -200.0, -90.0, -88.0, -20.0, -5.0, -0.0, 1e-30, 5.0, 20.0, 88.0, 90.0, 200.0, 1e4])
    projected = torch.stack((values, torch.ones_like(values))) if kind == SWIGLU else values[None]
    projected = projected[None].clone().requires_grad_()
    ours, plain = pair(lambda x: activate(x, kind), monkeypatch)
    assert_within_twice(ours, plain, projected)
    assert torch.isnan(ours(torch.full_like(projected, float("nan")))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, interleaved: bool) -> None:
    for batch, length, heads, size, rotated in (
        (2, 5, 3, 16, 8),
        (1, 7, 2, 80, 80),
        (2, 3, 1, 6, 2),
        (1, 4, 2, 64, 64),
    ):
        positions = torch.randint(0, 1000, (batch, length))
        table = rotary_table(positions, RotaryFrequencies(rotated, 10000.0))
        # a slice of a wider projection: strided heads
        wide = leaf(batch, length, heads, size + 10, dtype=dtype)
        ours, plain = pair(
            lambda x, c, s, n=size: apply_rotary(
                x[..., :n], RotaryTable(c.float(), s.float()), interleaved=interleaved
            ),
            monkeypatch,
        )
        assert_within_twice(ours, plain, wide, table.cosine, table.sine)


def test_rotary_in_place_is_rotary() -> None:
    library.problem()
    heads = torch.randn(2, 6, 3, 32)
    table = rotary_table(torch.arange(6)[None], RotaryFrequencies(16, 10000.0))
    for interleaved in (False, True):
        expected = torch.ops.megatron_retro.rotary(heads, table.cosine, table.sine, interleaved, False)
        buffer = torch.zeros(2, 6, 3, 40)
        view = buffer[..., 4:36].copy_(heads)
        torch.ops.megatron_retro.rotary_(view, table.cosine, table.sine, interleaved, False)
        assert torch.equal(view, expected)
        assert float(buffer[..., :4].abs().max()) == 0.0 and float(buffer[..., 36:].abs().max()) == 0.0
        torch.ops.megatron_retro.rotary_(view, table.cosine, table.sine, interleaved, True)
        torch.testing.assert_close(view, heads)


ATTENTION_SHAPES = [
    # batch, length, first position, query heads, key heads, head size, chunk length, keys per chunk, chunks
    (2, 12, 0, 4, 2, 16, 4, 6, 3),
    (1, 13, 0, 2, 2, 20, 4, 5, 3),
    (2, 9, 6, 2, 1, 8, 4, 9, 4),
    (1, 1, 8, 2, 2, 16, 4, 3, 3),
    (1, 130, 0, 3, 3, 64, 64, 40, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("rotated", ["not", "halves", "pairs"])
def test_chunked_cross_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], rotated: str
) -> None:
    batch, length, first, heads, groups, size, chunk_length, keys, chunks = shape
    query = leaf(batch, length, heads, size, dtype=dtype)
    both = leaf(batch, chunks, keys, groups, 2 * size, dtype=dtype)
    mask = torch.rand(batch, chunks, keys) > 0.3
    mask[..., :2] = True  # one key alone has no gradient to compare
    mask[0, 0] = False
    frequencies = RotaryFrequencies(2 * (size // 4), 10000.0)
    tables = [rotary_table(torch.arange(count)[None], frequencies) for count in (length, keys)]
    rotary: dict[str, Any] = {"query_table": tables[0], "key_table": tables[1], "interleaved": rotated == "pairs"}
    rotary = {} if rotated == "not" else rotary

    def face(q: Tensor, kv: Tensor) -> Tensor:
        key, value = kv[..., :size], kv[..., size:]
        return chunked_cross_attention(q, key, value, mask, chunk_length, first_position=first, **rotary)

    ours, plain = pair(face, monkeypatch)
    assert_within_twice(ours, plain, query, both)


def test_all_attending_chunks_are_one_call_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a chunk the queries begin and end in; copies of keys for a second call would cost most."""
    monkeypatch.setenv(VARIABLE, "reference")
    shapes: list[tuple[int, ...]] = []

    def counted(query: Tensor, *arguments: Any, **more: Any) -> Tensor:
        shapes.append(tuple(query.shape[:2]))
        return attention(query, *arguments, **more)

    monkeypatch.setattr("megatron_retro.ops.chunked_cross_attention.attention", counted)
    key = leaf(2, 3, 5, 2, 16, dtype=torch.float32)
    for length, first, expected in ((12, 0, (6, 4)), (9, 1, (4, 4)), (2, 4, (2, 2)), (5, 5, (4, 4)), (3, 0, None)):
        shapes.clear()
        query = leaf(2, length, 2, 16, dtype=torch.float32)
        assert chunked_cross_attention(query, key, key, None, 4, first_position=first).shape == query.shape
        assert shapes == ([] if expected is None else [expected]), (length, first)


def test_attention_without_a_mask_or_with_all_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = leaf(2, 8, 2, 16, dtype=torch.float32), leaf(2, 2, 5, 2, 16, dtype=torch.float32)
    ours, plain = pair(lambda q, k: chunked_cross_attention(q, k, k * 2, None, 4), monkeypatch)
    assert_within_twice(ours, plain, query, key)
    assert float(ours(query[:, :3].detach(), key.detach()).abs().max()) == 0.0
    nothing = query[:, :0].detach().requires_grad_()
    gradients = values_and_gradients(lambda q, k: chunked_cross_attention(q, k, k, None, 4), (nothing, key))
    assert all(float(each.abs().sum()) == 0.0 for each in gradients)
    absent = torch.zeros(2, 2, 5, dtype=torch.bool)
    results = values_and_gradients(lambda q, k: chunked_cross_attention(q, k, k * 2, absent, 4), (query, key))
    assert all(float(each.abs().max()) == 0.0 for each in results)


@pytest.mark.parametrize("wish", ["native", "reference"])
def test_gradients_are_zero_where_nothing_attends(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    """Zero, not absent: what waits for a gradient would wait for ever. Nor do the inputs' values count."""
    monkeypatch.setenv(VARIABLE, wish)
    query, value = leaf(2, 3, 2, 16, dtype=torch.bfloat16), leaf(2, 1, 5, 2, 16, dtype=torch.bfloat16)
    key = torch.full_like(value, float("nan")).requires_grad_()
    results = values_and_gradients(lambda q, k, v: chunked_cross_attention(q, k, v, None, 4), (query, key, value))
    assert [each.shape for each in results] == [query.shape, query.shape, key.shape, value.shape]
    assert all(each.dtype == torch.bfloat16 and float(each.abs().sum()) == 0.0 for each in results)


def test_attention_ignores_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even NaN in an absent neighbour's keys and values reaches anything."""
    monkeypatch.setenv(VARIABLE, "native")
    query, key = leaf(1, 8, 2, 16, dtype=torch.float32), leaf(1, 2, 6, 2, 16, dtype=torch.float32)
    mask = torch.tensor([[[True, True, False, True, False, False]] * 2])
    poisoned = key.detach().clone()
    poisoned[~mask] = float("nan")
    poisoned.requires_grad_()
    clean = values_and_gradients(lambda q, k: chunked_cross_attention(q, k, k, mask, 4), (query, key))
    dirty = values_and_gradients(lambda q, k: chunked_cross_attention(q, k, k, mask, 4), (query, poisoned))
    assert all(torch.equal(left, right) for left, right in zip(clean, dirty, strict=True))


def test_float64_is_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = pair(lambda h, w: rms_norm(h, w, epsilon=1e-5), monkeypatch)
    gate = pair(lambda x: activate(x, SWIGLU), monkeypatch)
    hidden, weight = leaf(3, 50, dtype=torch.float64), leaf(50, dtype=torch.float64)
    projected = leaf(3, 2, 20, dtype=torch.float64)
    for (ours, plain), inputs in ((norm, (hidden, weight)), (gate, (projected,))):
        got, expected = values_and_gradients(ours, inputs), values_and_gradients(plain, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wish", ["native", "reference"])
def test_inputs_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    """Every second entry, or another order of dimensions: what a copy gives, gradients included."""
    monkeypatch.setenv(VARIABLE, wish)
    rows, weight = torch.randn(6, 40)[:, ::2], torch.randn(40)[::2]
    faces: list[tuple[Formula, tuple[Tensor, ...]]] = [
        (lambda h, w: layer_norm(h, w, w, epsilon=1e-5), (rows, weight)),
        (lambda h, w: rms_norm(h, w, epsilon=1e-5), (torch.randn(20, 6).T, weight)),
        (lambda h, r, w: residual_norm(h, r, w, w, epsilon=1e-5, centered=True), (rows, rows * 2, weight)),
        (lambda x, b: activate(x, SWIGLU, b), (torch.randn(2, 5, 10).transpose(0, 1), torch.randn(10, 2).T)),
        (lambda x: activate(x, GELU_TANH), (rows,)),
        (
            lambda q, k: chunked_cross_attention(q, k, k, None, 2),
            (torch.randn(1, 6, 2, 16)[..., ::2], torch.randn(1, 2, 8, 2, 3).transpose(2, 4)),
        ),
    ]
    for face, inputs in faces:
        strided = [each.detach().requires_grad_() for each in inputs]
        copies = [each.contiguous().detach().requires_grad_() for each in inputs]
        torch.testing.assert_close(values_and_gradients(face, strided), values_and_gradients(face, copies))
