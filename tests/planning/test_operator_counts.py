"""What a step is made of, as `benchmarks/step_cost.py` counts it, and that it does not grow unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_retro.ops.backend_names import REFERENCE
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.parallel import overlap
from megatron_retro.planning.fake_device import GPU, without_memory
from megatron_retro.planning.operator_counts import OperatorCounter, OperatorCounts
from megatron_retro.planning.recorder import STAGE
from megatron_retro.planning.trace import ENCODER, HEAD, LAYER, RETRIEVAL, trace_parts
from tests.planning.recipes import recipe

WIDTH, ROWS, VALUE = 64, 32, 2


def counted(**changes: Any) -> dict[str, OperatorCounts]:
    made: list[OperatorCounter] = []

    def make(given: Iterable[Tensor], context: ProcessGroup | None) -> OperatorCounter:
        made.append(OperatorCounter(given, context))
        return made[-1]

    trace_parts(recipe(**changes), make_recorder=make)
    return made[0].counts


def test_a_product_is_its_operands_and_its_result_and_views_are_nothing() -> None:
    rows = torch.empty(1, ROWS, WIDTH, dtype=torch.bfloat16, device=GPU)
    weight = torch.empty(WIDTH, WIDTH, dtype=torch.bfloat16, device=GPU)
    with without_memory(GPU), OperatorCounter([rows, weight]) as counter:
        hidden = functional.linear(rows, weight).unflatten(-1, (4, -1)).transpose(1, 2)
        torch.mul(hidden, hidden, out=torch.empty_like(hidden)).neg_()
        hidden.gather(1, torch.zeros(1, 1, 1, 1, dtype=torch.long, device=GPU))
    counts, traced = counter.counts[STAGE], counter.part(STAGE)
    assert counts.product_bytes == VALUE * (2 * ROWS * WIDTH + WIDTH * WIDTH)
    assert (counts.products, counts.groups, counts.collectives) == (1, 2, 0)
    assert counts.kernels == 5, "product, product of elements, negation, zeros, gather"
    assert counts.operators > counts.kernels
    moved = VALUE * ROWS * WIDTH
    assert traced.moved_bytes == pytest.approx((3 + 2) * moved, abs=32)


@pytest.mark.parametrize("tensor", [1, 2])
def test_parts_launch_no_more_than_they_did(tensor: int) -> None:
    """Forward and backward, by the references. Lower a number when it falls."""
    most = {LAYER: 52, RETRIEVAL: 118, ENCODER: 203}
    counts = counted(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    assert all(counts[name].kernels <= most[name] for name in most), {name: counts[name].kernels for name in most}
    assert counts[LAYER].collectives == (0 if tensor == 1 else 10)


@pytest.mark.parametrize(
    ("changes", "pieces", "beside"),
    [
        ({"sequence_parallel": True}, 1, 2 / 5),  # an opening's two of the backward
        ({"sequence_parallel": True}, 4, (2 + 3 * 3 / 4) / 5),  # of the others, all but the first or the last piece
        ({}, 1, 1 / 2),  # an opening's gradient
        ({}, 4, (1 + 3 / 4) / 2),
    ],
)
def test_what_a_layer_sends_beside_products(
    changes: dict[str, bool], pieces: int, beside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MOST_PIECES", pieces), ("LEAST_BYTES", 1), ("LEAST_RESULTS", 1)):
        monkeypatch.setattr(overlap, name, value)
    part = trace_parts(recipe(tensor_model_parallel_size=2, **changes)).part(LAYER)
    assert part.beside_bytes == pytest.approx(beside * part.sent_bytes)
    assert 0 < part.beside_flops < part.forward_flops + part.backward_flops


def test_the_loss_reads_and_writes_twenty_blocks_of_logits() -> None:
    """In bytes of a block in bfloat16: 10 read and written for the statistics, 10 for the gradient; products apart."""
    vocabulary, tokens = recipe().replace(vocab_size=2**16), 512
    made: list[OperatorCounter] = []

    def make(given: Iterable[Tensor], context: ProcessGroup | None) -> OperatorCounter:
        made.append(OperatorCounter(given, context))
        return made[-1]

    traced = trace_parts(vocabulary, make_recorder=make).part(HEAD)
    block = VALUE * 2**16 * tokens
    assert 19 * block < traced.moved_bytes < 21 * block


@pytest.mark.full
@pytest.mark.parametrize(
    ("tensor", "most"),
    # nothing is fused across a collective
    [(1, {LAYER: 29, RETRIEVAL: 56, ENCODER: 89}), (2, {LAYER: 30, RETRIEVAL: 58, ENCODER: 92})],
    ids=["1", "2"],
)
def test_compiled_parts_launch_no_more_than_they_did(
    tensor: int, most: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_retro.testing.compiled_counts import compiled_counts  # brings torch's compiler

    monkeypatch.setenv(VARIABLE, REFERENCE)
    counts = compiled_counts(recipe(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1))
    assert all(0 < counts[name].kernels <= most[name] for name in most), counts
    for name, collectives in ((LAYER, 10), (RETRIEVAL, 15), (ENCODER, 25)):
        assert counts[name].collectives == (collectives if tensor > 1 else 0)
