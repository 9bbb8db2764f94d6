"""The program behind the study of a real decoder: both ways of reading are scored on the same tokens."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from megatron_retro.config.model import RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "docs/experiments/real_decoder.py"))
CHUNK = 4


def test_an_empty_prompt_scores_what_the_window_scores() -> None:
    decoder = SimpleNamespace(module=random_model(tiny_model(), RetroConfig()))
    passages = random_neighbors(3, 5)
    none = Neighbors(passages.tokens_BCKR, torch.zeros_like(passages.mask_BCKR))
    text = PROGRAM["Text"](random_tokens(3, 5 * CHUNK + 1), passages, np.zeros((3, 5), np.int64), CHUNK)
    chunks = PROGRAM["by_chunk"](PROGRAM["window_losses"](decoder, text, None), CHUNK)
    assert chunks.shape == (3, 4)
    prompted = PROGRAM["prompted_losses"](decoder, text, none, [0, 2]).mean(-1)
    assert np.allclose(prompted, chunks[:, [0, 2]], atol=1e-5)
    assert not np.allclose(PROGRAM["prompted_losses"](decoder, text, passages, [0, 2]).mean(-1), prompted, atol=1e-3)


def test_a_chunk_is_what_its_neighbors_are_read_for() -> None:
    retro = SimpleNamespace(module=random_model(tiny_model(), tiny_retro(retro_chunk_length=CHUNK)))
    passages = random_neighbors(1, 5)
    text = PROGRAM["Text"](random_tokens(1, 5 * CHUNK + 1), passages, np.zeros((1, 5), np.int64), CHUNK)
    mask = passages.mask_BCKR.clone()
    mask[:, 2] = False
    with_all, without = (
        PROGRAM["by_chunk"](PROGRAM["window_losses"](retro, text, Neighbors(passages.tokens_BCKR, one)), CHUNK)
        for one in (passages.mask_BCKR, mask)
    )
    assert np.allclose(with_all[:, :2], without[:, :2]) and not np.isclose(with_all[0, 2], without[0, 2])


def test_overlap_is_what_passages_hold_of_what_follows() -> None:
    tokens = torch.arange(4 * CHUNK + 1)[None]
    passages = torch.zeros(1, 4, 1, 2 * CHUNK, dtype=torch.int64)
    passages[0, 1, 0] = torch.arange(CHUNK, 3 * CHUNK)  # the chunk and what follows it
    there = torch.ones_like(passages, dtype=torch.bool)
    text = PROGRAM["Text"](tokens, Neighbors(passages, there), np.zeros((1, 4), np.int64), CHUNK)
    assert text.overlap()[0, :3].tolist() == [0.0, 1.0, 0.0]
