"""Queries of some spans of a sequence, against all its keys, are rows of the whole attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.microbatch import document_bounds
from megatron_retro.model.sequence_share import sequence_pattern
from megatron_retro.ops import attention as under_test
from megatron_retro.ops.attention import AttentionPattern, Documents, attention
from megatron_retro.parallel.sequence_parts import spans_of
from tests.ops.test_variable_length import served

LENGTH, RANKS = 24, 3
IDS = np.array([[0] * 5 + [1] * 2 + [2] * 9 + [3] * 8, [0] * 24])


def heads(dtype: torch.dtype, groups: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(groups)
    return [
        torch.randn(2, LENGTH, count, 8, generator=draw).to(dtype).requires_grad_() for count in (4, groups, groups)
    ]


def documents() -> Documents:
    bounds = document_bounds(IDS)
    assert bounds is not None
    return Documents(torch.from_numpy(IDS), torch.from_numpy(bounds))


def by_mask(query: Tensor, key: Tensor, value: Tensor, window: int | None, own: Documents | None) -> Tensor:
    """In float64, with every mask spelled out."""
    places = torch.arange(LENGTH)
    distance = places[:, None] - places
    seen = ((distance >= 0) & (distance < (window or LENGTH)))[None]
    if own is not None:
        seen = seen & (own.ids_BS[:, :, None] == own.ids_BS[:, None])
    wide = [each.double().transpose(1, 2) for each in (query, key, value)]
    return functional.scaled_dot_product_attention(*wide, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)


def of_all_ranks(inputs: list[Tensor], window: int | None, own: Documents | None) -> Tensor:
    """What ranks compute, put together in the order of the sequence."""
    query, key, value = inputs
    places, parts = [], []
    for rank in range(RANKS):
        spans = spans_of(LENGTH, rank, RANKS)
        positions = np.concatenate(spans)
        parts.append(attention(query[:, positions], key, value, sequence_pattern(window, own, None, spans)))
        places += positions.tolist()
    return torch.cat(parts, 1)[:, np.argsort(places)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("in_documents", [False, True])
def test_all_spans_together_are_the_whole(
    in_documents: bool, window: int | None, groups: int, dtype: torch.dtype
) -> None:
    own, results = documents() if in_documents else None, []
    for compute in (of_all_ranks, lambda inputs, *pattern: by_mask(*inputs, *pattern)):
        inputs = heads(dtype, groups)
        found = compute(inputs, window, own)
        found.double().square().sum().backward()
        results.append([found.double(), *(each.grad.double() for each in inputs if each.grad is not None)])
    bound = 1e-6 if dtype == torch.float32 else 0.01
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < bound * expected.norm()


def document_by_document(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, **how: Any
) -> Tensor:
    """Torch's kernel: of each document the queries are the last tokens; some documents have none."""
    parts, before = [], how["window_size"][0]
    pairs_q, pairs_k = (list(zip(each.tolist(), each.tolist()[1:], strict=False)) for each in (starts_q, starts_k))
    for (first_q, stop_q), (first_k, stop_k) in zip(pairs_q, pairs_k, strict=True):
        num_queries, num_keys = stop_q - first_q, stop_k - first_k
        assert 0 <= num_queries <= min(num_keys, most_q) and num_keys <= most_k
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        seen = (distance >= 0) & ((distance <= before) | (before < 0))
        own = (query[first_q:stop_q], key[first_k:stop_k], value[first_k:stop_k])
        if num_queries:
            attended = functional.scaled_dot_product_attention(
                *(each.transpose(0, 1) for each in own), attn_mask=seen, enable_gqa=how["enable_gqa"]
            )
            parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("window", "in_documents"), [(None, True), (3, True), (3, False)])
def test_documents_and_windows_of_spans_go_to_the_kernel_of_documents(
    window: int | None, in_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, own = heads(torch.bfloat16), documents() if in_documents else None
    expected = by_mask(*inputs, window, own)
    calls = served(monkeypatch, document_by_document)
    found = of_all_ranks(inputs, window, own)
    assert len(calls) == 2 * RANKS
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_heads_under_a_mask_go_to_a_kernel_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would write all scores out: its kernel for masks and float32 takes no grouped heads."""
    asked: list[bool] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        asked.append(how["enable_gqa"] or len({each.shape[1] for each in (query, key, value)}) > 1)
        return torch.empty_like(query)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    query, key = (torch.empty(1, 16, count, 64, dtype=dtype, device="meta") for count in (4, 2))
    for pattern in (AttentionPattern(causal=True), AttentionPattern(causal=True, window=4)):
        attention(query, key, key, pattern)
    assert asked == [dtype == torch.bfloat16, False]


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.causal: list[Any] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._scaled_dot_product_flash_attention.default:
            self.causal.append(arguments[4])
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(each.numel() for each in made if isinstance(each, Tensor))])
        return result


@pytest.mark.parametrize(("dtype", "calls"), [(torch.bfloat16, [True]), (torch.float32, [])])
def test_a_gpu_gets_no_mask_for_the_last_queries_of_many_keys(dtype: torch.dtype, calls: list[bool]) -> None:
    """16k queries and 128k keys: a mask would be 2 GB. The device of plans stands for a GPU."""
    query, key = (
        torch.empty(1, length, count, 64, dtype=dtype, device="meta") for length, count in ((2**14, 4), (2**17, 1))
    )
    with Seen() as seen:
        attended = attention(query, key, key, AttentionPattern(causal=True))
    assert attended.shape == query.shape and seen.causal == calls
    assert (seen.largest <= key.numel()) is bool(calls)


def test_flash_attention_is_asked_only_for_what_it_takes() -> None:
    takes = [
        under_test._flash_takes(torch.empty(1, 1, 1, size, dtype=dtype, device=device), 0.0)
        for size, dtype, device in (
            (64, torch.bfloat16, "meta"),
            (60, torch.bfloat16, "meta"),
            (264, torch.bfloat16, "meta"),
            (64, torch.float32, "meta"),
            (64, torch.bfloat16, "cpu"),
        )
    ]
    assert takes == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("capability", "head_size", "drops", "takes"),
    [
        ((7, 5), 64, False, False),
        ((8, 6), 192, True, True),
        ((8, 9), 200, False, False),
        ((12, 0), 256, False, True),
        ((8, 6), 256, True, False),
        ((9, 0), 224, True, True),
    ],
)
def test_wide_heads_go_where_they_have_a_backward(
    capability: tuple[int, int], head_size: int, drops: bool, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of torch's flash kernels, which its own choice of kernels knows (`can_use_flash_attention`)."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert under_test._gpu_has_flash(0, head_size, drops) is takes
