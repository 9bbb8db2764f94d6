"""The formulas of docs/parallelism.md are what the cut model sends, byte for byte, on a fake group."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.parallel.traffic import boundary_bytes, data_bytes, microbatch_sizes, tensor_bytes
from megatron_retro.planning.trace import trace_parts
from megatron_retro.planning.workload import Layout, Workload

MODEL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=8, vocab_size=100, make_vocab_size_divisible_by=8)
RETRO = RetroConfig(retro_add_retriever=True, retro_layers=(2, 4), retro_chunk_length=16)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("tensor", "retro", "micro_batch", "value_bytes"),
    [
        (2, RETRO, 1, 4),
        (8, RETRO, 2, 2),
        (4, RetroConfig(), 1, 2),
        (
            4,
            RetroConfig(retro_add_retriever=True, retro_layers=(2, 4), retro_chunk_length=16, retro_encoder_layers=3),
            1,
            2,
        ),
    ],
)
def test_tensor_axis(
    tensor: int, retro: RetroConfig, micro_batch: int, value_bytes: int, sequence_parallel: bool
) -> None:
    work = Workload(MODEL, retro, 128, 8, 8, value_bytes)
    layout = Layout(tensor, tensor, sequence_parallel=sequence_parallel, micro_batch=micro_batch)
    traced = sum(part.sent_bytes for part in trace_parts(work, layout).parts.values())
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
    sizes = microbatch_sizes(MODEL, retro, micro_batch, 128, value_bytes)
    assert traced == pytest.approx(tensor_bytes(MODEL, retro, parallel, sizes), rel=1e-12)


def test_a_shut_gate_sends_nothing_for_neighbours() -> None:
    shut = RetroConfig(retro_add_retriever=True, retro_layers=(2, 4), retro_attention_gate=0.0)
    assert microbatch_sizes(MODEL, shut, 1, 128, 2).encoded == 0.0


def test_boundaries_and_data() -> None:
    sizes = microbatch_sizes(MODEL, RETRO, 1, 128, 2)
    plain, cut = (
        ParallelConfig(tensor_model_parallel_size=4),
        ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
    )
    assert boundary_bytes(plain, sizes, with_neighbors=True) == 2 * (128 * 64 + 8 * 2 * 32 * 64) * 2
    assert boundary_bytes(cut, sizes, with_neighbors=True) * 4 == boundary_bytes(plain, sizes, with_neighbors=True)
    sends: dict[str, Any] = {
        kind: data_bytes(100, 4, kind, 3, value_bytes=2) for kind in ("none", "optimizer", "gradients", "full")
    }
    assert sends == {"none": 600.0, "optimizer": 450.0, "gradients": 1050.0, "full": 1800.0}
