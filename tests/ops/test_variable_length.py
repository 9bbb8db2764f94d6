"""Rows of several documents: each by itself through torch's variable-length attention, against a mask that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen

from megatron_retro.microbatch import Microbatch, document_bounds
from megatron_retro.ops import attention as under_test
from megatron_retro.ops.attention import AttentionPattern, Documents, attention, torchs_variable_length_attention

IDS = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [4, 5, 5, 5, 5, 5, 5, 5, 5, 0]])
Kernel = Callable[..., Tensor]


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents: [T, N, D] of all sequences in one, a window of (before, after), -1 without an end."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and window_size[1] == 0
    parts = []
    for start, stop in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert 0 <= stop - start <= max_q == max_k
        heads = [each[start:stop].transpose(0, 1) for each in (query, key, value)]
        places = torch.arange(stop - start)
        distance = places[:, None] - places
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        parts.append(functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=enable_gqa))
    return torch.cat(parts, 1).transpose(0, 1)


def heads(dtype: torch.dtype, groups: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 10, count, 8).to(dtype).requires_grad_() for count in (4, groups, groups)]


def pattern(**changes: Any) -> AttentionPattern:
    bounds = document_bounds(IDS)
    assert bounds is not None
    documents = Documents(torch.from_numpy(IDS), torch.from_numpy(bounds))
    return replace(AttentionPattern(causal=True, documents=documents), **changes)


def served(monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None) -> list[int]:
    calls: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        assert kernel is not None
        calls.append(len(arguments[3]))
        return kernel(*arguments, **keywords)

    monkeypatch.setattr(under_test, "has_variable_length_attention", lambda heads: kernel is not None)
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    return calls


@pytest.mark.parametrize(
    ("changes", "documents"),
    [({}, 2 * 64), ({"window": 2}, 2 * 64), ({"window": 64}, 2 * 64), ({"window": 2, "documents": None}, 2)],
    ids=["documents", "windows in documents", "a wide window", "windows of whole rows"],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_documents_and_windows_by_themselves_are_what_the_mask_says(
    changes: dict[str, Any], documents: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kernel in (one_by_one, None):
        calls = served(monkeypatch, kernel)
        inputs = heads(torch.bfloat16, groups)
        found = attention(*inputs, pattern(**changes))
        found.float().square().sum().backward()
        assert len(calls) == (kernel is not None) and set(calls) <= {documents + 1}
        results.append([found, *(each.grad for each in inputs)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "dtype", "dropout"),
    [
        ({}, torch.bfloat16, 0.5),
        ({"documents": None}, torch.bfloat16, 0.0),
        ({"documents": None, "window": 10}, torch.bfloat16, 0.0),
        ({"causal": False}, torch.bfloat16, 0.0),
        ({"bias_BNST": torch.zeros(2, 4, 10, 10, dtype=torch.bfloat16)}, torch.bfloat16, 0.0),
        ({"allowed_BST": torch.ones(2, 1, 10, dtype=torch.bool)}, torch.bfloat16, 0.0),
        ({"documents": Documents(torch.from_numpy(IDS))}, torch.bfloat16, 0.0),
    ],
    ids=["dropout", "no documents", "all in a window", "both ways", "bias", "padding", "too many documents"],
)
def test_a_mask_serves_what_the_kernel_cannot(
    changes: dict[str, Any], dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = served(monkeypatch, one_by_one)
    attention(*heads(dtype), pattern(**changes), dropout=dropout)
    assert calls == []


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("in_documents", [False, True])
def test_torchs_own_takes_what_it_is_given_in_one_graph(
    in_documents: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torchs_variable_length_attention() is None:
        pytest.skip("this torch has no variable-length attention with windows and grouped heads")
    monkeypatch.setattr(under_test, "has_variable_length_attention", lambda heads: True)
    query, key = (torch.empty(2, 10, count, 8, dtype=torch.bfloat16, device="meta") for count in (4, 2))
    ids, bounds = (torch.empty(2, size, dtype=torch.int64, device="meta") for size in (10, 65))
    documents = Documents(ids, bounds) if in_documents else None
    graph = torch.compile(attention, backend="eager", fullgraph=True)
    found = graph(query, key, key, AttentionPattern(causal=True, window=window, documents=documents))
    assert found.shape == query.shape


def test_whether_torch_has_its_own_can_be_asked_in_a_graph() -> None:
    """As a compiled layer on a GPU asks, and whether that has flash attention."""

    def asks(heads: Tensor) -> Tensor:
        has = under_test._torch_has_variable_length_attention()
        return heads + has + under_test._gpu_has_flash(heads.device.index, heads.shape[-1], False)

    expected = torchs_variable_length_attention() is not None
    assert torch.compile(asks, backend="eager", fullgraph=True)(torch.zeros(1)).item() == expected


def test_bounds_say_where_runs_of_ids_begin() -> None:
    bounds = document_bounds(IDS)
    assert bounds is not None and bounds.shape == (2, 65)
    assert bounds[0, :4].tolist() == [0, 3, 5, 10] and bounds[1, :4].tolist() == [0, 1, 9, 10]
    assert (bounds[:, 3:] == 10).all()
    assert document_bounds(np.arange(130).reshape(2, 65)) is None


def test_bounds_go_to_a_gpu_and_no_further_than_all_have_them() -> None:
    def batch(ids: np.ndarray[Any, Any]) -> Microbatch[Any]:
        plain = np.zeros(ids.shape, np.int64)
        return Microbatch(plain, plain, np.ones(ids.shape, bool), document_ids_BS=ids)

    few, many = batch(np.zeros((1, 65), np.int64)), batch(np.arange(65)[None])
    assert few.to(torch.device("cpu")).document_bounds_BD is None
    copies = [each.to(torch.device("meta")) for each in (few, many)]
    assert [each.document_bounds_BD is None for each in copies] == [False, True]
    joined = Microbatch.joined(copies, lambda tensors: torch.cat(list(tensors)), same_size=True)
    assert joined.document_bounds_BD is None and joined.document_ids_BS is not None
    assert Microbatch.joined(copies[:1] * 2, lambda tensors: torch.cat(list(tensors))).document_bounds_BD is not None
