"""Worse neighbours on purpose: as many as asked, the same at every visit, and never from the sample's own documents."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from megatron_retro.config.data import DataConfig
from megatron_retro.config.sections import violations
from megatron_retro.config.settings import Settings
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.neighbor_transforms import AbsentChunks, NeighborLookup, RandomChunks
from megatron_retro.data.neighbors import NeighborReader
from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def reader(corpus: TinyCorpus, random: float = 0.0, absent: float = 0.0) -> NeighborReader:
    settings = corpus.settings(neighbor_random_share=random, neighbor_absent_share=absent)
    found = build_dataset(settings, "train", eod=None).sources[0].neighbors
    assert found is not None
    return found


def lookup(chunks: np.ndarray) -> NeighborLookup:
    """Samples of one chunk each."""
    return NeighborLookup.of_samples(chunks, 1)


def test_shares_are_as_asked_and_nested() -> None:
    chunks = np.arange(20_000)
    ranges = ((0, 5000), (7000, 22_000))
    moved = [RandomChunks(share, ranges).apply(lookup(chunks)).rows_BC[:, 0] != chunks for share in (0.25, 0.5)]
    lost = AbsentChunks(0.3).apply(lookup(chunks)).absent_BC[:, 0]
    assert [float(one.mean()) for one in moved] == pytest.approx([0.25, 0.5], abs=0.02)
    assert (moved[0] <= moved[1]).all()
    assert lost.mean() == pytest.approx(0.3, abs=0.02) and not (lost & moved[1]).any()


def test_rows_are_those_of_the_table() -> None:
    ranges = ((3, 50), (60, 61), (100, 190))
    rows = RandomChunks(1.0, ranges).apply(lookup(np.arange(3, 5000))).rows_BC
    legal = {row for first, last in ranges for row in range(first, last)}
    assert set(rows.reshape(-1).tolist()) == legal


def test_a_moved_chunk_reads_what_is_legal_in_the_other_row(corpus: TinyCorpus) -> None:
    """By the rule in NumPy, for every chunk of every sample."""
    degraded = reader(corpus, random=0.5, absent=0.2)
    samples = build_dataset(corpus.settings(), "train", eod=None).sources[0].samples
    firsts = samples.first_chunks(np.arange(samples.num_samples))
    length = samples.chunks_per_sample
    found = degraded.select(firsts, length)
    own = NeighborLookup.of_samples(firsts, length)
    rows = RandomChunks(0.5, degraded.table.row_ranges).apply(own).rows_BC
    saved = np.concatenate([degraded.table.rows(row, row + 1) for row in rows.reshape(-1)]).reshape(*rows.shape, -1)
    expected = degraded.select_plainly(saved, *degraded._own_documents(firsts, length))
    expected[AbsentChunks(0.2).apply(own).absent_BC] = -1
    assert (found == expected).all()
    assert (found == degraded.select(firsts, length)).all()
    assert (found != reader(corpus).select(firsts, length)).any()


@pytest.mark.parametrize(
    ("changes", "fingerprint", "content"),
    [
        ({}, "3dd88fa261d7bc7b", "cfa5e888b362884e"),
        ({"database_keep_fraction": 0.5, "database_keep_by": "chunk"}, "8fa4e31fb823b6c9", "f4e7c9f005a1a874"),
        (
            {
                "retro_no_retrieval_probability": 0.3,
                "retro_random_retrieval_probability": 0.4,
                "neighbor_random_share": 0.3,
                "neighbor_absent_share": 0.2,
                "database_keep_fraction": 0.7,
            },
            "ac6460e6de6c495e",
            "c630ef77abf00a7c",
        ),
    ],
)
def test_draws_and_fingerprints_are_those_of_saved_runs(
    corpus: TinyCorpus, changes: dict[str, Any], fingerprint: str, content: str
) -> None:
    """Numbers that were written down: a run goes on only where its order of samples is still the same."""
    dataset = build_dataset(corpus.settings(**changes), "train", eod=None)
    batch = dataset.read(range(40))
    assert batch.neighbors is not None
    digest = hashlib.sha256(batch.neighbors.tokens_BCKR.tobytes() + batch.neighbors.mask_BCKR.tobytes())
    assert (dataset.fingerprint[:16], digest.hexdigest()[:16]) == (fingerprint, content)


def test_fingerprints_tell_a_degraded_dataset_apart(corpus: TinyCorpus) -> None:
    plain, worse = (
        build_dataset(corpus.settings(neighbor_random_share=share), "train", eod=None).fingerprint
        for share in (0.0, 0.1)
    )
    assert plain != worse


def test_more_than_all_is_refused() -> None:
    settings = Settings([DataConfig(neighbor_random_share=0.7, neighbor_absent_share=0.4)])
    assert [violation.field for violation in violations(settings, 1)] == ["neighbor_random_share"]
