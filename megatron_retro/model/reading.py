"""What a text reads: how much each neighbour's token was attended to, and what each neighbour took off the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_retro.microbatch import Neighbors
from megatron_retro.model.attention import ChunkedCrossAttention
from megatron_retro.model.retro import Retro


@dataclass(frozen=True)
class Reading:
    """Of one text: attention [C, K, R] to neighbours' tokens, scaled by gates and summed over readers, heads and
    layers; and worth [C, K], the nats that a chunk's readers lose in all when one of its neighbours is taken away.
    Virtual tokens are read but not predicted."""

    attention_CKR: Tensor
    worth_CK: Tensor


@torch.inference_mode()
def read_neighbors(model: Retro, tokens_S: Tensor, neighbors: Neighbors[Tensor]) -> Reading:
    """`tokens_S` holds one token more than is read, the last to be predicted; neighbours are those [1, C, K, R] of the
    chunks that are read whole."""
    _, num_chunks, number, length = neighbors.tokens_BCKR.shape
    tokens_1S, labels_1S, counted_S = tokens_S[None, :-1], tokens_S[None, 1:].clamp(min=0), tokens_S[1:] >= 0
    with _attention_of(model) as attended:
        losses_S = model(tokens_1S, neighbors, labels_BS=labels_1S)[0]
    if not attended:
        return Reading(torch.zeros(num_chunks, number, length), torch.zeros(num_chunks, number))
    attention_CKR = torch.unflatten(torch.stack(attended).sum((0, 2)), -1, (number, length))
    worth_CK = torch.zeros(num_chunks, number, device=tokens_S.device)
    size = model.retro.retro_chunk_length
    for chunk, neighbor in neighbors.mask_BCKR[0].any(-1).nonzero().tolist():
        first, stop = (chunk + 1) * size - 1, (chunk + 2) * size - 1
        so_far = neighbors.first_chunks(chunk + 1)
        mask = so_far.mask_BCKR.clone()
        mask[0, chunk, neighbor] = False
        without_S = model(
            tokens_1S[:, :stop], Neighbors(so_far.tokens_BCKR, mask), labels_BS=labels_1S[:, :stop].contiguous()
        )[0]
        worth_CK[chunk, neighbor] = ((without_S[first:] - losses_S[first:stop]) * counted_S[first:stop]).sum()
    return Reading(attention_CKR, worth_CK)


@contextmanager
def _attention_of(model: Retro) -> Iterator[list[Tensor]]:
    """[C, N, E] of every retrieval layer that runs meanwhile, for the only row."""
    found: list[Tensor] = []

    def look(attention: nn.Module, arguments: Any) -> None:
        assert isinstance(attention, ChunkedCrossAttention)
        found.append(attention.attention_received(*arguments[:3])[0])

    parts = [part for part in model.modules() if isinstance(part, ChunkedCrossAttention)]
    hooks = [part.register_forward_pre_hook(look) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
