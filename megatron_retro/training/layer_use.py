"""Watches cross-attention while a model is evaluated: how much it adds to the residual, how open its gate is.

Hooks only read; they are there for the length of the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_retro.training.health import LayerUse


@dataclass
class _Sums:
    """Running sums of one layer."""

    output: float = 0.0
    residual: float = 0.0
    rates: float = 0.0
    rate_count: int = 0


@dataclass
class LayerWatch:
    """What the hooks of this rank saw."""

    sums: dict[int, _Sums] = field(default_factory=dict)

    def measured(self, group: dist.ProcessGroup | None) -> tuple[LayerUse, ...]:
        """Use of every layer of the whole model. Every rank of `group` calls it."""
        mine = {layer: (sums.output, sums.residual, sums.rates, sums.rate_count) for layer, sums in self.sums.items()}
        everyone: list[Any] = [mine]
        if group is not None and dist.get_world_size(group) > 1:
            everyone = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, mine, group=group)
        totals: dict[int, list[float]] = {}
        for of_rank in everyone:
            for layer, values in of_rank.items():
                held = totals.setdefault(layer, [0.0] * 4)
                totals[layer] = [one + other for one, other in zip(held, values, strict=True)]
        return tuple(
            LayerUse(layer, output**0.5, residual**0.5, rates / count if count else None)
            for layer, (output, residual, rates, count) in sorted(totals.items())
        )


@contextmanager
def watched_layers(module: nn.Module) -> Iterator[LayerWatch]:
    """Watch every decoder layer with cross-attention while the block runs."""
    watch = LayerWatch()
    handles: list[RemovableHandle] = []
    for name, part in module.named_modules():
        words = name.split(".")
        if words[-1] == "cross_attention" and words[0] == "layers":
            parent = module.get_submodule(".".join(words[:-1]))
            handles += _hooks(watch.sums.setdefault(int(words[-2]) + 1, _Sums()), parent, part)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _hooks(sums: _Sums, layer: nn.Module, cross_attention: nn.Module) -> list[RemovableHandle]:
    def after_norm(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        sums.residual += _square(output[1])

    def after_attention(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        sums.output += _square(output)
        rates = getattr(getattr(module, "gate", None), "last_rates", None)
        if isinstance(rates, Tensor):
            sums.rates += float(rates.double().sum())
            sums.rate_count += rates.numel()

    norm = layer.get_submodule("cross_norm")
    return [norm.register_forward_hook(after_norm), cross_attention.register_forward_hook(after_attention)]


def _square(tensor: Any) -> float:
    return float(tensor.detach().double().square().sum()) if isinstance(tensor, Tensor) else 0.0
