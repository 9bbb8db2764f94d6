"""The same samples with other neighbours, to see whether a model uses them.

`real` as retrieved; `none`; `random`: those of a chunk of another sample; `shuffled`: those of another chunk of the
same sample. Random and shuffled neighbours come from the same distribution as the real ones, so a model that does as
well with them uses no retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.batches import Batch

VARIANTS = ("real", "none", "random", "shuffled")


def with_variant(batches: Sequence[Batch], variant: str, seed: int) -> list[Batch]:
    """All batches of an evaluation under one variant; a pure function of the batches and the seed."""
    if variant == "real":
        return list(batches)
    if variant == "none":
        return [replace(batch, neighbor_tokens_BCKR=None, neighbor_mask_BCKR=None) for batch in batches]
    random = np.random.default_rng(seed)
    samples = sum(batch.num_samples for batch in batches)
    tokens, mask = _joined(batches)
    chunks = tokens.shape[1]
    sample_of = np.arange(samples)[:, None].repeat(chunks, 1)
    chunk_of = np.arange(chunks)[None].repeat(samples, 0)
    if variant == "random":
        if samples > 1:
            sample_of = (sample_of + random.integers(1, samples, size=sample_of.shape)) % samples
        chunk_of = random.integers(0, chunks, size=chunk_of.shape)
    elif variant == "shuffled" and chunks > 1:
        chunk_of = (chunk_of + random.integers(1, chunks, size=chunk_of.shape)) % chunks
    return _split(batches, tokens[sample_of, chunk_of], mask[sample_of, chunk_of])


def _joined(batches: Sequence[Batch]) -> tuple[NDArray[Any], NDArray[Any]]:
    tokens = [batch.neighbor_tokens_BCKR for batch in batches if batch.neighbor_tokens_BCKR is not None]
    masks = [batch.neighbor_mask_BCKR for batch in batches if batch.neighbor_mask_BCKR is not None]
    if len(tokens) != len(batches) or len(masks) != len(batches):
        raise ValueError("variants of neighbours need batches with neighbours")
    return np.concatenate(tokens), np.concatenate(masks)


def _split(batches: Sequence[Batch], tokens: NDArray[Any], mask: NDArray[Any]) -> list[Batch]:
    result, start = [], 0
    for batch in batches:
        stop = start + batch.num_samples
        result.append(replace(batch, neighbor_tokens_BCKR=tokens[start:stop], neighbor_mask_BCKR=mask[start:stop]))
        start = stop
    return result
