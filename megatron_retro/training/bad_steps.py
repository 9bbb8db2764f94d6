"""Steps that must not count: loss or gradient not finite, or a loss far above the recent ones.

Reasons are found on each rank, and a step is bad if it is on any rank. The batch is named by its samples and written to
disk for inspection.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_retro.artifacts.files import new_file, write_file
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.runtime.strict_json import json_text

BAD_BATCHES = "bad_batches"
_FEWEST_LOSSES = 16


def spike_limit(recent: Iterable[float], factor: float) -> float:
    """The loss above which a step is a spike; infinite where there are too few losses to tell."""
    known = list(recent)
    return factor * statistics.median(known) if factor > 0 and len(known) >= _FEWEST_LOSSES else math.inf


def spike_reason(loss: float, recent: Iterable[float], factor: float) -> str | None:
    """Why this loss is a spike, or None."""
    limit = spike_limit(recent, factor)
    if not loss > limit:
        return None
    return f"loss {loss:.4g} is over {factor:g} times the recent median {limit / factor:.4g}"


def non_finite_reason(loss: float, gradient_norm: float) -> str | None:
    """Why loss or gradient cannot be used, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(gradient_norm) else f"the gradient's norm is {gradient_norm}"


def sample_ids(microbatches: Sequence[Microbatch[Array]]) -> list[int]:
    """Numbers of the samples in the global order."""
    return [int(number) for batch in microbatches for number in batch.sample_ids_B]


def write_bad_batch(
    run: Path, rank: int, step: int, first_sample: int, reason: str, microbatches: Sequence[Microbatch[Array]]
) -> Path:
    """This rank's share of a bad batch: its arrays, and what was wrong in words."""
    directory = run / BAD_BATCHES / f"step-{step:08}-sample-{first_sample}"
    arrays: dict[str, Any] = {}
    for number, batch in enumerate(microbatches):
        arrays |= {f"{number}.{name}": array for name, array in batch.arrays().items()}
        arrays[f"{number}.sample_ids_B"] = batch.sample_ids_B
    path = directory / f"rank-{rank:05}.npz"
    with new_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)
    facts = {"step": step, "rank": rank, "reason": reason, "sample_ids": sample_ids(microbatches)}
    write_file(directory / f"rank-{rank:05}.json", json_text(facts, indent=1) + "\n")
    return path
