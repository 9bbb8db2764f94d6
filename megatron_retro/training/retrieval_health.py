"""Does the model use its neighbours? The same tokens with real, no, random and shuffled neighbours.

Differences are paired: each is taken within one sample. Intervals come from drawing documents with replacement: samples
of one document gain alike, so samples drawn one by one would promise more than the text can tell.
Positions before the first that may see a neighbour (m - 1) have a difference of exactly zero and are left out.

Beside the losses, cross-attention is watched while the model is evaluated: how much it adds to the residual, how open
its gate is. The hooks only read; they are there for the length of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_retro.parallel.gathering import sum_on_first
from megatron_retro.runtime.run_records import LayerUse, RetrievalHealth
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio
from megatron_retro.training.evaluation import SampleSums

DEAD_GATE_RATE = 0.01
DEAD_NORM_SHARE = 1e-4


def alarms(health: RetrievalHealth) -> tuple[str, ...]:
    """Sentences about a model that does not use retrieval."""
    found = []
    for variant, words in (
        ("random", "random neighbours are not clearly worse than real ones"),
        ("none", "retrieval off is not clearly worse than on"),
    ):
        if not health.excess[variant].above_zero:
            found.append(f"{words}: excess loss {health.excess[variant]} nats per token")
    for use in health.layers:
        if use.gate_rate is not None and use.gate_rate < DEAD_GATE_RATE:
            found.append(f"the gate of layer {use.layer} is shut: mean rate {use.gate_rate:.2e}")
        elif use.share < DEAD_NORM_SHARE:
            found.append(f"the cross-attention of layer {use.layer} adds {use.share:.1e} of its residual's norm")
    return tuple(found)


def retrieval_health(
    sums: SampleSums,
    layers: tuple[LayerUse, ...],
    seed: int,
    documents: NDArray[np.int64] | None = None,
) -> RetrievalHealth:
    """Compare the variants on the tokens that may see neighbours; samples without documents are drawn by their text.

    A small set of conversations is read more than once: the same row again is no further observation.
    """
    tokens: NDArray[Any] = sums.reached_N.numpy()
    units = sums.texts_N.numpy() if documents is None else documents

    def interval(values: Tensor) -> Interval:
        return bootstrap_ratio(values.numpy(), tokens, seed=seed, units=units)

    places = sums.places_M.clamp(min=1.0)
    return RetrievalHealth(
        {variant: interval(values) for variant, values in sums.reached_losses.items()},
        {variant: interval(values) for variant, values in sums.excess.items()},
        {variant: (values / places).tolist() for variant, values in sums.excess_by_place.items()},
        layers,
    )


@dataclass
class LayerWatch:
    """What the hooks of this rank saw: of each layer of the whole model the squares of what its cross-attention adds
    and of what that is added to, the gate's rates and how many there were. Sums stay where they were made."""

    num_layers: int
    sums: dict[int, Tensor | None] = field(default_factory=dict)

    def add(self, layer: int, column: int, value: Tensor) -> None:
        held = self.sums[layer]
        if held is None:
            held = self.sums[layer] = torch.zeros(4, dtype=torch.float64, device=value.device)
        held[column] += value

    def measured(self, device: torch.device) -> tuple[LayerUse, ...] | None:
        """Use of every layer of the whole model, on the first rank; None on others. Every rank calls it."""
        table = torch.zeros(self.num_layers, 5, dtype=torch.float64, device=device)
        for layer, held in self.sums.items():
            if held is not None:
                table[layer - 1, :4] = held
            table[layer - 1, 4] = 1.0
        total = sum_on_first(table)
        if total is None:
            return None
        return tuple(
            LayerUse(layer, output**0.5 / max(residual**0.5, 1e-12), rates / count if count else None)
            for layer, (output, residual, rates, count, held) in enumerate(total.tolist(), 1)
            if held
        )


@contextmanager
def watched_layers(module: nn.Module, num_layers: int) -> Iterator[LayerWatch]:
    """Watch every decoder layer with cross-attention while the block runs."""
    watch = LayerWatch(num_layers)
    handles: list[RemovableHandle] = []
    for name, part in module.named_modules():
        words = name.split(".")
        if words[-1] == "cross_attention" and words[0] == "layers":
            layer = int(words[-2]) + 1
            watch.sums[layer] = None
            handles += _hooks(partial(watch.add, layer), module.get_submodule(".".join(words[:-1])), part)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _hooks(add: Callable[[int, Tensor], None], layer: nn.Module, cross_attention: nn.Module) -> list[RemovableHandle]:
    def after_norm(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _add_square(1, output[1])

    def after_attention(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _add_square(0, output)
        rates = getattr(getattr(module, "gate", None), "last_rates", None)
        if isinstance(rates, Tensor):
            add(2, rates.detach().double().sum())
            add(3, torch.tensor(rates.numel(), dtype=torch.float64))

    def _add_square(column: int, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            add(column, tensor.detach().double().square().sum())

    norm = layer.get_submodule("cross_norm")
    return [norm.register_forward_hook(after_norm), cross_attention.register_forward_hook(after_attention)]
