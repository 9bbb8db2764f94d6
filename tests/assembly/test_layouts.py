"""Loss, evaluation, norm, first values and ALL gradients of every layout equal the one-process run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_retro.parallel import overlap
from megatron_retro.parallel.cuts import CUTS, Cut, Style
from megatron_retro.testing.layout_grid import Case, drawn_part, tolerance, whole_grid, worst_of_case
from megatron_retro.testing.layouts import (
    LIKE_GEMMA3,
    LIKE_OLMO2,
    random_batches,
    reference_outcome,
    run_layout,
    tiny_settings,
    worst_differences,
)
from megatron_retro.testing.processes import RankFailure

SEED = int(os.environ.get("LAYOUT_SEED", "0"))  # another part of another grid

# no draw may leave this out: frozen layers, deferred weight gradients, recomputation and sharded parameters at once
TRAP = Case(
    4,
    {
        "pipeline_model_parallel_size": 2,
        "pipeline_schedule": "zero-bubble",
        "data_parallel_sharding": "full",
    },
    {"freeze_decoder": True, "recompute_granularity": "full"},
)

_CORE = {"retro_core_checkpoint": True, "steps": 3}  # biases are zero before the first step
CORES = (
    Case(
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {**_CORE, "position_embedding_type": "learned_absolute"},
    ),
    Case(4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, _CORE),
    Case(2, {"data_parallel_sharding": "full"}, {**_CORE, "recompute_granularity": "full"}),
)
FAMILIES = (
    Case(2, {"tensor_model_parallel_size": 2}, LIKE_OLMO2),
    Case(
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        {**LIKE_GEMMA3, "recompute_granularity": "full", "seq_length": 24},  # three chunks, which ranks cannot share
    ),
)


_SHARED = {"context_parallel_size": 2}
SHARED = (
    pytest.param(
        Case(4, {**_SHARED, "tensor_model_parallel_size": 2, "sequence_parallel": True}, LIKE_GEMMA3),
        marks=pytest.mark.full,
    ),
    Case(
        4,
        {**_SHARED, "pipeline_model_parallel_size": 2, "data_parallel_sharding": "full"},
        {"retro_encoder_reads": "same-depth", "recompute_granularity": "full"},
    ),
)


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensor ranks exchange goes in pieces, as it does for large models."""
    monkeypatch.setattr(overlap, "LEAST_BYTES", 1)
    monkeypatch.setattr(overlap, "LEAST_RESULTS", 1)


@pytest.mark.parametrize("case", [TRAP, *CORES, *FAMILIES, *SHARED, *drawn_part(SEED)], ids=str)
def test_layout_equals_one_process(case: Case) -> None:
    worst = worst_of_case(case)
    assert {name: error for name, error in worst.items() if not error < tolerance(case)} == {}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_whole_grid() -> None:
    """Every mesh, schedule and sharding of up to 8 ranks, each with a variant drawn for it; the result is written."""
    start, rows = time.time(), []
    for case in whole_grid(SEED):
        try:
            worst = worst_of_case(case)
        except RankFailure as failure:
            worst = {str(failure).strip().splitlines()[-1]: float("inf")}
        name = max(worst, key=lambda key: worst[key])
        rows.append({"case": str(case), "worst": name, "error": worst[name], "equal": worst[name] < tolerance(case)})
    unequal = [row for row in rows if not row["equal"]]
    result = {"seed": SEED, "cases": len(rows), "unequal": unequal, "seconds": round(time.time() - start), "rows": rows}
    path = Path(__file__).parents[1] / "results" / "parallel_grid.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    assert unequal == []


def _with_other_row(pattern: str, style: Style) -> Sequence[Cut]:
    changed = [Cut(cut.pattern, style, cut.dim) if pattern in cut.pattern else cut for cut in CUTS]
    assert changed != list(CUTS)
    return changed


@pytest.mark.parametrize(
    ("row", "style", "caught"),
    [
        ("input_norm", Style.HEADS, "layers.0.input_norm.weight"),
        ("query_norm", Style.STREAM, "layers.0.attention.query_norm.weight"),
        (".gate.", Style.STREAM, "layers.1.cross_attention.gate.value"),
        ("mlp.down.bias", Style.HEADS, "layers.0.mlp.down.bias"),
    ],
)
def test_a_wrong_cut_is_caught(row: str, style: Style, caught: str) -> None:
    settings = tiny_settings(
        tensor_model_parallel_size=2,
        qk_layernorm=True,
        retro_gate_type="scalar",
        global_batch_size=2,
    )
    batches = random_batches(settings)
    reference = reference_outcome(settings, batches)
    worst = worst_differences(reference, run_layout(settings, 2, batches, 1, _with_other_row(row, style)))
    assert worst[caught] > 0.05
    assert worst["loss"] < 1e-5  # the forward is right: only the gradients tell
