"""The CUDA kernels are executed: on a GPU where there is one, always on the host shim under several thread orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, apply_rotary, rotary_table
from megatron_retro.testing.cuda_shim import COMPILER, CSRC, DTYPES, Kernels
from megatron_retro.testing.far_tensors import spread

pytestmark = pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs csrc and a C++ compiler")


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    for rows, width in ((3, 64), (2, 37), (5, 8), (1, 3000), (0, 8)):
        hidden, residual = leaf(rows, width, dtype=dtype, scale=2.0), leaf(rows, width, dtype=dtype)
        weight, bias = leaf(width, dtype=dtype), leaf(width, dtype=dtype)

        def layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return kernels.ops.residual_norm(h, r, w, b, 1e-5, True, 1.0)[:2]

        def plain_layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor, n: int = width) -> tuple[Tensor, ...]:
            return functional.layer_norm(h + r, (n,), w + 1, b), h + r

        def rms(h: Tensor, w: Tensor) -> Tensor:
            return kernels.ops.residual_norm(h, None, w, None, 1e-5, False, 0.0)[0]

        def plain_rms(h: Tensor, w: Tensor, n: int = width) -> Tensor:
            return functional.rms_norm(h, (n,), w, 1e-5)

        assert kernels.excess(layer, plain_layer, hidden, residual, weight, bias) <= 0.0
        assert kernels.excess(rms, plain_rms, hidden, weight) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    plain = {
        0: functional.silu,
        1: functional.gelu,
        2: lambda x: functional.gelu(x, approximate="tanh"),
        3: lambda x: functional.relu(x).square(),
    }
    for rows, width in ((5, 64), (3, 19), (0, 8)):
        for kind, formula in plain.items():
            projected, bias = leaf(rows, 2 * width, dtype=dtype, scale=3.0), leaf(2 * width, dtype=dtype)

            def gated(x: Tensor, b: Tensor, f: Any = formula, n: int = width) -> Tensor:
                return f((x + b)[..., :n]) * (x + b)[..., n:]

            def ours(x: Tensor, b: Tensor, code: int = kind) -> Tensor:
                return kernels.ops.gated_activation(x, b, code, True)

            assert kernels.excess(ours, gated, projected, bias) <= 0.0
            alone = leaf(rows, width, dtype=dtype, scale=3.0)
            assert (
                kernels.excess(lambda x, k=kind: kernels.ops.gated_activation(x, None, k, False), formula, alone) <= 0.0
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(kernels: Kernels, thread_order: int, dtype: torch.dtype, interleaved: bool) -> None:
    for batch, length, heads, size, rotated in (
        (2, 3, 2, 32, 16), (1, 2, 3, 10, 6), (2, 2, 1, 16, 16), (1, 0, 2, 16, 8),
    ):  # fmt: skip
        table = rotary_table(torch.randint(0, 500, (batch, length)), RotaryFrequencies(rotated, 10000.0))
        wide = leaf(batch, length, heads, size + 16, dtype=dtype)

        def ours(x: Tensor, c: Tensor, s: Tensor, n: int = size) -> Tensor:
            return kernels.ops.rotary(x[..., :n], c, s, interleaved, False)

        def plain(x: Tensor, c: Tensor, s: Tensor, n: int = size) -> Tensor:
            return apply_rotary(x[..., :n], RotaryTable(c, s), interleaved=interleaved)

        assert kernels.excess(ours, plain, wide, table.cosine, table.sine) <= 0.0
        where = wide.detach()[..., :size].to(kernels.device, copy=True)
        cosine, sine = table.cosine.to(kernels.device), table.sine.to(kernels.device)
        expected = kernels.ops.rotary(where, cosine, sine, interleaved, False)
        kernels.ops.rotary_(where, cosine, sine, interleaved, False)
        assert torch.equal(where, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 1100), (1, 256_000), (0, 8), (3, 1)])
def test_vocabulary_block(kernels: Kernels, thread_order: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Of a part of the vocabulary that begins at 100: labels inside, before and behind it."""
    rows, width = shape
    logits = (torch.randn(shape) * 5).to(dtype)
    labels = 100 + torch.tensor([7, width + 400, 0, width - 1])[:rows]
    scales = torch.rand(rows)

    def ours(given: Tensor, where: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        largest, total, label_logit = (torch.zeros_like(scale) for _ in range(3))
        kernels.ops.vocabulary_statistics(given, where, 100, largest, total, label_logit)
        normalizer = largest + total.log()
        gradient = given.clone()
        kernels.ops.vocabulary_gradient_(gradient, where, 100, normalizer, scale)
        return normalizer, label_logit, gradient

    def plain(given: Tensor, where: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        compute = given if given.dtype == torch.float64 else given.float()
        held = ((where >= 100) & (where < 100 + width)).unsqueeze(-1)
        at = (where - 100).unsqueeze(-1).where(held, 0)
        normalizer = compute.logsumexp(-1)
        gradient = (compute - normalizer.unsqueeze(-1)).exp() * scale.unsqueeze(-1)
        gradient = gradient.scatter_add(-1, at, torch.where(held, -scale.unsqueeze(-1), 0.0))
        return normalizer, compute.gather(-1, at).where(held, 0.0).squeeze(-1), gradient.to(given.dtype)

    assert kernels.excess(ours, plain, logits, labels, scales) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 11, 0, 4, 2, 16, 4, 6, 2),
        (1, 9, 6, 2, 2, 12, 4, 40, 4),
        (1, 120, 0, 2, 1, 16, 40, 11, 2),
        (1, 5, 0, 1, 1, 68, 2, 3, 2),
        (1, 5, 0, 1, 1, 72, 2, 3, 2),
        (1, 5, 0, 1, 1, 128, 2, 3, 2),
        (1, 5, 0, 1, 1, 132, 2, 3, 2),
        (1, 120, 1, 2, 1, 64, 40, 150, 2),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_chunked_cross_attention(
    kernels: Kernels, thread_order: int, dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool
) -> None:
    batch, length, first, heads, groups, size, chunk_length, keys, chunks = shape
    query, both = (
        leaf(batch, length, heads, size, dtype=dtype),
        leaf(batch, chunks, keys, groups, 2 * size, dtype=dtype),
    )
    mask = torch.rand(batch, chunks, keys) > 0.3
    mask[0, 0] = False
    mask[-1, -1, :2] = True  # one key alone has no gradient to compare
    mask[-1, -1, 64:128] = False  # whole tiles of keys between others
    frequencies = RotaryFrequencies(2 * (size // 4), 10000.0)
    tables = [rotary_table(torch.arange(count)[None], frequencies) for count in (length, keys)]
    rotary = [each[0].to(kernels.device) for table in tables for each in (table.cosine, table.sine)]

    def ours(q: Tensor, kv: Tensor, m: Tensor) -> Tensor:
        return kernels.ops.chunked_cross_attention(
            q, kv[..., :size], kv[..., size:], m, chunk_length, first, size**-0.5, *rotary, interleaved
        )[0]

    def plain(q: Tensor, kv: Tensor, m: Tensor) -> Tensor:
        moved = [RotaryTable(table.cosine.to(q.device), table.sine.to(q.device)) for table in tables]
        return chunked_cross_attention(
            q, kv[..., :size], kv[..., size:], m, chunk_length, first_position=first,
            query_table=moved[0], key_table=moved[1], interleaved=interleaved,
        )  # fmt: skip

    assert kernels.excess(ours, plain, query, both, mask) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_over_heads_that_begin_anywhere(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    """Not at multiples of 16 bytes: not for the kernels on tensor cores, which copy as many at a time."""
    query, both = leaf(1, 7, 2, 17, dtype=dtype), leaf(1, 2, 5, 2, 33, dtype=dtype)

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        heads = q[..., 1:], kv[..., 1:17], kv[..., 17:]
        return kernels.ops.chunked_cross_attention(*heads, None, 3, 0, 0.25, None, None, None, None, False)[0]

    def plain(q: Tensor, kv: Tensor) -> Tensor:
        return chunked_cross_attention(q[..., 1:], kv[..., 1:17], kv[..., 17:], None, 3)

    assert kernels.excess(ours, plain, query, both) <= 0.0


def test_index_arithmetic_beyond_32_bits(kernels: Kernels, thread_order: int) -> None:
    """Rows far apart give what rows side by side give."""
    ops, here = kernels.ops, {"device": kernels.device, "dtype": torch.bfloat16}
    heads, table = torch.randn(1, 2, 1, 16, **here), torch.rand(1, 2, 8, device=kernels.device)
    logits, labels = torch.randn(2, 40, **here), torch.tensor([3, 39], device=kernels.device)
    query, key = torch.randn(2, 9, 2, 16, **here), torch.randn(2, 2, 5, 2, 16, **here)
    settings = (4, 0, 0.25, None, None, None, None, False)
    results = []
    for place in (torch.clone, spread):
        given = [place(each) for each in (heads, logits, query, key)]
        rows = [torch.zeros(2, device=kernels.device) for _ in range(3)]
        ops.vocabulary_statistics(given[1], labels, 0, *rows)
        ops.vocabulary_gradient_(given[1], labels, 0, *rows[:2])
        attended, normalizer = ops.chunked_cross_attention(given[2], given[3], key, None, *settings)
        attention = (query, given[2], given[3], key, None, attended, normalizer, *settings)
        gradients = ops.chunked_cross_attention_backward(*attention)
        rotated = ops.rotary(given[0], table, table, False, False)
        results.append([rotated, *rows, given[1], attended, normalizer, *gradients])
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "chunks", "keys"), [(0, 5, 2, 3), (1, 0, 2, 3), (1, 5, 0, 3), (1, 5, 2, 0)]
)
def test_nothing_to_attend_to_is_zero(
    kernels: Kernels, thread_order: int, dtype: torch.dtype, batch: int, length: int, chunks: int, keys: int
) -> None:
    query, key = leaf(batch, length, 2, 8, dtype=dtype), leaf(batch, chunks, keys, 1, 8, dtype=dtype)
    leaves = [each.detach().to(kernels.device).requires_grad_() for each in (query, key)]
    settings = (None, 2, 0, 0.5, None, None, None, None, False)
    attended = kernels.ops.chunked_cross_attention(leaves[0], leaves[1], leaves[1], *settings)[0]
    assert attended.shape == query.shape
    for each in (attended, *torch.autograd.grad(attended.sum(), leaves)):
        assert float(each.detach().abs().sum()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_neighbors_have_no_influence(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    query, key = leaf(1, 8, 1, 8, dtype=dtype), leaf(1, 2, 6, 1, 8, dtype=dtype)
    mask = torch.tensor([[[True, True, False, True, False, False], [False] * 6]])
    poisoned = key.detach().clone()
    poisoned[~mask] = float("nan")
    results = []
    for source in (key.detach(), poisoned):
        leaves = [query.detach().to(kernels.device).requires_grad_(), source.to(kernels.device).requires_grad_()]
        out = kernels.ops.chunked_cross_attention(
            leaves[0], leaves[1], leaves[1], mask.to(kernels.device), 4, 0, 0.5, None, None, None, None, False
        )[0]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert float(results[0][0][:, 7:].abs().max()) == 0.0 and float(results[0][0][:, :3].abs().max()) == 0.0
