"""The pipeline's partition: as even as any can be, complete, and replicas where they are needed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.parallel.partition import (
    best_partition,
    describe_stages,
    layer_costs,
    parts_of_counts,
    stage_parts,
)
from megatron_retro.testing.layouts import tiny_settings


@hypothesis_settings(deadline=None, max_examples=60)
@given(costs=strategies.lists(strategies.integers(1, 30), min_size=1, max_size=9), data=strategies.data())
def test_no_partition_has_a_smaller_largest_stage(costs: list[int], data: strategies.DataObject) -> None:
    stages = data.draw(strategies.integers(1, len(costs)))
    counts = best_partition(tuple(float(cost) for cost in costs), stages)

    def largest(sizes: tuple[int, ...]) -> int:
        ends = list(itertools.accumulate(sizes))
        return max(sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True))

    borders = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [tuple(right - left for left, right in itertools.pairwise((0, *cut, len(costs)))) for cut in borders]
    assert counts in every
    assert largest(counts) == min(map(largest, every))


def test_the_encoder_weighs_on_its_layer() -> None:
    """Beside the encoder's eight layers' worth of work a stage gets fewer decoder layers."""
    settings = tiny_settings(num_layers=48, retro_layers=tuple(range(9, 49, 3)), pipeline_model_parallel_size=8)
    parts = stage_parts(settings, 32)
    encoder = next(part for part in parts if part.encoder)
    assert 8 in encoder.layers
    assert len(encoder.layers) < max(len(part.layers) for part in parts)
    costs = layer_costs(settings[ModelConfig], settings[RetroConfig], 32)
    assert costs[8] > 3 * costs[7]


def test_layers_are_shared_out_whole_and_in_order() -> None:
    parts = stage_parts(tiny_settings(pipeline_layout="1,3", pipeline_model_parallel_size=2), 32)
    assert [list(part.layers) for part in parts] == [[0], [1, 2, 3]]
    assert [part.first for part in parts] == [True, False]
    assert [part.last for part in parts] == [False, True]


@pytest.mark.parametrize(
    ("retrieval", "sends", "receives"),
    [
        ((2, 4), [False, True, True, False], [False, False, True, True]),
        ((1, 2), [True, False, False, False], [False, True, False, False]),
        ((4,), [False] * 4, [False] * 4),
        ((1, 4), [True, True, True, False], [False, True, True, True]),
    ],
)
def test_neighbours_cross_only_the_borders_between_encoder_and_last_reader(
    retrieval: tuple[int, ...], sends: list[bool], receives: list[bool]
) -> None:
    model = ModelConfig(num_layers=4, vocab_size=8)
    parts = parts_of_counts(model, RetroConfig(retro_add_retriever=True, retro_layers=retrieval), (1, 1, 1, 1))
    assert [part.sends_neighbors for part in parts] == sends
    assert [part.receives_neighbors for part in parts] == receives


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_replicas_of_the_embedding(tied: bool, own: bool) -> None:
    model = ModelConfig(num_layers=4, vocab_size=8, untie_embeddings_and_output_weights=not tied)
    retro = RetroConfig(retro_add_retriever=True, retro_layers=(2,), retro_encoder_own_embedding=own)
    parts = parts_of_counts(model, retro, (1, 1, 1, 1))
    assert [part.embedding for part in parts] == [True, not own, False, tied]


def test_the_partition_is_told() -> None:
    table = describe_stages(tiny_settings(pipeline_model_parallel_size=2), 32)
    assert "embedding replica, head" in table and "hidden + neighbours" in table
