"""The Adams of TransformerEngine and Apex: torch's numbers and torch's checkpoints, or a refusal with reasons.

Without a GPU neither package runs, so stand-ins follow their documented interfaces: the arguments of the constructor,
counts by group, plain, contiguous, non-empty tensors only. Where a package and a GPU are, the package is tested.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_retro.cli import main as entry
from megatron_retro.config.training import OptimizerConfig
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops import engines
from megatron_retro.optim.optimizer import EngineAdam, TrainingOptimizer, optimizer_rows, require_optimizer
from megatron_retro.testing.processes import exit_code_of, run_ranks
from megatron_retro.testing.tiny_corpus import differences, losses, stored_tensors, write_tiny_corpus
from megatron_retro.training.program import pretrain

ENGINES = (engines.TE_ADAM, engines.APEX_ADAM)


class GroupAdam(torch.optim.Optimizer):
    """What both documents have in common: AdamW, `step` an integer of the group, moments by parameter."""

    def __init__(
        self, params: Any, lr: float, bias_correction: bool, betas: Any, eps: float, adam_w_mode: bool, decay: float
    ) -> None:
        assert bias_correction and adam_w_mode
        settings = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": decay}
        super().__init__(params, settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's may return a loss
        for group in self.param_groups:
            assert group["params"][0].device.type == "cpu"
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        for tensor in (parameter, parameter.grad, *state.values()):
            assert type(tensor) is Tensor and tensor.numel() and tensor.is_contiguous()
            assert tensor.dtype == torch.float32
        first, second = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        corrected = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
        parameter.addcdiv_(state["exp_avg"], corrected, value=-group["lr"] / (1 - first ** group["step"]))


class TransformerEngineAdam(GroupAdam):
    """`transformer_engine.pytorch.optimizers.FusedAdam`."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        amsgrad: bool = False, *, bias_correction: bool = True, adam_w_mode: bool = True, capturable: bool = False,
        master_weights: bool = False, set_grad_none: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay)


class ApexAdam(GroupAdam):
    """`apex.optimizers.FusedAdam`, whose `zero_grad` takes no argument."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
        set_grad_none: bool = True, capturable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay)

    def zero_grad(self) -> None:  # type: ignore[override]  # as Apex has it, without torch's argument
        raise AssertionError("gradients are cleared without it")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a test pretends to be installed must not stay."""
    engines._module_problems.cache_clear()
    yield
    engines._module_problems.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages are installed, and serve on this machine's CPU."""
    classes = {"transformer_engine.pytorch.optimizers": TransformerEngineAdam, "apex.optimizers": ApexAdam}
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex", "amp_C", *classes):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module)["FusedAdam"] = classes.get(name)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engines, "_device_problems", lambda device: [])


class Model(nn.Module):
    """Parameters of four groups, one of them without elements on most ranks when it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(6, 4)
        self.cross_attention = nn.Linear(4, 3, bias=False)
        self.encoder = nn.Linear(4, 5)


def train(model: nn.Module, optimizer: str, steps: int = 5) -> TrainingOptimizer:
    """Gradients by name and step; `cross_attention` gets one in every second step only."""
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.3, clip_grad=0.0, lr_scale_encoder=0.5)
    trained = TrainingOptimizer(model, config)
    for step in range(steps):
        for position, (name, parameter) in enumerate(model.named_parameters()):
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + position))
            if step % 2 and "cross" in name:
                continue
            if isinstance(parameter, torch.distributed.tensor.DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        assert trained.update(torch.tensor(1.0), 0.01).applied
        assert all(parameter.grad is None for parameter in model.parameters())
    return trained


def whole_state(model: nn.Module, trained: TrainingOptimizer) -> dict[str, Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        for entry_name, value in {"": parameter.detach(), **trained.inner.state[parameter]}.items():
            whole = value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value
            state[f"{name} {entry_name}"] = whole
    return state


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_updates_as_torch_does(engine: str) -> None:
    """Rates and decay of every group, moments and counts by parameter, a gradient that is missing now and then."""
    torch.manual_seed(0)
    models = {name: Model() for name in ("adam", engine)}
    models[engine].load_state_dict(models["adam"].state_dict())
    states = {name: whole_state(model, train(model, name)) for name, model in models.items()}
    assert states[engine]["cross_attention.weight step"] == 3 and states[engine]["encoder.bias step"] == 5
    torch.testing.assert_close(states[engine], states["adam"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_updates_every_rank_s_part(engine: str) -> None:
    """Cut by rows over four ranks: three rows leave the last without any, and five leave it three empty."""
    torch.manual_seed(0)
    model = Model()
    plain = Model()
    plain.load_state_dict(model.state_dict())
    expected = whole_state(plain, train(plain, "adam"))

    def on_a_rank() -> dict[str, Tensor]:
        mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
        for module in model.children():
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        return whole_state(model, train(model, engine))

    for found in run_ranks(on_a_rank, 4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("stand_ins")
def test_a_checkpoint_does_not_know_who_wrote_it(tmp_path: Path) -> None:
    """Saved by one on one layout, resumed by another on another: the losses of the run that never stopped."""
    corpus = write_tiny_corpus(tmp_path / "corpus")
    more: dict[str, Any] = {"train_iters": 6, "global_batch_size": 8, "eval_iters": 0, "clip_grad": 0.0}

    def run(name: str, optimizer: str, ranks: int = 1, expected: int = 0, **also: Any) -> None:
        settings = corpus.settings(**more, save=str(tmp_path / name), optimizer=optimizer, **also)
        if ranks > 1:
            return run_ranks(lambda: pretrain(settings), ranks, initialize=False, timeout=200) and None
        assert exit_code_of(lambda: pretrain(settings)) == expected
        return None

    run("whole", "adam")
    for first, second in ((engines.TE_ADAM, engines.TE_ADAM), ("adam", engines.APEX_ADAM), (engines.APEX_ADAM, "adam")):
        name = f"{first} {second}"
        run(name, first, expected=75, exit_interval=3)
        run(name, second)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5), name
        stored = stored_tensors(tmp_path / name)
        assert {float(value) for key, value in stored.items() if key.endswith(".step")} == {6.0}
    # an engine's own state through another layout, bit for bit, and a step on that layout
    kept = tmp_path / f"{engines.TE_ADAM} {engines.TE_ADAM}"
    shutil.copytree(kept, tmp_path / "moved")
    cut = {"tensor_model_parallel_size": 2, "data_parallel_sharding": "full"}
    run("moved", engines.TE_ADAM, ranks=4, **cut)
    assert [name for name in differences(kept, tmp_path / "moved") if not name.startswith("random.")] == []
    more["train_iters"] = 8
    run("moved", engines.TE_ADAM, ranks=4, **cut)
    run("whole", "adam")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_cannot_serve_is_refused_with_every_reason(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = engines._ADAMS[engine][0].partition(".")[0]
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, why in (("cpu", "it serves on cuda, not on cpu"), ("cuda", "no CUDA device on this machine")):
        with pytest.raises(EnvironmentProblem, match=f"{engine} cannot serve on {device}") as problem:
            require_optimizer(OptimizerConfig(optimizer=engine), device)
        assert problem.value.got == f"{package} is not installed; {why}"
    with pytest.raises(EnvironmentProblem, match="--optimizer adam"):
        TrainingOptimizer(Model(), OptimizerConfig(optimizer=engine))
    assert dict(optimizer_rows())[f"optimizer {engine}"].startswith(f"cannot serve: {package} is not installed")
    assert entry.main(["environment"]) == 0
    assert f"optimizer {engine}" in capsys.readouterr().out


def test_an_apex_without_its_cuda_part_is_a_reason(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "amp_C")
    assert engines.adam_problems(engines.APEX_ADAM, "cuda") == ["amp_C is not installed"]
    assert dict(optimizer_rows("cuda"))["optimizer te-adam"].startswith("at hand")


def test_a_run_that_asks_for_it_ends_before_the_model_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--optimizer", "te-adam", "--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "2"]
    words += ["--seq-length", "16", "--train-iters", "1", "--data-path", str(tmp_path / "absent")]
    words += ["--tokenizer-type", "ByteTokenizer", "--save", str(tmp_path / "run")]
    assert entry.main(["pretrain", *words]) == 2
    shown = capsys.readouterr().err
    assert "--optimizer te-adam cannot serve on cpu" in shown and "Traceback" not in shown


def test_a_stage_that_is_frozen_needs_no_engine(stand_ins: None) -> None:
    model = Model().requires_grad_(False)
    trained = TrainingOptimizer(model, OptimizerConfig(optimizer=engines.TE_ADAM))
    assert not isinstance(trained.inner, EngineAdam) and trained.update(torch.tensor(0.0), 0.1).applied


@pytest.mark.parametrize("engine", ENGINES)
def test_the_package_itself_on_a_device(engine: str) -> None:
    reasons = engines.adam_problems(engine, "cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    torch.manual_seed(0)
    models = {name: Model().cuda() for name in ("adam", engine)}
    models[engine].load_state_dict(models["adam"].state_dict())
    states = {}
    for name, model in models.items():
        trained = TrainingOptimizer(model, OptimizerConfig(optimizer=name, weight_decay=0.3))
        for step in range(5):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            trained.update(torch.tensor(1.0), 0.01)
        states[name] = {key: value.cpu() for key, value in whole_state(model, trained).items()}
    torch.testing.assert_close(states[engine], states["adam"], rtol=1e-5, atol=1e-6)
