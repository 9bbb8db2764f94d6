"""The loss over a large vocabulary: value and gradients, skipped positions, cut vocabularies, memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_retro.ops import library
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.ops.linear_cross_entropy import (
    BLOCK_BYTES,
    _VocabularyBlocks,
    gradients,
    linear_cross_entropy,
    statistics,
)
from megatron_retro.ops.precision import values_and_gradients
from megatron_retro.testing.cuda_shim import excess_over_twice

NATIVE = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
WISHES = ["reference", pytest.param("native", marks=NATIVE)]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none").view_as(
        labels
    )


def case(dtype: torch.dtype, tokens: int = 37, width: int = 24, vocabulary: int = 301) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[0, 3:9] = -1
    return hidden, weight, labels


@pytest.fixture(params=WISHES)
def wish(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.fixture(params=[None, 20_000])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, and several with a short last one."""
    if request.param is not None:
        monkeypatch.setattr("megatron_retro.ops.linear_cross_entropy.BLOCK_BYTES", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_twice_the_plain_error(wish: str, block_bytes: None, dtype: torch.dtype) -> None:
    """`values_and_gradients` weighs each position differently; equal weights take the way without a second pass."""
    hidden, weight, labels = case(dtype)
    assert max(excess_over_twice(linear_cross_entropy, plain, (hidden, weight, labels))) <= 0.0

    def ours_summed(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, t).sum()[None]

    def plain_summed(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return plain(h, w, t).sum()[None]

    assert max(excess_over_twice(ours_summed, plain_summed, (hidden, weight, labels))) <= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_vocabulary(wish: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = case(dtype, tokens=5, width=8, vocabulary=256_000)
    labels[0, 0] = 255_999
    assert max(excess_over_twice(linear_cross_entropy, plain, (hidden, weight, labels))) <= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_of_gpus(wish: str, block_bytes: None, dtype: torch.dtype) -> None:
    """Blocks of the vocabulary, which the CPU does not choose, held to the same bound on it."""
    hidden, weight, labels = case(dtype)

    def by_vocabulary(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return _VocabularyBlocks.apply(h[0], w, t[0])[None]

    assert max(excess_over_twice(by_vocabulary, plain, (hidden, weight, labels))) <= 0.0


def test_a_gpu_keeps_blocks_of_the_vocabulary_whoever_passes_over_them() -> None:
    """As 256,000 x 1,024 float32 logits are 1 GB; and a vocabulary's gradient is no sum of bfloat16 parts."""
    made: list[tuple[str, Tensor]] = []

    class Results(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor) and not function.is_view:
                made.append((str(function), result))
            return result

    hidden = torch.empty(1, 4096, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(256_000, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Results():
        linear_cross_entropy(hidden, weight, torch.empty(1, 4096, dtype=torch.long, device="meta")).sum().backward()
    assert max(each.nbytes for _, each in made) <= 2 * BLOCK_BYTES
    assert not [name for name, each in made if each.shape == weight.shape and "add" in name]


def test_skipped_positions(wish: str) -> None:
    hidden, weight, labels = case(torch.float32)
    losses, hidden_grad, _ = values_and_gradients(linear_cross_entropy, (hidden, weight, labels))
    assert float(losses[labels < 0].abs().max()) == 0.0 and float(hidden_grad[labels < 0].abs().max()) == 0.0
    none = torch.full_like(labels, -1)
    results = values_and_gradients(linear_cross_entropy, (hidden, weight, none))
    assert all(float(each.abs().max()) == 0.0 for each in results)
    empty = values_and_gradients(linear_cross_entropy, (hidden[:, :0].detach().requires_grad_(), weight, labels[:, :0]))
    assert empty[0].shape == (1, 0) and float(empty[2].abs().max()) == 0.0


def test_only_what_needs_a_gradient_gets_one(wish: str) -> None:
    hidden, weight, labels = case(torch.float32)
    expected = values_and_gradients(plain, (hidden, weight, labels))
    frozen = values_and_gradients(linear_cross_entropy, (hidden, weight.detach(), labels))
    torch.testing.assert_close(frozen, expected[:2])
    fixed = values_and_gradients(linear_cross_entropy, (hidden.detach(), weight, labels))
    torch.testing.assert_close(fixed, [expected[0], expected[2]])
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected[0])


def test_a_second_backward_gives_the_same(wish: str) -> None:
    hidden, weight, labels = case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels).mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_product_for_a_gradient_that_nobody_wants(wish: str, frozen: str) -> None:
    """A frozen vocabulary costs logits twice and the hidden state's gradient: three products, not four."""
    hidden, weight, labels = case(torch.bfloat16)  # torch counts no product that adds to a result, as float32's do
    wanted = {"hidden": weight, "weight": hidden}[frozen]

    def gradient() -> Tensor:
        losses: Tensor = _VocabularyBlocks.apply(hidden[0], weight, labels[0])  # type: ignore[no-untyped-call]  # torch's `apply`
        return torch.autograd.grad(losses.sum(), wanted)[0]

    expected = gradient()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(gradient(), expected)
    assert counter.get_total_flops() == 3 * 2 * hidden.numel() * weight.shape[0]


@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_vocabulary(wish: str, cut: int) -> None:
    """Each part's statistics, reduced as ranks reduce them, and its own gradients, give the whole."""
    hidden, weight, labels = case(torch.float32)
    expected = values_and_gradients(lambda h, w, t: plain(h, w, t).sum()[None], (hidden, weight, labels))
    direction = torch.randn(1, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).float()
    rows, kept = hidden.detach()[0], labels[0] >= 0
    parts = list(weight.detach().split(-(-weight.shape[0] // cut)))
    firsts = [sum(len(part) for part in parts[:index]) for index in range(cut)]
    found = [statistics(rows, part, labels[0], first) for part, first in zip(parts, firsts, strict=True)]
    largest = torch.stack([each.largest_T for each in found]).amax(0)
    total = sum((each.sum_T * (each.largest_T - largest).exp() for each in found), torch.zeros_like(largest))
    normalizer = largest + total.log()
    label_logit = sum((each.label_logit_T for each in found), torch.zeros_like(largest))
    torch.testing.assert_close(((normalizer - label_logit) * kept).sum()[None], expected[0])
    scale = kept.float() * direction
    pieces = [
        gradients(rows, part, labels[0], normalizer, scale, first) for part, first in zip(parts, firsts, strict=True)
    ]
    torch.testing.assert_close(
        torch.stack([piece[0] for piece in pieces]).sum(0)[None], expected[1], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(torch.cat([piece[1] for piece in pieces]), expected[2], rtol=1e-4, atol=1e-5)


@NATIVE
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_positions_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "native")
    monkeypatch.setattr("megatron_retro.ops.linear_cross_entropy.BLOCK_BYTES", 1 << 22)
    hidden = torch.randn(1, 2048, 4).requires_grad_()
    weight = torch.randn(30_000, 4).requires_grad_()
    labels = torch.randint(0, 30_000, (1, 2048))
    logits_bytes = 2048 * 30_000 * 4
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    linear_cross_entropy(hidden, weight, labels).mean().backward()
    assert resident("VmHWM") - before < logits_bytes / 6
    assert weight.grad is not None and math.isfinite(float(weight.grad.sum()))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
