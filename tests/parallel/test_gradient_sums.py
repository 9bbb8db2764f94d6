"""Weight gradients of linear layers are added in float32 by the product that makes them, on every kind of run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.parallel_model import build_parallel_model
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.ops import compilation
from megatron_retro.ops.weight_gradients import adding_linear
from megatron_retro.parallel.layer_transforms import DeferredWeightGradients
from megatron_retro.testing.layouts import random_batches, tiny_settings, whole_gradients
from megatron_retro.testing.processes import run_ranks

WIDTH, FFN = 32, 96  # no other tensor has as many numbers as a matrix of these
LAYER = {"num_layers": 2, "retro_add_retriever": False, "retro_layers": None, "ffn_hidden_size": FFN, "bf16": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "zero-bubble": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"}),
    "sharded": (2, {"data_parallel_sharding": "optimizer"}),
    "compiled": (1, {"compile": True, "num_layers": 1}),
}
MORE_RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "recomputed": (1, {"recompute_granularity": "full"}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "compiled and recomputed": (2, {"compile": True, "recompute_granularity": "full"}),
}


class Additions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How often something of so many numbers is added to something else in a pass of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += all(isinstance(each, Tensor) and each.numel() == self.size for each in arguments[:2])
        return function(*arguments, **(keywords or {}))


def gradients_of_equal_microbatches(settings: Settings, each: int) -> tuple[dict[str, Tensor], int]:
    model = build_parallel_model(settings, torch.device("cpu"))
    batch = random_batches(settings, neighbors=False)[0]
    parallel = settings[ParallelConfig]
    additions = Additions(WIDTH * FFN // parallel.tensor_model_parallel_size)
    with nullcontext() if parallel.compile else additions:  # a compiler takes no such mode
        model.train_step([batch] * each)
    return whole_gradients(model.module), additions.count


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_not_rounded_before_they_are_added(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_exact_sums(*RUNS[run], monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("run", MORE_RUNS)
def test_nor_are_they_on_other_runs(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_exact_sums(*MORE_RUNS[run], monkeypatch)


def require_exact_sums(world_size: int, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same microbatch: half of the sum is one gradient, which bfloat16 could not hold."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    settings = tiny_settings(**{**LAYER, **layout})
    for gradients, additions in run_ranks(gradients_of_equal_microbatches, world_size, settings, 2, timeout=300.0):
        matrices = {name: found / 2 for name, found in gradients.items() if "mlp" in name and "weight" in name}
        matrices = {name: half for name, half in matrices.items() if "norm" not in name}
        assert matrices
        assert [name for name, half in matrices.items() if torch.equal(half, half.bfloat16().float())] == []
        assert additions == 0, "FSDP2 finds nothing left to add"


@pytest.mark.full
def test_without_a_second_microbatch_nothing_is_summed() -> None:
    ((gradients, _),) = run_ranks(gradients_of_equal_microbatches, 1, tiny_settings(**LAYER), 1)
    up = gradients["layers.0.mlp.up.weight"]
    assert torch.equal(up, up.bfloat16().float())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_waited_for_a_schedule_is_added_without_a_record_of_it(device: str) -> None:
    """A schedule calls with gradients enabled: a product into a sum would be refused, or the sum would keep all of it.

    Where there is no GPU, what such a product refuses shows on tensors without data.
    """
    deferred = DeferredWeightGradients(lambda: None)
    hidden, weight = (
        torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
        for shape in ((3, WIDTH), (FFN, WIDTH))
    )
    sums = torch.zeros(FFN, WIDTH, device=device)
    for _ in range(2):
        deferred.multiply(hidden * 2, weight, None, sums).sum().backward()
    deferred.pop()()
    assert not sums.requires_grad
    assert device == "meta" or bool((sums == 12).all())


def test_gradients_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 5), (7, 5), (7,)))
    sums = torch.ones(7, 5)
    (adding_linear(hidden, weight, bias, sums) ** 2).sum().backward()
    found, added = (hidden.grad, bias.grad), sums - 1
    assert weight.grad is None
    expected = torch.autograd.grad(
        (torch.nn.functional.linear(hidden, weight, bias) ** 2).sum(), (hidden, bias, weight)
    )
    for ours, theirs in zip((*found, added), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)
