"""Scores of continuations equal a plain forward, window by window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_retro.inference.forward import LocalForward, stack_neighbors
from megatron_retro.inference.scoring import rolling_windows, score_continuations
from megatron_retro.model.retro import Retro


def plain(model: Retro, tokens: list[int], length: int, source: Any) -> tuple[float, bool]:
    chunks = [tokens[start : start + 8] for start in range(0, len(tokens) - 7, 8)]
    found = (
        stack_neighbors([source.find(chunks)], LocalForward(model).neighbor_shape, torch.device("cpu"))
        if source
        else None
    )
    with torch.inference_mode():
        rows = model(torch.tensor([tokens]), found)[0].log_softmax(-1)
    wanted = tokens[-length:]
    picked = rows[len(tokens) - length - 1 : len(tokens) - 1]
    return float(picked[range(length), wanted].sum()), picked.argmax(-1).tolist() == wanted


@pytest.mark.parametrize("reads", [True, False])
def test_scores(small_model: Callable[..., Retro], hashed: Any, reads: bool) -> None:
    model, source = small_model(), hashed if reads else None
    draws = np.random.default_rng(3)
    pairs = [
        (draws.integers(0, 256, context).tolist(), draws.integers(0, 256, length).tolist())
        for context, length in ((1, 1), (5, 3), (20, 9), (30, 1), (9, 40))
    ]
    greedy = model(torch.tensor([pairs[1][0]])).argmax(-1)[0, -1].item()
    pairs.append((pairs[1][0], [int(greedy)]))
    scored = score_continuations(LocalForward(model), pairs, source, max_length=100)
    for (context, continuation), one in zip(pairs, scored, strict=True):
        value, is_greedy = plain(model, [*context, *continuation], len(continuation), source)
        assert one.logprob == pytest.approx(value, abs=1e-3) and one.is_greedy == is_greedy
    assert scored[-1].is_greedy
    (cut,) = score_continuations(LocalForward(model), [pairs[2]], source, max_length=16)
    assert cut.logprob == pytest.approx(plain(model, [*pairs[2][0], *pairs[2][1]][-17:], 9, source)[0], abs=1e-3)


@pytest.mark.parametrize("length", [1, 4, 5, 12, 13])
def test_rolling_windows_predict_each_token_once(length: int) -> None:
    tokens = list(range(10, 10 + length))
    windows = rolling_windows(tokens, 0, 4)
    assert [token for _, continuation in windows for token in continuation] == tokens
    whole = [0, *tokens]
    for context, continuation in windows:
        start = whole.index(continuation[0])
        assert context == whole[start - len(context) : start] and context
        assert len(context) + len(continuation) <= 5
    if length > 4:
        assert len(windows[-1][0]) + len(windows[-1][1]) == 5
