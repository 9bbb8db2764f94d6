"""Feeding a sequence in pieces gives what teacher forcing gives; rows and padding do not disturb each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.errors import DataError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.cache import Cache
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

LENGTH = 18
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "relative": ({"position_embedding_type": "relative"}, {"retro_neighbor_positions": "relative"}),
    "learned": ({"position_embedding_type": "learned_absolute"}, {"retro_gate_type": "scalar"}),
    "window": (
        {"sliding_window": 5, "full_attention_layers": (2,), "rotary_base_local": 50.0},
        {"retro_gate_type": "adaptive"},
    ),
    "like the decoder": (
        {},
        {
            "retro_gate_type": "heads",
            "retro_neighbor_positions": "continued",
            "retro_encoder_causal": True,
            "retro_encoder_final_norm": True,
            "retro_encoder_reads": "same-depth",
        },
    ),
    "unrotated": ({"no_rope_freq": 2}, {}),
    "grouped": ({"group_query_attention": True, "num_query_groups": 2}, {"retro_layers": (1, 2, 6)}),
}
SPLITS = [[LENGTH], [1] * LENGTH, [5, 1, 1, 6, 5], [4, 4, 4, 6], [3, 2, 13]]


def build(kind: str) -> Retro:
    model, retro = MODELS[kind]
    return random_model(tiny_model(**model), tiny_retro(**retro))


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, atol=2e-5, rtol=2e-5)


def between(neighbors: Neighbors, start: int, stop: int) -> Neighbors | None:
    """The neighbours of the chunks completed by tokens [start, stop)."""
    chunks = slice(start // 4, stop // 4)
    return Neighbors(neighbors.tokens_BCKR[:, chunks], neighbors.mask_BCKR[:, chunks])


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_pieces_equal_the_whole(kind: str, split: list[int]) -> None:
    model, tokens, neighbors = build(kind), random_tokens(2, LENGTH), random_neighbors(2, 4)
    neighbors.mask_BCKR[1, 2] = False
    cache, start, pieces = model.new_cache(2, LENGTH), 0, []
    for width in split:
        pieces.append(model(tokens[:, start : start + width], between(neighbors, start, start + width), cache=cache))
        start += width
    assert close(torch.cat(pieces, 1), model(tokens, neighbors))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_rows_of_different_lengths_equal_single_rows(kind: str) -> None:
    """A ragged prompt, then one token at a time: each row crosses chunk borders at its own steps."""
    model, tokens, neighbors = build(kind), random_tokens(3, LENGTH), random_neighbors(3, 4)
    lengths, steps = [9, 4, 6], 8
    expected = [
        model(tokens[row : row + 1, : length + steps], row_of(neighbors, row, (length + steps) // 4))
        for row, length in enumerate(lengths)
    ]
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache = model.new_cache(3, LENGTH + 2)
    logits = model(tokens[:, :9], completed(neighbors, [0, 0, 0], lengths), padding_mask_BS=real, cache=cache)
    for row, length in enumerate(lengths):
        assert close(logits[row, :length], expected[row][0, :length])
    for step in range(steps):
        now = [length + step for length in lengths]
        column = torch.stack([tokens[row, position] for row, position in enumerate(now)])[:, None]
        logits = model(column, completed(neighbors, now, [position + 1 for position in now]), cache=cache)
        for row, position in enumerate(now):
            assert close(logits[row, 0], expected[row][0, position])
    assert cache.lengths == [length + steps for length in lengths]


@torch.no_grad()
def test_wide_pieces_of_rows_at_different_places() -> None:
    model, tokens, neighbors = build("plain"), random_tokens(2, LENGTH), random_neighbors(2, 4)
    cache = model.new_cache(2, LENGTH + 4)
    real = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    model(tokens[:, :7], completed(neighbors, [0, 0], [7, 5]), padding_mask_BS=real, cache=cache)
    second = torch.stack((tokens[0, 7:17], tokens[1, 5:15]))
    logits = model(second, completed(neighbors, [7, 5], [17, 15]), cache=cache)
    for row, start in enumerate((7, 5)):
        whole = model(tokens[row : row + 1, : start + 10], row_of(neighbors, row, (start + 10) // 4))
        assert close(logits[row], whole[0, start:])


@pytest.mark.parametrize("padding", [1, 3, 4, 8])
@torch.no_grad()
def test_left_padding_moves_the_grid_and_nothing_else(padding: int) -> None:
    """Padding of whole chunks: the same logits as unpadded; any padding: whole and in pieces agree."""
    model, tokens = build("plain"), random_tokens(2, LENGTH)
    padded = torch.cat((torch.zeros(2, padding, dtype=torch.long), tokens), 1)
    real = (torch.arange(padding + LENGTH) >= padding).expand(2, -1)
    neighbors = random_neighbors(2, (padding + LENGTH) // 4)
    neighbors.mask_BCKR[:, : padding // 4] = False
    whole = model(padded, neighbors, padding_mask_BS=real)
    cache = model.new_cache(2, padding + LENGTH)
    first = model(padded[:, :13], between(neighbors, 0, 13), padding_mask_BS=real[:, :13], cache=cache)
    second = model(padded[:, 13:], between(neighbors, 13, padding + LENGTH), cache=cache)
    assert close(torch.cat((first, second), 1)[:, padding:], whole[:, padding:])
    other = padded.clone()
    other[:, :padding] = 5
    assert torch.equal(model(other, neighbors, padding_mask_BS=real)[:, padding:], whole[:, padding:])
    if padding % 4 == 0:
        unpadded = row_slice(neighbors, padding // 4)
        assert close(whole[:, padding:], model(tokens, unpadded))


@torch.no_grad()
def test_rows_can_be_reordered_and_dropped() -> None:
    model, tokens, neighbors = build("window"), random_tokens(3, LENGTH), random_neighbors(3, 4)
    cache = model.new_cache(3, LENGTH)
    model(tokens[:, :9], between(neighbors, 0, 9), cache=cache)
    rows = torch.tensor([2, 0])
    cache.select_rows(rows)
    kept = Neighbors(neighbors.tokens_BCKR[rows], neighbors.mask_BCKR[rows])
    logits = model(tokens[rows, 9:], between(kept, 9, LENGTH), cache=cache)
    assert close(logits, model(tokens[rows], kept)[:, 9:])


@torch.no_grad()
def test_a_chunk_completed_without_neighbors_reads_none() -> None:
    model, tokens, neighbors = build("plain"), random_tokens(1, 12), random_neighbors(1, 3)
    cache = model.new_cache(1, 12)
    model(tokens[:, :4], between(neighbors, 0, 4), cache=cache)
    pieces = [model(tokens[:, start : start + 4], None, cache=cache) for start in (4, 8)]
    neighbors.mask_BCKR[:, 1:] = False
    assert close(torch.cat(pieces, 1), model(tokens, neighbors)[:, 4:])


@torch.no_grad()
def test_batching_does_not_change_a_sequence() -> None:
    model, tokens, neighbors = build("grouped"), random_tokens(4, LENGTH), random_neighbors(4, 4)
    together = model(tokens, neighbors)
    for row in range(4):
        assert close(together[row], model(tokens[row : row + 1], row_of(neighbors, row, 4))[0])


@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other() -> None:
    model, tokens = build("plain"), random_tokens(1, 10)
    documents, positions = torch.tensor([[0] * 6 + [1] * 4]), torch.tensor([[*range(6), *range(4)]])
    joined = model(tokens, document_ids_BS=documents, position_ids_BS=positions)
    assert close(joined[:, :6], model(tokens[:, :6]))
    assert close(joined[:, 6:], model(tokens[:, 6:]))


def test_a_full_cache_and_a_foreign_batch_are_refused() -> None:
    model, cache = build("plain"), Cache(1, 4, 4)
    with pytest.raises(DataError, match="longer than its cache"):
        model(random_tokens(1, 5), cache=cache)
    with pytest.raises(DataError, match="another batch"):
        model(random_tokens(2, 1), cache=cache)
    with pytest.raises(DataError, match="cannot be fed in pieces"):
        model(random_tokens(1, 2), document_ids_BS=torch.zeros(1, 2), cache=cache)


def row_of(neighbors: Neighbors, row: int, chunks: int) -> Neighbors:
    return Neighbors(neighbors.tokens_BCKR[row : row + 1, :chunks], neighbors.mask_BCKR[row : row + 1, :chunks])


def row_slice(neighbors: Neighbors, first_chunk: int) -> Neighbors:
    return Neighbors(neighbors.tokens_BCKR[:, first_chunk:], neighbors.mask_BCKR[:, first_chunk:])


def completed(neighbors: Neighbors, starts: list[int], stops: list[int]) -> Neighbors | None:
    """For each row the chunks that end in [start, stop), first in its row; rows with fewer are filled up."""
    spans = [(start // 4, stop // 4) for start, stop in zip(starts, stops, strict=True)]
    most = max(last - first for first, last in spans)
    if most == 0:
        return None
    tokens = torch.zeros(len(spans), most, *neighbors.tokens_BCKR.shape[2:], dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (first, last) in enumerate(spans):
        tokens[row, : last - first] = neighbors.tokens_BCKR[row, first:last]
        mask[row, : last - first] = neighbors.mask_BCKR[row, first:last]
    return Neighbors(tokens, mask)
