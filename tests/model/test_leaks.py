"""Neighbours of chunk u touch nothing before position (u+1)*m - 1, and something from there on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

LENGTH = 22
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "relative": {"retro_neighbor_positions": "relative"},
    "none": {"retro_neighbor_positions": "none"},
    "adaptive": {"retro_gate_type": "adaptive"},
    "every layer": {"retro_layers": (1, 2, 3, 4, 5, 6)},
}


def built(variant: str) -> Retro:
    return random_model(tiny_model(), tiny_retro(**VARIANTS[variant]))


def changed(neighbors: Neighbors, chunk: int) -> Neighbors:
    """Another set of tokens, and another mask, for one chunk."""
    tokens, mask = neighbors.tokens_BCKR.clone(), neighbors.mask_BCKR.clone()
    tokens[:, chunk] = (tokens[:, chunk] + 7) % 61
    mask[:, chunk] = True
    return Neighbors(tokens, mask)


@pytest.mark.parametrize("length", [LENGTH, 24])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbors_of_a_chunk_change_no_earlier_bit(variant: str, length: int) -> None:
    model, tokens = built(variant), random_tokens(2, length)
    neighbors = random_neighbors(2, length // 4)
    with torch.no_grad():
        before = model(tokens, neighbors)
        for chunk in range(length // 4):
            after = model(tokens, changed(neighbors, chunk))
            first = (chunk + 1) * 4 - 1
            assert torch.equal(after[:, :first], before[:, :first])
            assert not torch.equal(after[:, first], before[:, first])
            differs = (after[:, first:] != before[:, first:]).any(-1)
            assert differs.all(), "every later token reads, at least through self-attention"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_flows_back_from_before_the_boundary(variant: str) -> None:
    retro = tiny_retro(retro_encoder_own_embedding=True, **VARIANTS[variant])
    model, tokens = random_model(tiny_model(), retro), random_tokens(1, LENGTH)
    chunks = LENGTH // 4
    own_tokens = torch.arange(chunks).view(1, chunks, 1, 1).expand(1, chunks, 2, 8) + 1
    neighbors = Neighbors(own_tokens, torch.ones_like(own_tokens, dtype=torch.bool))
    assert model.encoder is not None and model.encoder.embedding is not None
    table = model.encoder.embedding.word.weight
    logits = model(tokens, neighbors)
    for position in range(LENGTH):
        (gradient,) = torch.autograd.grad(
            logits[0, position].square().sum(), table, retain_graph=True, allow_unused=True
        )
        touched = set() if gradient is None else set((gradient != 0).any(-1).nonzero().flatten().tolist())
        assert touched == {chunk + 1 for chunk in range(chunks) if position >= (chunk + 1) * 4 - 1}


def test_a_later_token_changes_no_earlier_logit() -> None:
    model, tokens, neighbors = built("adaptive"), random_tokens(1, LENGTH), random_neighbors(1, LENGTH // 4)
    with torch.no_grad():
        before = model(tokens, neighbors)
        for position in range(LENGTH):
            other = tokens.clone()
            other[0, position] = (other[0, position] + 3) % 61
            after = model(other, neighbors)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


def test_neighbors_of_a_short_last_chunk_are_not_asked_for() -> None:
    model, tokens = built("rotary"), random_tokens(1, LENGTH)
    neighbors = random_neighbors(1, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens, neighbors), model(tokens, neighbors.first_chunks(5)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_tokens_have_no_influence(variant: str) -> None:
    model, tokens, neighbors = built(variant), random_tokens(2, LENGTH), random_neighbors(2, 5)
    garbage = torch.where(neighbors.mask_BCKR, neighbors.tokens_BCKR, 60 - neighbors.tokens_BCKR)
    wild = torch.where(neighbors.mask_BCKR, neighbors.tokens_BCKR, -1)
    with torch.no_grad():
        logits = model(tokens, neighbors)
        assert torch.equal(model(tokens, replace(neighbors, tokens_BCKR=garbage)), logits)
        assert torch.equal(model(tokens, replace(neighbors, tokens_BCKR=wild)), logits)


def test_an_absent_neighbor_is_as_if_there_were_one_less() -> None:
    model, tokens, neighbors = built("rotary"), random_tokens(2, LENGTH), random_neighbors(2, 5, 3)
    mask = neighbors.mask_BCKR.clone()
    mask[:, :, 2] = False
    fewer = Neighbors(neighbors.tokens_BCKR[:, :, :2], mask[:, :, :2])
    with torch.no_grad():
        without = model(tokens, Neighbors(neighbors.tokens_BCKR, mask))
        assert torch.allclose(without, model(tokens, fewer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_neighbors_absent_is_the_gpt(variant: str) -> None:
    model, tokens, neighbors = built(variant), random_tokens(2, LENGTH), random_neighbors(2, 5, present=0.0)
    model.train()
    logits = model(tokens, neighbors)
    assert torch.equal(logits, model(tokens))
    logits.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_one_chunk_without_neighbors_reads_nothing_at_its_positions() -> None:
    model, tokens, neighbors = (
        random_model(tiny_model(), tiny_retro(retro_layers=(6,))),
        random_tokens(1, LENGTH),
        random_neighbors(1, 5),
    )
    neighbors.mask_BCKR[0, 2] = False
    with torch.no_grad():
        same = (model(tokens, neighbors) == model(tokens)).all(-1)[0]
    assert same.tolist() == [position < 3 or 11 <= position < 15 for position in range(LENGTH)]


@pytest.mark.parametrize("neighbors", [None, random_neighbors(2, 5, 0), random_neighbors(2, 5, 2, 0)])
def test_no_neighbors_is_the_gpt(neighbors: Neighbors | None) -> None:
    retro, gpt = built("rotary"), Retro(tiny_model())
    weights = retro.state_dict()
    gpt.load_state_dict({name: weights[name] for name in gpt.state_dict()})
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(retro(tokens, neighbors), gpt(tokens))


def test_a_shut_gate_is_the_gpt_and_does_no_work() -> None:
    model = random_model(tiny_model(), tiny_retro(retro_attention_gate=0.0))
    tokens = random_tokens(2, LENGTH)
    assert model.encoder is not None
    model.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    with torch.no_grad():
        assert torch.equal(model(tokens, random_neighbors(2, 5)), model(tokens))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_sequences_shorter_than_a_chunk(length: int) -> None:
    model, tokens = built("rotary"), random_tokens(2, length)
    neighbors = random_neighbors(2, 1)
    with torch.no_grad():
        logits, plain = model(tokens, neighbors), model(tokens)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[:, :3], plain[:, :3])
    assert length < 4 or not torch.equal(logits[:, 3], plain[:, 3])


def test_too_few_chunks_of_neighbors_are_refused() -> None:
    with pytest.raises(ValueError, match="5 chunks are complete"):
        built("rotary")(random_tokens(1, LENGTH), random_neighbors(1, 4))
