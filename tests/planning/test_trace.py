"""What the trace finds: the formulas of tensor traffic, work without a retriever, and effects of each choice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.parallel.traffic import microbatch_sizes, tensor_bytes
from megatron_retro.planning.memory import microbatches_in_flight
from megatron_retro.planning.plan import Plan, estimate_build
from megatron_retro.planning.trace import ENCODER, trace_parts
from megatron_retro.planning.variants import is_legal, suggestions
from megatron_retro.planning.workload import Layout, Workload

MODEL = ModelConfig(
    num_layers=8, hidden_size=256, num_attention_heads=8, swiglu=True, disable_bias_linear=True, vocab_size=4096,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
RETRO = RetroConfig(retro_add_retriever=True, retro_layers=(3, 5, 7))
WORK = Workload(MODEL, RETRO, seq_length=512, global_batch=16, num_samples=1600, value_bytes=2)


def plan(**changes: object) -> Plan:
    layout = replace(Layout(8, gpus_per_node=8), **changes)  # type: ignore[arg-type]
    return estimate_build(WORK, layout, accelerator("H100"), prove=False)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_traffic_is_that_of_the_documented_formula(sequence_parallel: bool) -> None:
    """Two independent counts: recorded collectives here, the table of docs/parallelism.md there."""
    found = plan(tensor=4, sequence_parallel=sequence_parallel)
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=sequence_parallel)
    sizes = microbatch_sizes(MODEL, RETRO, 1, 512, 2)
    assert found.ranks[0].tensor_bytes == pytest.approx(tensor_bytes(MODEL, RETRO, parallel, sizes), rel=0.01)


def test_a_gpt_and_a_shut_gate_trace_no_encoder() -> None:
    shut = replace(RETRO, retro_attention_gate=0.0)
    for retro in (RetroConfig(), shut):
        traced = trace_parts(replace(WORK, retro=retro), Layout(1))
        assert ENCODER not in traced.parts
        assert traced.encoded_bytes == 0


def test_each_remedy_lowers_memory() -> None:
    plain = plan(tensor=2).peak_memory
    assert plan(tensor=2, sequence_parallel=True).peak_memory < plain
    assert plan(tensor=2, sharding="optimizer").peak_memory < plain
    assert plan(tensor=4).peak_memory < plain
    kept = [plan(tensor=2, recompute=granularity).ranks[0].saved_bytes for granularity in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_microbatches_in_flight_are_those_of_the_schedules() -> None:
    layout = Layout(4, pipeline=4)
    assert [microbatches_in_flight(layout, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert microbatches_in_flight(replace(layout, schedule="gpipe"), 3, 8) == 8
    interleaved = replace(layout, schedule="interleaved", pieces_per_rank=2)
    assert [microbatches_in_flight(interleaved, rank, 8) for rank in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_suggestions_fit_and_the_first_is_the_fastest() -> None:
    machine = accelerator("A100")
    found = suggestions(WORK, 8, 8, machine, 0.1)
    assert 1 <= len(found) <= 5
    assert all(is_legal(WORK, each.layout) and each.peak_memory <= machine.memory_bytes * 0.9 for each in found)
    times = [each.time.total for each in found]
    assert times == sorted(times)
