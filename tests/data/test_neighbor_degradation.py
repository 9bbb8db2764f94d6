"""Worse neighbours on purpose: as many as asked, the same at every visit, and never from the sample's own documents."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_retro.config.data import DataConfig
from megatron_retro.config.sections import violations
from megatron_retro.config.settings import Settings
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.neighbor_degradation import Degradation
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


def test_shares_are_as_asked_and_nested() -> None:
    chunks = np.arange(20_000)
    moved = [Degradation(random=share).rows(chunks, ((0, 5000), (7000, 22_000))) != chunks for share in (0.25, 0.5)]
    lost = Degradation(random=0.5, absent=0.3).loses(chunks)
    assert [float(one.mean()) for one in moved] == pytest.approx([0.25, 0.5], abs=0.02)
    assert (moved[0] <= moved[1]).all()
    assert lost.mean() == pytest.approx(0.3, abs=0.02) and not (lost & moved[1]).any()


def test_rows_are_those_of_the_table() -> None:
    ranges = ((3, 50), (60, 61), (100, 190))
    rows = Degradation(random=1.0).rows(np.arange(3, 5000), ranges)
    legal = {row for first, last in ranges for row in range(first, last)}
    assert set(rows.tolist()) == legal


def test_a_moved_chunk_reads_what_is_legal_in_the_other_row(corpus: TinyCorpus) -> None:
    """By the rule in NumPy, for every chunk of every sample."""
    degraded = reader(corpus, random=0.5, absent=0.2)
    samples = build_dataset(corpus.settings(), "train", eod=None).sources[0].samples
    firsts = samples.first_chunks(np.arange(samples.num_samples))
    length = samples.chunks_per_sample
    found = degraded.select(firsts, length)
    chunks = firsts[:, None] + np.arange(length)
    rows = degraded.degradation.rows(chunks, degraded.table.row_ranges)
    saved = np.concatenate([degraded.table.rows(row, row + 1) for row in rows.reshape(-1)]).reshape(*rows.shape, -1)
    expected = degraded.select_plainly(saved, *degraded._own_documents(firsts, length))
    expected[degraded.degradation.loses(chunks)] = -1
    assert (found == expected).all()
    assert (found == degraded.select(firsts, length)).all()
    assert (found != reader(corpus).select(firsts, length)).any()


def test_fingerprints_tell_a_degraded_dataset_apart(corpus: TinyCorpus) -> None:
    plain, worse = (
        build_dataset(corpus.settings(neighbor_random_share=share), "train", eod=None).fingerprint
        for share in (0.0, 0.1)
    )
    assert plain != worse


def test_more_than_all_is_refused() -> None:
    settings = Settings([DataConfig(neighbor_random_share=0.7, neighbor_absent_share=0.4)])
    assert [violation.field for violation in violations(settings, 1)] == ["neighbor_random_share"]
