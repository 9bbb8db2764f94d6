"""Does the model use its neighbours? The same tokens with real, no, random and shuffled neighbours.

Differences are paired: each is taken within one sample. Intervals come from drawing documents with replacement: samples
of one document gain alike, so samples drawn one by one would promise more than the text can tell.
Positions before the first that may see a neighbour (m - 1) have a difference of exactly zero and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.neighbor_variants import VARIANTS
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio
from megatron_retro.training.evaluation import TokenLosses

DEAD_GATE_RATE = 0.01
DEAD_NORM_SHARE = 1e-4


@dataclass(frozen=True)
class LayerUse:
    """How loud the cross-attention of one layer is, and what its gate does."""

    layer: int
    output_norm: float
    residual_norm: float
    gate_rate: float | None

    @property
    def share(self) -> float:
        """Norm of what neighbours add against the norm of what they are added to."""
        return self.output_norm / max(self.residual_norm, 1e-12)


@dataclass(frozen=True)
class RetrievalHealth:
    """Losses per variant, what each costs more than real neighbours, where in the chunk, and per layer."""

    losses: Mapping[str, Interval]
    excess: Mapping[str, Interval]
    excess_by_position: Mapping[str, list[float]]
    layers: tuple[LayerUse, ...]

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "losses": {name: interval.as_list() for name, interval in self.losses.items()},
            "excess": {name: interval.as_list() for name, interval in self.excess.items()},
            "excess_by_position": dict(self.excess_by_position),
            "layers": [{"layer": use.layer, "share": use.share, "gate_rate": use.gate_rate} for use in self.layers],
        }

    def alarms(self) -> tuple[str, ...]:
        """Sentences about a model that does not use retrieval."""
        found = []
        for variant, words in (
            ("random", "random neighbours are not clearly worse than real ones"),
            ("none", "retrieval off is not clearly worse than on"),
        ):
            if not self.excess[variant].above_zero:
                found.append(f"{words}: excess loss {self.excess[variant]} nats per token")
        for use in self.layers:
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
