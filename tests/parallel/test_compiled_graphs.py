"""A compiled layer follows whatever changes between two calls, as an eager one does: no graph serves what it is not of.

Guards ask that before each call, and a layer that is called often should ask little (`ops/compilation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.model.layers import DecoderLayer
from megatron_retro.model.retro import Retro
from megatron_retro.ops import compilation
from megatron_retro.ops.linear import linear
from megatron_retro.parallel.layer_transforms import compile_layers
from megatron_retro.testing.tiny_models import random_model, random_tokens, tiny_model, tiny_retro


def first_layer(model: Retro) -> DecoderLayer:
    layer = model.layers["0"]
    assert isinstance(layer, DecoderLayer)
    return layer


def twice(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return 2 * linear(hidden, weight, bias)


def freeze(model: Retro) -> None:
    first_layer(model).attention.requires_grad_(False)


def train_again(model: Retro) -> None:
    model.requires_grad_()


def multiply_otherwise(model: Retro) -> None:
    first_layer(model).mlp.up.multiply = twice


def norm_otherwise(model: Retro) -> None:
    first_layer(model).mlp_norm.epsilon = 0.5


def rotate_otherwise(model: Retro) -> None:
    first_layer(model).attention.interleaved = True


def look_back_less(model: Retro) -> None:
    first_layer(model).window, model.contexts.windows = 3, (3,)


def compute_in_double(model: Retro) -> None:
    model.double()


CHANGES: Sequence[Callable[[Retro], None]] = (
    freeze,
    train_again,
    multiply_otherwise,
    norm_otherwise,
    rotate_otherwise,
    look_back_less,
    compute_in_double,
)


def losses_and_gradients(model: Retro, length: int, **inputs: Any) -> list[Tensor | None]:
    model.zero_grad()
    tokens = random_tokens(2, length)
    losses = model(tokens, labels_BS=tokens, **inputs)
    losses.sum().backward()
    return [losses.detach(), *(parameter.grad for parameter in model.parameters())]


def test_a_graph_serves_only_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_run = 0

    def backend(graph: Callable[..., Any], _: Sequence[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal graphs_run
            graphs_run += 1
            return graph(*arguments)

        return run

    monkeypatch.setattr(compilation, "BACKEND", backend)
    config = tiny_model(num_layers=1, swiglu=True, disable_bias_linear=True)
    models = [random_model(config, tiny_retro(retro_add_retriever=False, retro_layers=None)).train() for _ in range(2)]
    compile_layers(models[1])
    steps: list[tuple[Callable[[Retro], Any], int, dict[str, Any]]] = [(Retro.train, 8, {}), (Retro.train, 6, {})]
    steps += [(Retro.train, 8, {"padding_mask_BS": torch.arange(8)[None].expand(2, -1) < torch.tensor([[8], [5]])})]
    documents = {"document_ids_BS": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])}
    steps += [(Retro.train, 8, documents)]
    steps += [(change, 8, {}) for change in CHANGES]
    before: list[Tensor | None] = []
    for number, (change, length, inputs) in enumerate(steps, 1):
        for model in models:
            change(model)
        eager, compiled = (losses_and_gradients(model, length, **inputs) for model in models)
        assert graphs_run == number
        assert any(_differ(one, other) for one, other in zip(eager, before or [None] * len(eager), strict=True))
        assert not any(_differ(one, other) for one, other in zip(eager, compiled, strict=True)), change.__name__
        before = eager


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other))
