"""What the trace finds: work without a retriever, effects of each choice, a GPU beside a CPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.planning.fake_device import CPU
from megatron_retro.planning.plan import Plan, make_plan
from megatron_retro.planning.recorder import PartTrace, Recorder
from megatron_retro.planning.trace import ENCODER, HEAD, LAYER, NEIGHBORS, RETRIEVAL, trace_parts
from tests.planning.recipes import recipe


def plan(**changes: Any) -> Plan:
    return make_plan(recipe(**changes), accelerator("H100"))


@pytest.mark.parametrize(
    "changes", [{"retro_add_retriever": False, "retro_layers": None}, {"retro_attention_gate": 0.0}]
)
def test_a_gpt_and_a_shut_gate_trace_no_encoder(changes: dict[str, Any]) -> None:
    traced = trace_parts(recipe(**changes))
    assert traced.part(ENCODER).forward_flops == traced.part(NEIGHBORS).saved_bytes == 0
    assert traced.encoded_bytes == 0


def test_every_state_that_is_read_is_counted() -> None:
    """Those of the whole model, of which the trace builds a part."""
    layers = recipe()[RetroConfig].retrieval_layers(recipe()[ModelConfig].num_layers)
    deep: dict[str, Any] = {"retro_encoder_layers": max(layers), "retro_encoder_reads": "same-depth"}
    assert trace_parts(recipe(**deep)).encoded_bytes == len(layers) * trace_parts(recipe()).encoded_bytes


def test_each_remedy_lowers_memory() -> None:
    """Of a batch that outweighs the weights."""
    batch: dict[str, Any] = {"micro_batch_size": 4, "tensor_model_parallel_size": 2}
    plain = plan(**batch).peak_memory
    recomputed = batch | {"recompute_granularity": "full"}
    for changes, peak in ((batch, plain), (recomputed, plan(**recomputed).peak_memory)):
        assert plan(**changes, sequence_parallel=True).peak_memory < peak
    assert plan(**batch, data_parallel_sharding="optimizer").peak_memory < plain
    assert plan(**batch | {"tensor_model_parallel_size": 4}).peak_memory < plain
    kept = [
        plan(**batch, recompute_granularity=granularity).ranks[0].stages[0].saved_bytes
        for granularity in ("none", "full")
    ]
    assert kept[0] > kept[1] > 0


def test_a_layer_keeps_what_collectives_products_and_attention_gave() -> None:
    """Each thing once: no norm, nothing gathered, no opened gate, no copy of neighbours for each layer that reads."""
    settings = recipe(tensor_model_parallel_size=2, sequence_parallel=True)
    traced, width = trace_parts(settings), settings[ModelConfig].ffn_width()
    hidden, encoded = 512 * 256 * 2, traced.encoded_bytes
    heads, sums = hidden / 2, hidden / 2  # of half of the heads; of this rank's part of the stream
    plain = 4 * heads + 2 * sums + 512 * width * 2
    assert traced.part(LAYER).saved_bytes == pytest.approx(plain, rel=0.06)
    keys_values = encoded + encoded / 2  # rotated keys stand beside what they were rotated from
    retrieving = plain + 2 * sums + 3 * heads + keys_values
    assert traced.part(RETRIEVAL).saved_bytes == pytest.approx(retrieving, rel=0.05)


def test_recomputing_takes_operations_and_communication() -> None:
    cut: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    none, full = (plan(**cut, recompute_granularity=granularity).ranks[0].total for granularity in ("none", "full"))
    layers = none.forward_flops - 2 * 512 * 256 * 4096 / 2  # the head is not computed again
    again = full.backward_flops - none.backward_flops
    assert again == pytest.approx(layers, rel=0.1)
    assert full.sent_bytes > 1.2 * none.sent_bytes


def test_what_grows_with_the_microbatch_grows_nearly_in_proportion() -> None:
    """So that a search may scale the trace of one sample; gradients of weights do not grow, some copies come late."""
    one, four = (trace_parts(recipe(micro_batch_size=size)) for size in (1, 4))
    scaled = one.times(4)
    assert (scaled.hidden_bytes, scaled.encoded_bytes) == (four.hidden_bytes, four.encoded_bytes)
    for name in four.parts:
        for field in fields(PartTrace):
            if field.name not in ("working_bytes", "moved_bytes"):
                found, wanted = getattr(scaled.part(name), field.name), getattr(four.part(name), field.name)
                assert found == pytest.approx(wanted, rel=0.25, abs=40_000), (name, field.name)


def test_a_device_keeps_what_its_own_operators_keep() -> None:
    """The same operations and bytes sent; a CPU has kernels of ours that keep less, and another loss."""
    gpu, cpu = (trace_parts(recipe(bf16=False), device) for device in (torch.device("meta"), CPU))
    assert gpu.part(LAYER).forward_flops == pytest.approx(cpu.part(LAYER).forward_flops, rel=1e-9)
    assert gpu.part(LAYER).saved_bytes >= cpu.part(LAYER).saved_bytes > 0
    assert gpu.part(HEAD).working_bytes != cpu.part(HEAD).working_bytes
    assert gpu.part(LAYER).parameters == cpu.part(LAYER).parameters


class _Forwarded(Exception):
    """A forward's counts."""


@pytest.mark.cuda_build
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")
@pytest.mark.parametrize(
    "changes", [{}, {"normalization": "RMSNorm"}, {"bf16": False}, {"qk_layernorm": True}], ids=str
)
def test_meta_stands_for_a_gpu(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch knows CUDA's operators, a forward with them keeps and computes the same."""

    def stop(recorder: Recorder) -> None:
        end_forward(recorder)
        raise _Forwarded(recorder.parts)

    end_forward = Recorder.end_forward
    monkeypatch.setattr(Recorder, "end_forward", stop)
    found: list[dict[str, PartTrace]] = []
    for device in (torch.device("meta"), torch.device("cuda")):
        with pytest.raises(_Forwarded) as stopped:
            trace_parts(recipe(**changes), device)
        found.append(stopped.value.args[0])
    meta, cuda = found
    assert meta.keys() == cuda.keys()
    for name, part in meta.items():
        assert part.forward_flops == pytest.approx(cuda[name].forward_flops, rel=1e-9)
        assert part.saved_bytes == pytest.approx(cuda[name].saved_bytes, rel=0.01, abs=8192), name
        assert part.moved_bytes == pytest.approx(cuda[name].moved_bytes, rel=0.01, abs=8192), name


def test_rms_norm_is_one_kernel() -> None:
    """It keeps what LayerNorm does; unfolded it would keep the stream in float32, too."""
    layer, rms = (trace_parts(recipe(normalization=name)).part(LAYER) for name in ("LayerNorm", "RMSNorm"))
    assert rms.saved_bytes == pytest.approx(layer.saved_bytes, rel=0.01)


def test_nothing_is_left_behind() -> None:
    """After a plan attention computes as ever, and no process group is open."""
    trace_parts(recipe())
    assert not torch.distributed.is_initialized()
    heads = torch.randn(1, 2, 8, 4)
    found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(heads, heads, heads))
    on_meta = heads.to("meta")
    assert torch.nn.functional.scaled_dot_product_attention(on_meta, on_meta, on_meta).shape == heads.shape
