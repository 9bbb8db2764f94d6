"""Which decoder layers each pipeline stage holds: as even as can be by multiply-adds, or as the user says.

The neighbour encoder runs inside the first retrieval layer, so both stay together. The embedding goes with the first
layer, the head with the last. A stage that needs the token embedding without being the first (the encoder's, and the
last one when the output is tied) holds a replica, whose gradient is summed over the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, islice

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig, parse_layout, virtual_stages
from megatron_retro.config.settings import Settings
from megatron_retro.model.costs import ENCODER, HEAD, model_costs
from megatron_retro.runtime.console import readable_count, render_table


@dataclass(frozen=True)
class StagePart:
    """What one stage holds."""

    index: int
    num_stages: int
    layers: range
    embedding: bool
    encoder: bool
    retrieves: bool
    sends_neighbors: bool
    receives_neighbors: bool

    @property
    def first(self) -> bool:
        """Tokens come in here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Losses come out here."""
        return self.index == self.num_stages - 1


def stage_parts(settings: Settings, seq_length: int) -> tuple[StagePart, ...]:
    """Every stage in order."""
    model, retro, parallel = settings[ModelConfig], settings[RetroConfig], settings[ParallelConfig]
    num_stages = parallel.pipeline_model_parallel_size * virtual_stages(settings)
    if parallel.pipeline_layout is not None:
        counts = parse_layout(parallel.pipeline_layout)
    else:
        counts = best_partition(layer_costs(model, retro, seq_length), num_stages)
    return parts_of_counts(model, retro, counts)


def parts_of_counts(model: ModelConfig, retro: RetroConfig, counts: Sequence[int]) -> tuple[StagePart, ...]:
    """The stages of a layout given as decoder layers per stage."""
    retrieval = [number - 1 for number in retro.retrieval_layers(model.num_layers)]
    first, last = min(retrieval, default=-1), max(retrieval, default=-1)
    tied = not model.untie_embeddings_and_output_weights
    parts, start = [], 0
    for index, count in enumerate(counts):
        layers = range(start, start + count)
        start += count
        encoder = first in layers
        parts.append(
            StagePart(
                index=index,
                num_stages=len(counts),
                layers=layers,
                embedding=index == 0
                or (tied and index == len(counts) - 1)
                or (encoder and not retro.retro_encoder_own_embedding),
                encoder=encoder,
                retrieves=any(layer in layers for layer in retrieval),
                sends_neighbors=bool(retrieval) and first < start <= last,
                receives_neighbors=bool(retrieval) and first < layers.start <= last,
            )
        )
    return tuple(parts)


def layer_costs(model: ModelConfig, retro: RetroConfig, seq_length: int) -> tuple[float, ...]:
    """Multiply-adds of each decoder layer with what goes with it: encoder, head."""
    costs = model_costs(model, retro, seq_length)
    per_layer = [costs.named(f"layers.{layer}").multiply_adds for layer in range(model.num_layers)]
    retrieval = retro.retrieval_layers(model.num_layers)
    if retrieval:
        per_layer[min(retrieval) - 1] += costs.named(ENCODER).multiply_adds
    per_layer[-1] += costs.named(HEAD).multiply_adds
    return tuple(per_layer)


@cache
def best_partition(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Sizes of contiguous groups, none empty, whose largest sum is as small as it can be (then the sum of squares)."""
    sums = [0.0, *accumulate(costs)]
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}  # by the layers that are shared out
    for stage in range(1, num_stages + 1):
        ends = range(stage, len(costs) - (num_stages - stage) + 1)
        best = {end: min(_with_group(best, sums, end)) for end in ends}
    return best[len(costs)][2]


def _with_group(
    best: Mapping[int, tuple[float, float, tuple[int, ...]]], sums: Sequence[float], end: int
) -> Iterator[tuple[float, float, tuple[int, ...]]]:
    """Largest sum, sum of squares and sizes with one more group that ends here, for every place where it may start."""
    for start, (largest, squares, sizes) in best.items():
        if start < end:
            group = sums[end] - sums[start]
            yield max(largest, group), squares + group * group, (*sizes, end - start)


def improved_partition(
    sizes: Sequence[int], seconds: Callable[[tuple[int, ...]], float], tries: int
) -> tuple[int, ...]:
    """Move a layer from one stage to another for as long as that takes less time, and tries are left."""
    best, least = tuple(sizes), seconds(tuple(sizes))
    moves = [(giver, taker) for giver in range(len(best)) for taker in range(len(best)) if giver != taker]
    since_improved = 0
    for giver, taker in islice(cycle(moves), tries):
        if best[giver] > 1:
            moved = tuple(size - (at == giver) + (at == taker) for at, size in enumerate(best))
            taken = seconds(moved)
            if taken < least * (1 - 1e-6):
                best, least, since_improved = moved, taken, 0
        since_improved += 1
        if since_improved > len(moves):
            break
    return best


def describe_stages(settings: Settings, seq_length: int) -> str:
    """The partition as a table."""
    model, retro = settings[ModelConfig], settings[RetroConfig]
    costs = layer_costs(model, retro, seq_length)
    rows = []
    for part in stage_parts(settings, seq_length):
        extras = [
            "embedding" if part.first else "embedding replica" if part.embedding else "",
            "encoder" if part.encoder else "",
            "head" if part.last else "",
        ]
        share = sum(costs[layer] for layer in part.layers)
        rows.append(
            (
                part.index,
                f"{part.layers.start + 1}-{part.layers.stop}",
                ", ".join(extra for extra in extras if extra) or "-",
                readable_count(share),
                f"{share / sum(costs):.1%}",
                "hidden + neighbours" if part.sends_neighbors else "-" if part.last else "hidden",
            )
        )
    return render_table(("stage", "layers", "with", "multiply-adds/token", "share", "sends"), rows)
