"""Compiled layers give the numbers of eager ones in one process, on layouts, with recomputation, frozen and tuned."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from megatron_retro.assembly import stage_building
from megatron_retro.config.parallel import against_compiling
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops import compilation
from megatron_retro.ops.compilation import MOST_SHAPES, LayerCompiler
from megatron_retro.parallel import overlap
from megatron_retro.testing.layout_grid import TOLERANCE, Case, whole_grid, worst_of_case
from megatron_retro.testing.layouts import LIKE_GEMMA3, LIKE_LLAMA, tiny_settings
from tests.assembly.test_tuned_layouts import LAYOUTS, METHODS

_GPT = {"num_layers": 1, "retro_add_retriever": False, "neighbors": "none", "retro_layers": None}
_RETRO = {"num_layers": 1, "retro_layers": (1,), "retro_encoder_layers": 1}
_CUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_PIPELINE = {"pipeline_model_parallel_size": 2}
SEVERAL = (
    Case(2, {"data_parallel_sharding": "full"}, {"recompute_granularity": "full", "retro_gate_type": "scalar"}),
    Case(4, {**_CUT, **_PIPELINE}, {**LIKE_GEMMA3, "recompute_granularity": "full"}),
    Case(2, _PIPELINE, {"freeze_decoder": True, "retro_neighbor_positions": "relative"}),
    Case(2, {"data_parallel_sharding": "optimizer"}, {"bf16": True}),
    Case(2, {"tensor_model_parallel_size": 2}, {"neighbors": "none"}),
    Case(
        4,
        {**_CUT, "context_parallel_size": 2},
        {**LIKE_GEMMA3, "recompute_granularity": "full", "global_batch_size": 1},
    ),
    Case(4, {"context_parallel_size": 2, "data_parallel_sharding": "full"}, {"retro_gate_type": "scalar"}),
)


def worst_of(case: Case, monkeypatch: pytest.MonkeyPatch, backend: str) -> dict[str, float]:
    """Ranks are forked, so they compile with what is set here."""
    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import_compiler()
    return worst_of_case(Case(case.world_size, {**case.mesh, "compile": True}, case.variant))


@cache
def import_compiler() -> None:
    """Here, and not again in every rank."""
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1, requires_grad=True))


def test_compiled_kernels_give_eager_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = worst_of(Case(1, {}, {**_GPT, "global_batch_size": 1}), monkeypatch, "inductor")
    assert {name: error for name, error in worst.items() if error >= TOLERANCE} == {}
    assert any(worst.values()), "a compiler that changed no bit compiled nothing"


@pytest.mark.parametrize(
    ("mesh", "variant"),
    [
        (_CUT, {**LIKE_LLAMA, **_RETRO}),
        ({}, {**_RETRO, "num_layers": 2, "retro_layers": (1, 2)}),  # gradients of microbatches are summed in it
    ],
    ids=["tensor", "data"],
)
def test_collectives_inside_a_graph_give_eager_numbers(
    mesh: dict[str, Any], variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "LEAST_BYTES", 1)
    monkeypatch.setattr(overlap, "LEAST_RESULTS", 1)
    worst = worst_of(Case(2, mesh, variant), monkeypatch, "aot_eager")
    assert {name: error for name, error in worst.items() if error >= TOLERANCE} == {}


@pytest.mark.full
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_several_layouts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = worst_of(case, monkeypatch, "aot_eager")
    assert {name: error for name, error in worst.items() if error >= TOLERANCE} == {}


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_whole_grid_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    unequal = {}
    for case in whole_grid(0):
        if any(against_compiling(tiny_settings(**case.mesh, **_settings(case.variant)))):
            continue
        worst = worst_of(case, monkeypatch, "aot_eager")
        unequal |= {str(case): worst for error in worst.values() if error >= 10 * TOLERANCE}
    assert unequal == {}


def _settings(variant: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variant.items() if name not in ("neighbors", "steps")}


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_tuned(method: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "p-tuning":
        pytest.skip("adds nothing to a layer")
    variant = {**LIKE_LLAMA, **METHODS[method], "steps": 3}
    worst = worst_of(Case(2, LAYOUTS[layout], variant), monkeypatch, "aot_eager")
    assert {name: error for name, error in worst.items() if error >= 2e-4} == {}


@pytest.mark.parametrize(
    ("device", "changes", "compiled"),
    [
        ("cpu", {}, False),
        ("cpu", {"compile": True}, True),
        ("cuda", {}, True),
        ("cuda", {"compile": False}, False),
        ("cuda", {"hidden_dropout": 0.1}, False),
    ],
)
def test_layers_are_compiled_on_gpus_unless_something_speaks_against_it(
    device: str, changes: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_building, "compiler_problems", lambda device: ())
    assert stage_building.compiles(tiny_settings(**changes), torch.device(device)) is compiled


def test_without_a_compiler_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not stage_building.compiles(tiny_settings(compile=True), torch.device("cpu"))
    assert "layers are not compiled: torch.compile needs a compiler (g++ or clang++, or CXX)" in capsys.readouterr().err


class Breaks(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2 if float(hidden.sum()) > 0 else hidden


def test_what_cannot_be_one_graph_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    broken = LayerCompiler().compiled(Breaks().forward)
    with pytest.raises(EnvironmentProblem, match="one graph") as found:
        broken(torch.ones(3, requires_grad=True))
    assert "--no-compile" in str(found.value)
    with torch.no_grad():
        assert broken(torch.ones(3)).tolist() == [2, 2, 2], "what keeps no gradient runs as it stands"


def test_shapes_beyond_the_first_few_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    compiled = LayerCompiler().compiled(lambda hidden: hidden + 1)
    for length in range(2, 2 * MOST_SHAPES):
        assert compiled(torch.zeros(length, requires_grad=True)).tolist() == [1.0] * length
    assert capsys.readouterr().err.count(f"compiled for {MOST_SHAPES} shapes") == 1
