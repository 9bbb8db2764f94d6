"""Activation recomputation: what a layer's backward computes again instead of keeping.

`full` keeps a layer's inputs only, and covers the neighbour encoder as part of the first retrieval layer, whose call
encodes. `selective` keeps what matrix products and attention gave and computes the rest again (norms, activations,
rotations, residual sums), in every layer of decoder and encoder. The layer that encodes neighbours does so part by
part (attention, cross-attention, MLP), because its call runs units of FSDP2 inside, which torch cannot replay
selectively. Both cover cross-attention, and both repeat a layer's collectives of the tensor axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron_retro.model.retro import Retro

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product",
    "aten::_scaled_mm",
    "megatron_retro::chunked_cross_attention",
)


def recompute_layers(model: Retro, granularity: str) -> None:
    """Let every layer recompute; its parameters, hooks and name stay."""
    if granularity == "full":
        for layer in model.layers.values():
            _recompute(layer, None)
    if granularity == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        for name, layer in model.layers.items():
            for part in _parts(layer) if int(name) == model.first_retrieval_layer else [layer]:
                _recompute(part, contexts)
        for layer in [] if model.encoder is None else model.encoder.layers.values():
            _recompute(layer, contexts)


def _parts(layer: nn.Module) -> list[nn.Module]:
    """What a decoder layer calls beside its norms, whose outputs these calls keep."""
    return [layer.get_submodule(name) for name in ("attention", "cross_attention", "mlp")]


def _recompute(layer: nn.Module, contexts: Callable[[], Any] | None) -> None:
    vars(layer)["forward"] = _recomputing(layer, contexts)


def _recomputing(layer: nn.Module, contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    plain = layer.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        options: dict[str, Any] = {"use_reentrant": False}
        if contexts is not None:
            options["context_fn"] = contexts
        return checkpoint(plain, *arguments, **options, **keywords)

    return forward


def _policy(context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    name = str(getattr(operator, "name", lambda: operator)())
    return CheckpointPolicy.MUST_SAVE if keeps(name) else CheckpointPolicy.PREFER_RECOMPUTE


def keeps(operator_name: str) -> bool:
    """Whether selective recomputation keeps what this operator gives."""
    return operator_name.startswith(_KEPT)
