"""Intervals, variants of neighbours and alarms, against cases whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_retro.data.neighbor_transforms import with_variant
from megatron_retro.microbatch import Array, Microbatch, Neighbors
from megatron_retro.runtime.run_records import LayerUse, RetrievalHealth
from megatron_retro.runtime.statistics import bootstrap_ratio
from megatron_retro.training.evaluation import SampleSums, joined, packed, packed_length, token_sums
from megatron_retro.training.retrieval_health import alarms, retrieval_health

CHUNK = 8


def batches(count: int = 3, size: int = 2, chunks: int = 4) -> list[Microbatch[Array]]:
    """Every neighbour token names its sample and chunk."""
    found = []
    for number in range(count):
        ids = np.arange(number * size, (number + 1) * size)
        names = ids[:, None] * 100 + np.arange(chunks)
        tokens = np.zeros((size, chunks * CHUNK), np.int32)
        neighbors = np.broadcast_to(names[:, :, None, None], (size, chunks, 2, 5)).copy()
        there = np.ones(tokens.shape, np.bool_)
        retrieved = Neighbors(neighbors, neighbors % 2 == 0)
        found.append(Microbatch(tokens, tokens, there, neighbors=retrieved, sample_ids_B=ids))
    return found


def names(found: list[Microbatch[Array]]) -> np.ndarray:
    return np.concatenate([batch.neighbors.tokens_BCKR[:, :, 0, 0] for batch in found])  # type: ignore[union-attr]


def test_variants_take_neighbors_from_where_they_say() -> None:
    real = batches()
    own = names(real)
    random = names(with_variant(real, "random", 0))
    assert (random // 100 != own // 100).all(), "random: always another sample"
    shuffled = names(with_variant(real, "shuffled", 0))
    assert (shuffled // 100 == own // 100).all() and (shuffled != own).all(), "shuffled: another chunk of the same"
    for batch in with_variant(real, "random", 0):
        assert batch.neighbors is not None
        assert np.array_equal(batch.neighbors.mask_BCKR, batch.neighbors.tokens_BCKR % 2 == 0), "masks move along"
    none = with_variant(real, "none", 0)
    assert all(batch.neighbors is None for batch in none)
    assert np.array_equal(names(with_variant(real, "random", 0)), random), "a pure function of the seed"


@pytest.mark.parametrize("variant", ["random", "shuffled"])
def test_what_a_sample_gets_does_not_depend_on_who_reads_it(variant: str) -> None:
    """Two data ranks with half of every batch each, and one with all of them."""
    together = batches(count=4, size=4)

    def read(numbers: Sequence[int]) -> Microbatch[Array]:
        return sliced(together, np.array(numbers))

    whole = names(with_variant(together, variant, 5, num_samples=16, read=read))
    for rank in range(2):
        share = [sliced([batch], batch.sample_ids_B[2 * rank : 2 * rank + 2]) for batch in together]
        ids = np.concatenate([batch.sample_ids_B for batch in share])
        assert np.array_equal(names(with_variant(share, variant, 5, num_samples=16, read=read)), whole[ids])


def test_random_neighbors_of_few_samples_do_not_walk_through_all() -> None:
    """A forward of many: drawing for each of them over the whole text would be quadratic."""
    real, total = batches(), 10**13

    def read(numbers: Sequence[int]) -> Microbatch[Array]:
        donors = sliced(real, np.zeros(len(numbers), np.int64))
        return replace(donors, sample_ids_B=np.array(numbers, np.int64))

    drawn = names(with_variant(real, "random", 0, num_samples=total, read=read))
    assert (drawn // 100 == 0).all(), "each from a donor that was read"


def sliced(found: list[Microbatch[Array]], ids: np.ndarray) -> Microbatch[Array]:
    joined = Microbatch.joined(found, np.concatenate)
    rows = [int(np.flatnonzero(joined.sample_ids_B == number)[0]) for number in ids]
    arrays = {name: array[rows] for name, array in joined.arrays().items()}
    return Microbatch.of_arrays(arrays, joined.sample_ids_B[rows])


def test_intervals_cover_the_truth_about_as_often_as_they_claim() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        weights = random.integers(1, 20, 60)
        values = random.normal(0.3, 1.0, 60)
        hits += (interval := bootstrap_ratio(values * weights, weights, seed=trial)).low < 0.3 < interval.high
    assert 0.88 * 200 <= hits <= 0.99 * 200


def test_what_is_common_to_a_document_is_not_counted_once_per_window() -> None:
    """Windows of one document share most of their gain: drawn one by one they promise more than the text can tell."""
    random = np.random.default_rng(0)
    hits = {"windows": 0, "documents": 0}
    for trial in range(200):
        documents = np.repeat(np.arange(40), random.integers(1, 20, 40))
        values = 0.3 + random.normal(0, 1.0, 40)[documents] + random.normal(0, 0.2, len(documents))
        for name, units in (("windows", None), ("documents", documents)):
            found = bootstrap_ratio(values, np.ones(len(values)), seed=trial, units=units)
            hits[name] += found.low < 0.3 < found.high
    assert hits["windows"] < 0.6 * 200 and 0.86 * 200 <= hits["documents"] <= 0.99 * 200


def test_units_of_one_row_each_are_rows_in_any_order() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 50)
    alone = bootstrap_ratio(values, np.ones(50), seed=3)
    assert bootstrap_ratio(values, np.ones(50), seed=3, units=np.arange(50) + 7) == alone


def test_one_document_says_nothing_of_others() -> None:
    found = bootstrap_ratio(np.full(9, 0.5), np.ones(9), seed=0, units=np.zeros(9, np.int64))
    assert found.mean == 0.5 and np.isnan([found.low, found.high]).all() and not found.above_zero


def losses(excess: float, noise: float, seed: int, samples: int = 40) -> SampleSums:
    random = np.random.default_rng(seed)
    real = random.normal(3.0, 1.0, (samples, 4 * CHUNK)).astype(np.float32)
    mask = random.random(real.shape) < 0.9

    def worse(by: float) -> np.ndarray:
        found = real + by + random.normal(0, noise, (samples, 1))
        found[:, : CHUNK - 1] = real[:, : CHUNK - 1]
        return found.astype(np.float32)

    found = {"real": real, "none": worse(excess), "random": worse(excess), "shuffled": worse(excess)}
    ids = torch.arange(samples)
    tensors = {variant: torch.from_numpy(tokens) for variant, tokens in found.items()}
    return token_sums(tensors, torch.from_numpy(mask), CHUNK, ids_N=ids, texts_N=ids)


def health(by_variant: SampleSums, share: float = 0.1, rate: float | None = None) -> RetrievalHealth:
    return retrieval_health(by_variant, (LayerUse(3, share, rate),), seed=0)


def test_sums_that_ranks_pack_are_those_of_all_samples_together() -> None:
    """Two ranks with every second sample each; the formula in numpy is the reference."""
    random = np.random.default_rng(5)
    variants, samples, length = ("real", "none"), 6, 3 * CHUNK - 2
    tokens = {variant: random.normal(3.0, 1.0, (samples, length)).astype(np.float32) for variant in variants}
    mask = random.random((samples, length)) < 0.9

    def of(rows: np.ndarray) -> SampleSums:
        losses = {variant: torch.from_numpy(found[rows]) for variant, found in tokens.items()}
        ids = torch.from_numpy(rows)
        return token_sums(losses, torch.from_numpy(mask[rows]), CHUNK, ids_N=ids, texts_N=ids * -7)

    parts = [packed(of(np.arange(start, samples, 2))) for start in (0, 1)]
    assert all(len(part) == packed_length(samples // 2, variants, CHUNK) for part in parts)
    found, whole = joined(torch.stack(parts), samples // 2, variants, CHUNK), of(np.arange(samples))
    reached = mask & (np.arange(length) >= CHUNK - 1)
    difference = (tokens["none"].astype(np.float64) - tokens["real"]) * reached
    assert torch.equal(found.ids_N, whole.ids_N) and torch.equal(found.texts_N, whole.texts_N)
    assert found.mean == pytest.approx(tokens["real"][mask].mean(dtype=np.float64), rel=1e-12)
    assert np.allclose(found.excess["none"], difference.sum(1), rtol=1e-12, atol=1e-12)
    places = [(difference * ((np.arange(length) + 1) % CHUNK == place)).sum() for place in range(CHUNK)]
    assert np.allclose(found.excess_by_place["none"], places, rtol=1e-12, atol=1e-12)
    assert found.places_M.sum() == reached.sum()


def test_a_healthy_model_raises_no_alarm_and_has_its_excess() -> None:
    found = health(losses(0.05, noise=0.01, seed=1))
    assert alarms(found) == ()
    for interval in found.excess.values():
        assert interval.mean == pytest.approx(0.05, abs=3 * 0.01 / 40**0.5)
        assert interval.low < interval.mean < interval.high and interval.high - interval.low < 0.01
    assert all(value == pytest.approx(0.05, abs=0.01) for value in found.excess_by_position["random"])


def test_a_conversation_that_is_read_again_narrows_no_interval() -> None:
    once = losses(0.05, noise=0.5, seed=1, samples=8)
    again = replace(
        once,
        **{name: torch.cat([getattr(once, name)] * 8) for name in ("ids_N", "texts_N", "tokens_N", "reached_N")},
        **{
            name: {variant: torch.cat([values] * 8) for variant, values in getattr(once, name).items()}
            for name in ("reached_losses", "excess")
        },
    )
    wide, same = (health(sums).excess["random"] for sums in (once, again))
    assert (wide.low, wide.high) == pytest.approx((same.low, same.high))


def test_alarms_name_what_is_wrong() -> None:
    useless = alarms(health(losses(0.0, noise=0.01, seed=2)))
    assert (
        len(useless) == 2
        and "random neighbours are not clearly worse" in useless[0]
        and "off is not clearly worse" in useless[1]
    )
    alone = alarms(retrieval_health(losses(0.05, 0.01, 1), (), seed=0, documents=np.zeros(40, np.int64)))
    assert len(alone) == 2 and "no interval: one document" in alone[0], "however many samples it has"
    harmful = alarms(health(losses(-0.05, noise=0.01, seed=3)))
    assert "-0.05" in harmful[0]
    shut = alarms(health(losses(0.05, noise=0.01, seed=1), rate=1.7e-6))
    assert shut == ("the gate of layer 3 is shut: mean rate 1.70e-06",)
    silent = alarms(health(losses(0.05, noise=0.01, seed=1), share=1e-6))
    assert len(silent) == 1 and "layer 3 adds 1.0e-06" in silent[0]


def test_tokens_that_cannot_see_neighbors_do_not_dilute_the_excess() -> None:
    found = health(losses(0.05, noise=0.0, seed=4))
    assert found.excess["none"].mean == pytest.approx(0.05, rel=1e-4)
