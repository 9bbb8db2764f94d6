"""Every parameter has one row of the table of cuts, and a cut model holds its part of each."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.training import LORA_TARGETS, PARTS, PeftConfig
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import CUTS, Style, cut_of, matches, regions_of
from megatron_retro.parallel.mesh import TENSOR, build_mesh
from megatron_retro.parallel.tensor_parallel import cut_model, partial_parameters
from megatron_retro.peft.attach import attach
from megatron_retro.testing.layouts import LIKE_OLMO2, tiny_settings
from megatron_retro.testing.processes import run_ranks

CHOICES: dict[str, tuple[object, ...]] = {
    "qk_layernorm": (False, True),
    "swiglu": (False, True),
    "retro_gate_type": ("fixed", "scalar", "heads", "adaptive"),
    "retro_encoder_final_norm": (False, True),
    "position_embedding_type": ("rope", "learned_absolute"),
    "normalization": ("LayerNorm", "RMSNorm"),
}
METHODS = [
    PeftConfig(peft_method=method, peft_parts=PARTS, lora_targets=LORA_TARGETS)
    for method in ("lora", "adapter", "ia3", "p-tuning")
]
VARIANTS = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


def _model(**changes: object) -> Retro:
    settings = tiny_settings(**changes)
    with torch.device("meta"):
        return Retro(settings[ModelConfig], settings[RetroConfig])


def test_every_parameter_matches_one_row_and_every_row_is_used() -> None:
    used = set()
    for variant in VARIANTS:
        for extra in (
            {"untie_embeddings_and_output_weights": True, "retro_neighbor_positions": "relative"},
            {"retro_encoder_own_embedding": True, "retro_encoder_hidden_size": 16},
        ):
            for name, _ in _model(**variant, **extra).named_parameters():
                used.add(cut_of(name).pattern)
    used |= {cut_of(name).pattern for name, _ in _model(retro_core_checkpoint=True).named_parameters()}
    used |= {cut_of(name).pattern for name, _ in _model(**LIKE_OLMO2).named_parameters()}
    for config in METHODS:
        tuned = _model(swiglu=True)
        attach(tuned, config)
        used |= {cut_of(name).pattern for name, _ in tuned.named_parameters()}
    assert {cut.pattern for cut in CUTS} - used == set()


@pytest.mark.parametrize("name", ["layers.0.mlp.up.extra", "layers.0.1.mlp.up.weight", "embedding.word"])
def test_a_parameter_without_a_row_is_refused(name: str) -> None:
    with pytest.raises(LookupError, match="matches 0 rows"):
        cut_of(name)


def test_a_parameter_with_two_rows_is_refused() -> None:
    with pytest.raises(LookupError, match="matches 2 rows"):
        cut_of("output.weight", (*CUTS, CUTS[-1]))


def test_a_star_is_one_component() -> None:
    assert matches("a.*.{b,c}", "a.1.c")
    assert not matches("a.*.{b,c}", "a.1.2.c")
    assert not matches("a.*.{b,c}", "a.1.d")
    assert not matches("a.b", "aXb")


def test_regions_are_the_modules_that_mix() -> None:
    found = set(regions_of(dict(_model().named_modules())))
    assert {
        "layers.0.attention",
        "layers.1.cross_attention",
        "layers.3.mlp",
        "encoder.layers.0.cross_attention",
    } <= found
    assert "layers.0.attention.output" not in found


def test_each_rank_holds_its_heads_and_its_part_of_both_halves_of_a_gated_mlp() -> None:
    """Grouped queries and SwiGLU: the parts of two ranks, put together by hand, are the whole."""
    changes = {"swiglu": True, "group_query_attention": True, "num_query_groups": 2, "tensor_model_parallel_size": 2}

    def parts() -> dict[str, torch.Tensor]:
        settings = tiny_settings(**changes)
        mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
        torch.manual_seed(0)
        model = Retro(settings[ModelConfig], settings[RetroConfig])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        cut_model(model, mesh.devices[TENSOR], TensorAxis(mesh.group(TENSOR), False))
        after = {name: parameter.to_local().detach() for name, parameter in model.named_parameters()}
        names = ("layers.0.attention.query_key_value.weight", "layers.0.mlp.up.weight", "layers.0.mlp.down.weight")
        assert all(after[name].is_contiguous() for name in names)
        return {
            f"{kind} {name}": values[name] for name in names for kind, values in (("whole", before), ("part", after))
        }

    first, second = run_ranks(parts, 2)
    for name, dim in (("attention.query_key_value", 0), ("mlp.up", 1), ("mlp.down", 1)):
        key = f"layers.0.{name}.weight"
        joined = torch.cat((first[f"part {key}"], second[f"part {key}"]), dim)
        assert torch.equal(joined, first[f"whole {key}"])
        assert first[f"part {key}"].shape[dim] * 2 == first[f"whole {key}"].shape[dim]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_marked_partial_are_those_of_whole_weights_on_cut_inputs(sequence_parallel: bool) -> None:
    marked = {
        name for name, _ in partial_parameters(_model(qk_layernorm=True, retro_gate_type="scalar"), sequence_parallel)
    }
    assert {"layers.0.attention.query_norm.weight", "layers.1.cross_attention.gate.value"} <= marked
    assert ("layers.0.input_norm.weight" in marked) == sequence_parallel
    assert ("layers.0.mlp.down.bias" in marked) == sequence_parallel
    assert all(cut_of(name).style in (Style.HEADS, Style.STREAM) for name in marked)
