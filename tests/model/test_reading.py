"""What was attended to and what it was worth equal the definition, weight by weight, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_retro.model.reading import read_neighbors
from megatron_retro.testing.slow_retro import SlowRetro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro


class Watched(SlowRetro):
    """Keeps the weights of every cross-attention of the decoder, one list of heads for each reading token."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read: list[tuple[str, list[Any]]] = []
        self.watching = False

    def _cross(self, name: str, *arguments: Any) -> Any:
        self.watching = name.startswith("layers.")
        if self.watching:
            self.read.append((name, []))
        result = super()._cross(name, *arguments)
        self.watching = False
        return result

    def _weighted(self, scores: list[float], values: list[Any], size: int) -> Any:
        if self.watching:
            weights = np.exp(np.array(scores) - max(scores)) if scores else np.zeros(0)
            self.read[-1][1].append(weights / weights.sum() if scores else weights)
        return super()._weighted(scores, values, size)


@pytest.mark.parametrize(
    "retriever",
    [
        {},
        {"retro_gate_type": "heads", "retro_neighbor_positions": "continued"},
        {"retro_neighbor_positions": "relative", "retro_gate_type": "scalar"},
    ],
)
def test_attention_and_worth_equal_the_definition(retriever: dict[str, Any]) -> None:
    model = tiny_model(num_layers=5, group_query_attention=True, num_query_groups=2)
    retro = tiny_retro(**retriever)
    built = random_model(model, retro, dtype=torch.float64)
    tokens, neighbors = random_tokens(1, 14), random_neighbors(1, 3)
    neighbors.mask_BCKR[0, 1, 1] = False
    reading = read_neighbors(built, tokens[0], neighbors)

    slow = Watched(built.state_dict(), model, retro)
    asked, mask = neighbors.tokens_BCKR[0].tolist(), neighbors.mask_BCKR[0]
    losses = token_losses(slow.logits(tokens[0, :-1].tolist(), asked, mask), tokens[0])
    expected = np.zeros(mask.shape)
    size, places = retro.retro_chunk_length, {2: 0, 5: 0}
    for name, heads in slow.read:
        layer = int(name.split(".")[1]) + 1
        chunk = places[layer] // size
        places[layer] += 1
        for head, weights in enumerate(heads):
            expected[chunk][mask[chunk].numpy()] += weights * abs(gate(built, layer, head))
    assert np.allclose(reading.attention_CKR.numpy(), expected, atol=1e-9)

    assert reading.worth_CK[1, 1] == 0.0
    without = mask.clone()
    without[0, 1] = False
    more = token_losses(slow.logits(tokens[0, :-1].tolist(), asked, without), tokens[0])
    assert math.isclose(reading.worth_CK[0, 1].item(), sum((more - losses)[3:7]), abs_tol=1e-5)


def gate(built: Any, layer: int, head: int) -> float:
    """What the gate of a layer's head lets through."""
    part = built.layers[str(layer - 1)].cross_attention.gate
    factors = torch.ones(1) if part is None else part().detach().flatten()
    return float(factors[head if len(factors) > 1 else 0])


def token_losses(logits: Any, tokens: torch.Tensor) -> Any:
    """[S] from the definition's logits."""
    scores = torch.as_tensor(np.array(logits))
    return torch.nn.functional.cross_entropy(scores, tokens[1:], reduction="none").numpy()
