"""Updates against the published formulas in float64, the norm over all axes, schedules at their corners."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_retro.config.training import OptimizerConfig, TrainingConfig, schedule_violations
from megatron_retro.errors import ConfigError
from megatron_retro.optim.clipping import squared_norm
from megatron_retro.optim.groups import decays, part_of
from megatron_retro.optim.optimizer import LossScale, TrainingOptimizer
from megatron_retro.optim.schedule import batch_size_schedule, learning_rate, run_length
from megatron_retro.testing.processes import run_ranks


class Model(nn.Module):
    """A few parameters with the names that matter."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.attention = nn.Linear(4, 4)
        layer.input_norm = nn.LayerNorm(4)
        layer.cross_attention = nn.Linear(4, 4, bias=False)
        self.layers = nn.ModuleDict({"0": layer})
        self.encoder = nn.Linear(4, 3)


def adam_reference(
    value: Tensor, gradients: list[Tensor], rate: float, decay: float, config: OptimizerConfig
) -> Tensor:
    """AdamW as Loshchilov and Hutter write it, in float64."""
    value, first, second = value.double(), torch.zeros_like(value).double(), torch.zeros_like(value).double()
    for step, gradient in enumerate(gradients, 1):
        value = value - rate * decay * value
        first = config.adam_beta1 * first + (1 - config.adam_beta1) * gradient.double()
        second = config.adam_beta2 * second + (1 - config.adam_beta2) * gradient.double() ** 2
        corrected = second / (1 - config.adam_beta2**step)
        value = value - rate * first / (1 - config.adam_beta1**step) / (corrected.sqrt() + config.adam_eps)
    return value


def test_updates_are_adamw_with_rates_and_decay_of_each_group() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(weight_decay=0.3, clip_grad=0.0, lr_scale_encoder=0.5, lr_scale_cross_attention=2.0)
    model = Model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = TrainingOptimizer(model, config)
    gradients: dict[str, list[Tensor]] = {name: [] for name in start}
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].append(parameter.grad.clone())
        assert optimizer.update(squared_norm(model.parameters()), 0.01).applied
    scales = {"decoder": 1.0, "encoder": 0.5, "cross_attention": 2.0}
    for name, parameter in model.named_parameters():
        decay = 0.3 if name in ("layers.0.attention.weight", "layers.0.cross_attention.weight", "encoder.weight") else 0
        expected = adam_reference(start[name], gradients[name], 0.01 * scales[part_of(name)], decay, config)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "part", "expected"),
    [
        ("embedding.word.weight", (9, 4), "decoder", True),
        ("layers.3.attention.query_key_value.bias", (2, 12), "decoder", False),
        ("layers.3.attention.query_norm.weight", (4,), "decoder", False),
        ("layers.3.cross_norm.weight", (4,), "cross_attention", False),
        ("layers.3.cross_attention.key_value.weight", (2, 8, 4), "cross_attention", True),
        ("layers.3.cross_attention.gate.weight", (4, 4), "gate", False),
        ("encoder.layers.0.cross_attention.query.weight", (2, 8, 4), "encoder", True),
        ("output.weight", (9, 4), "decoder", True),
        ("layers.3.attention.query_key_value.ia3.weight", (2, 8), "decoder", False),
        ("layers.3.attention.query_key_value.lora.down.weight", (2, 8), "decoder", True),
    ],
)
def test_every_parameter_has_its_part_and_decay(name: str, shape: tuple[int, ...], part: str, expected: bool) -> None:
    assert part_of(name) == part
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_clipping_scales_the_whole_gradient_to_the_limit() -> None:
    model = Model()
    optimizer = TrainingOptimizer(model, OptimizerConfig(clip_grad=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    whole = math.sqrt(sum(9.0 * parameter.numel() for parameter in model.parameters()))
    seen: list[float] = []
    optimizer.inner.register_step_pre_hook(
        lambda inner, args, kwargs: seen.append(math.sqrt(squared_norm(model.parameters()).item()))
    )
    update = optimizer.update(squared_norm(model.parameters()), 0.1)
    assert update.clipped and update.gradient_norm == pytest.approx(whole)
    assert seen == [pytest.approx(1.0, rel=1e-5)]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = Model()
    optimizer = TrainingOptimizer(model, OptimizerConfig())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.encoder.weight.grad[0, 0] = float("nan")
    update = optimizer.update(squared_norm(model.parameters()), 0.1)
    assert not update.applied and update.gradient_norm == math.inf
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_the_norm_of_a_cut_model_is_that_of_the_whole() -> None:
    """Two axes of two ranks: shards along either, copies along the other; every parameter counts once."""
    torch.manual_seed(1)
    whole = {"rows": torch.randn(6, 4), "columns": torch.randn(6, 4), "both": torch.randn(8, 8), "copy": torch.randn(5)}
    expected = sum(tensor.double().square().sum().item() for tensor in whole.values())

    def on_a_rank() -> float:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        places = {
            "rows": [Replicate(), Shard(0)],
            "columns": [Shard(1), Replicate()],
            "both": [Shard(0), Shard(1)],
            "copy": [Replicate(), Replicate()],
        }
        parameters = []
        for name, tensor in whole.items():
            cut = distribute_tensor(tensor, mesh, places[name])
            parameter = nn.Parameter(cut)
            parameter.grad = DTensor.from_local(cut.to_local().clone(), mesh, places[name], run_check=False)
            parameters.append(parameter)
        return squared_norm(parameters).item()

    assert run_ranks(on_a_rank, 4) == [pytest.approx(expected, rel=1e-6)] * 4


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_window() -> None:
    scale = LossScale(1024.0, window=3)
    scale.update(False)
    assert scale.scale == 512
    for _ in range(3):
        scale.update(True)
    assert scale.scale == 1024
    other = LossScale(1.0, 3)
    other.load_state(scale.state())
    assert other == scale


def test_scaled_gradients_train_as_unscaled_ones() -> None:
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    configs = [OptimizerConfig(), OptimizerConfig(fp16=True, initial_loss_scale=256.0)]
    for model, config in zip(models, configs, strict=True):
        optimizer = TrainingOptimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01) * optimizer.loss_scale.scale
        optimizer.update(squared_norm(model.parameters()), 0.1)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def rate(style: str, samples: int, **more: object) -> float:
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, **more)  # type: ignore[arg-type]
    return learning_rate(optimizer, TrainingConfig(train_samples=1000)).at(samples)


def test_rates_at_the_corners_of_every_style() -> None:
    assert rate("cosine", 50, lr_warmup_samples=100) == pytest.approx(0.5)
    assert rate("cosine", 100, lr_warmup_samples=100) == pytest.approx(1.0)
    assert rate("cosine", 550, lr_warmup_samples=100) == pytest.approx(0.55)
    assert rate("cosine", 1000) == pytest.approx(0.1)
    assert rate("cosine", 5000) == pytest.approx(0.1)
    assert rate("linear", 250) == pytest.approx(0.1 + 0.9 * 0.75)
    assert rate("constant", 900) == 1.0
    assert rate("WSD", 899, lr_wsd_decay_samples=100) == pytest.approx(1.0)
    assert rate("WSD", 950, lr_wsd_decay_samples=100) == pytest.approx(0.55)
    assert rate("cosine", 100, lr_decay_samples=100) == pytest.approx(0.1)
    assert rate("cosine", 4, lr_warmup_iters=1) == pytest.approx(0.5), "a step is one batch of 8"


@pytest.mark.parametrize("warmup", [0, 100])
@pytest.mark.parametrize("final", ["linear", "cosine", "exponential", "minus_sqrt"])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_rates_are_megatrons(style: str, final: str, warmup: int) -> None:
    """Of core 0.15.3, written down a second time: at the end of a step, where it has them at its beginning."""
    coefficients = {
        "linear": lambda ratio: 1.0 - ratio,
        "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
        "exponential": lambda ratio: 2.0 * math.pow(0.5, ratio) - 1.0,
        "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
    }
    for samples in range(0, 1200, 37):
        expected = 0.1 if samples > 1000 and style != "constant" else 1.0
        if warmup and samples <= warmup:
            expected = samples / warmup
        elif samples <= 1000 and style == "inverse-square-root":
            expected = max(0.1, max(warmup, 1) ** 0.5 / max(samples, 1) ** 0.5)
        elif samples <= 1000 and style == "WSD":
            expected = 0.1 + 0.9 * (coefficients[final]((samples - 800) / 200) if samples > 800 else 1.0)
        elif samples <= 1000 and style != "constant":
            expected = 0.1 + 0.9 * coefficients[style]((samples - warmup) / (1000 - warmup))
        more = {"lr_warmup_samples": warmup, "lr_wsd_decay_iters": 25, "lr_wsd_decay_style": final}
        assert rate(style, samples, **more) == pytest.approx(expected), samples


def test_the_batch_grows_by_its_increments_and_the_run_has_its_length() -> None:
    config = TrainingConfig(global_batch_size=32, rampup_batch_size=(8, 8, 300), train_iters=40)
    schedule = batch_size_schedule(config)
    assert [schedule.at(samples) for samples in (0, 99, 100, 199, 200, 299, 300, 10_000)] == [
        8, 8, 16, 16, 24, 24, 32, 32,
    ]  # fmt: skip
    samples = 0
    for _ in range(40):
        samples += schedule.at(samples)
    assert run_length(config) == samples


def test_every_broken_rule_is_reported() -> None:
    optimizer = OptimizerConfig(lr=0.1, min_lr=0.2, bf16=True, fp16=True, lr_decay_samples=5, lr_decay_iters=5)
    found = schedule_violations(optimizer, TrainingConfig(rampup_batch_size=(3, 2, 10)))
    assert {violation.field for violation in found} == {
        "min_lr",
        "fp16",
        "lr_decay_samples",
        "rampup_batch_size",
    }
    with pytest.raises(ConfigError, match="the run has no length"):
        run_length(TrainingConfig())
