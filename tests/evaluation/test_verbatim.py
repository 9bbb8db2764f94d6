"""Chunks whose next tokens stand verbatim elsewhere: the hashes find exactly what a plain comparison finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.dataset import Source
from megatron_retro.data.samples import CorpusSamples
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.window_hashes import window_hashes
from megatron_retro.evaluation import verbatim
from megatron_retro.evaluation.verbatim import stands_elsewhere
from megatron_retro.testing.corpora import write_documents


@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_equal_runs_alone_have_equal_hashes(length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 2, 400).astype(np.uint16)
    hashes = window_hashes(tokens, length)
    runs = [tokens[start : start + length].tobytes() for start in range(400 - length + 1)]
    assert len(hashes) == len(runs) and len(set(hashes.tolist())) == len(set(runs))
    assert len({*zip(hashes.tolist(), runs, strict=True)}) == len(set(runs))
    assert len(window_hashes(tokens[: length - 1], length)) == 0


def test_other_documents_are_searched_and_the_own_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two corpora, one of them cut to a part of its documents, over few ids, so that runs come back."""
    monkeypatch.setattr(verbatim, "_SPAN", 37)
    dice = np.random.default_rng(0)
    texts = [[dice.integers(0, 3, dice.integers(0, 40)).tolist() for _ in range(30)] for _ in range(2)]
    for number, documents in enumerate(texts):
        write_documents(tmp_path / str(number), documents)
    files = [TokenFile(tmp_path / str(number)) for number in range(2)]
    ranges = [(0, 30), (4, 20)]
    database = ChunkDatabase.create(
        tmp_path / "database", [file.prefix for file in files], 8, eod=None, document_ranges=ranges
    )
    own = [token for text in texts[0] for token in text]
    owners = [number for number, text in enumerate(texts[0]) for _ in text]
    starts = np.array([at for at in range(len(own) - 8) if owners[at] == owners[at + 7]])
    samples = CorpusSamples(files[0], 8, 8, ((0, len(own) // 8),), len(own), False, 0)
    whole = list(verbatim._spans(database, 1 << 31))
    assert sum(stop - start for _, start, stop in whole) == verbatim._num_tokens(database)
    part = list(verbatim._spans(database, 3 * 37))
    assert len(part) == 3 and set(part) < set(whole) and not list(verbatim._spans(database, 0))
    found = stands_elsewhere(Source(samples), database, starts, 8, 1 << 31)
    for start, seen in zip(starts, found, strict=True):
        run = own[start : start + 8]
        others = [text for number, text in enumerate(texts[0]) if number != owners[start]] + texts[1][4:20]
        assert seen == any(text[at : at + 8] == run for text in others for at in range(len(text) - 7)), start
    assert 0 < found.sum() < len(found)
    assert f"{verbatim._num_tokens(database)} tokens" in capsys.readouterr().err
