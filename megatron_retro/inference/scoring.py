"""Log-probabilities of given continuations, with or without neighbours, as multiple-choice evaluation needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.inference.forward import Forward, stack_neighbors
from megatron_retro.inference.neighbor_sources import NeighborSource


@dataclass(frozen=True)
class ScoredContinuation:
    """The log-probability of a continuation, and whether each of its tokens was the most likely one."""

    logprob: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(
    forward: Forward,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    source: NeighborSource | None,
    *,
    max_length: int,
) -> list[ScoredContinuation]:
    """Score pairs (context, continuation) in one forward, padded on the right; long contexts lose their beginning.

    A context must hold a token, since the first of the continuation is predicted too. Virtual tokens precede every row.
    """
    lead = forward.virtual_tokens
    rows = [[*lead, *kept_tokens(context, continuation, max_length)] for context, continuation in pairs]
    longest = max(len(row) for row in rows)
    tokens_BS = torch.zeros(len(rows), longest, dtype=torch.long, device=forward.device)
    for number, row in enumerate(rows):
        tokens_BS[number, : len(row)] = torch.tensor(row)
    size = forward.chunk_length
    found = [
        source.find(whole_chunks(row, size, len(lead)))
        if source is not None and forward.reads_neighbors and len(row) >= size
        else []
        for row in rows
    ]
    neighbors = stack_neighbors(found, forward.neighbor_shape, forward.device, at_least=longest // size)
    logits_BSV = forward.text_logits(tokens_BS, neighbors)
    return [
        _scored(logits_BSV[number], row, len(continuation))
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True))
    ]


def whole_chunks(row: Sequence[int], size: int, num_virtual: int = 0) -> list[Sequence[int]]:
    """The complete chunks of a row, without virtual tokens."""
    return [row[max(start, num_virtual) : start + size] for start in range(0, len(row) - size + 1, size)]


def kept_tokens(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[int]:
    """The last `max_length` + 1 tokens of a pair; the last one is only predicted."""
    return [*context, *continuation][-(max_length + 1) : -1] + list(continuation[-1:])


def _scored(logits_SV: Tensor, row: Sequence[int], length: int) -> ScoredContinuation:
    length = min(length, len(row) - 1)
    predicted_LV = logits_SV[len(row) - length - 1 : len(row) - 1].float().log_softmax(-1)
    wanted_L = torch.tensor(row[len(row) - length :], device=logits_SV.device)
    chosen_L = predicted_LV.gather(1, wanted_L[:, None])[:, 0]
    return ScoredContinuation(float(chosen_L.sum()), bool((predicted_LV.argmax(-1) == wanted_L).all()))


def rolling_windows(tokens: Sequence[int], first: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Pairs that predict each token once, each with as much context as fits; `first` stands before the text.

    The first window predicts `max_length` tokens; a later one keeps the context that is left over.
    """
    windows = [([first], list(tokens[:max_length]))]
    for start in range(max_length, len(tokens), max_length):
        stop = min(start + max_length, len(tokens))
        context = list(tokens[max(0, stop - max_length - 1) : start])
        windows.append((context, list(tokens[start:stop])))
    return windows
