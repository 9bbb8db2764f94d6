"""Does the model use its neighbours? The same tokens with real, no, random and shuffled neighbours.

Differences are paired: each is taken within one sample. Intervals come from drawing documents with replacement: samples
of one document gain alike, so samples drawn one by one would promise more than the text can tell.
Positions before the first that may see a neighbour (m - 1) have a difference of exactly zero and are left out.

Beside the losses, cross-attention is watched while the model is evaluated: how much it adds to the residual, how open
its gate is. The hooks only read; they are there for the length of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_retro.data.neighbor_transforms import VARIANTS
from megatron_retro.runtime.run_records import LayerUse, RetrievalHealth
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio
from megatron_retro.training.evaluation import TokenLosses

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
    by_variant: Mapping[str, TokenLosses],
    chunk_length: int,
    layers: tuple[LayerUse, ...],
    seed: int,
    documents: NDArray[np.int64] | None = None,
) -> RetrievalHealth:
    """Compare the variants on the tokens that may see neighbours; samples without documents are drawn one by one."""
    real = by_variant["real"]
    reach = real.mask.copy()
    reach[:, : chunk_length - 1] = False
    others = [variant for variant in VARIANTS if variant != "real" and variant in by_variant]
    tokens = reach.sum(1)

    def interval(values: NDArray[Any]) -> Interval:
        return bootstrap_ratio(values.sum(1, where=reach, dtype=np.float64), tokens, seed=seed, units=documents)

    losses = {variant: interval(measured.losses) for variant, measured in by_variant.items()}
    excess, by_position = {}, {}
    for variant in others:
        difference = by_variant[variant].losses.astype(np.float64) - real.losses
        excess[variant] = interval(difference)
        by_position[variant] = _by_position(difference, reach, chunk_length)
    return RetrievalHealth(losses, excess, by_position, layers)


def _by_position(difference: NDArray[Any], reach: NDArray[np.bool_], chunk_length: int) -> list[float]:
    """Mean difference at each place of the attending chunk (its first place is the last token of a chunk)."""
    positions = np.broadcast_to(np.arange(difference.shape[1]), difference.shape)
    place = (positions + 1) % chunk_length
    sums = np.bincount(place[reach], weights=difference[reach], minlength=chunk_length)
    counts = np.bincount(place[reach], minlength=chunk_length)
    return [float(total / count) if count else 0.0 for total, count in zip(sums, counts, strict=True)]


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
            LayerUse(layer, output**0.5 / max(residual**0.5, 1e-12), rates / count if count else None)
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
