"""One update of the parameters: norm, verdict, clipping, AdamW, loss scale.

Parameters are float32 whatever the model computes in, so they are their own master weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_retro.config.training import OptimizerConfig
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops.engines import APEX_ADAM, TE_ADAM, adam_problems, fused_adam, state_row
from megatron_retro.ops.local_tensors import local
from megatron_retro.optim.clipping import clip_factor, scale_gradients
from megatron_retro.optim.groups import parameter_groups

TORCH_ADAM = "adam"
_SMALLEST_SCALE, _LARGEST_SCALE = 1.0, 2.0**24
_INSTALL: Mapping[str, str] = {
    TE_ADAM: "pip install 'megatron-retro[gpu]' on a machine with a GPU",
    APEX_ADAM: "build Apex from NVIDIA/apex with its C++ and CUDA extensions (`apex` on PyPI is another project)",
}


@dataclass(frozen=True)
class Update:
    """What one update did."""

    gradient_norm: float
    learning_rate: float
    applied: bool
    clipped: bool
    loss_scale: float


def require_optimizer(config: OptimizerConfig, device: str) -> None:
    """Refuse, with all reasons, an engine's Adam that cannot serve on this type of device."""
    if config.optimizer == TORCH_ADAM:
        return
    reasons = adam_problems(config.optimizer, device)
    if reasons:
        raise EnvironmentProblem(
            f"--optimizer {config.optimizer} cannot serve on {device}",
            got="; ".join(reasons),
            fix=f"{_INSTALL[config.optimizer]}, or use --optimizer {TORCH_ADAM}",
        )


def optimizer_rows(device: str = "cpu") -> list[tuple[str, str]]:
    """Every optimizer and whether it can serve, for the table that is printed at start."""
    rows = [(f"optimizer {TORCH_ADAM}", "torch: fused AdamW, serves unless another is asked for")]
    return rows + [(f"optimizer {name}", state_row(adam_problems(name, device))) for name in _INSTALL]


def build_torch_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, or an engine's when it is asked for by name and can serve."""
    groups = parameter_groups(named, config)
    if groups and config.optimizer != TORCH_ADAM:
        require_optimizer(config, groups[0]["params"][0].device.type)
        return EngineAdam(fused_adam(config.optimizer), groups, config)
    # a pipeline stage may be frozen as a whole
    nothing = {"params": [], "weight_decay": 0.0, "rate_scale": 1.0, "group_name": "nothing"}
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups or [nothing], lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


class TrainingOptimizer:
    """AdamW with everything around it; holds no random state and reaches no collective."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.inner = build_torch_optimizer(module.named_parameters(), config)
        scale = config.initial_loss_scale if config.fp16 else 1.0
        self.loss_scale = LossScale(scale, config.loss_scale_window if config.fp16 else 0)

    def update(
        self, squared_norm: Tensor | float, learning_rate: float, *, finite: bool = True, acceptable: bool = True
    ) -> Update:
        """Apply the gradients, unless they are not finite or the caller finds the step not acceptable.

        `squared_norm` is that of the scaled gradients over all axes. `finite` is what all ranks found together: copies
        of one gradient can be broken on one rank alone.
        """
        scale = self.loss_scale.scale
        square = float(squared_norm)
        norm = math.sqrt(square) / scale if math.isfinite(square) else math.inf
        finite = finite and math.isfinite(norm)
        factor = clip_factor(norm, self.config.clip_grad) if finite else 1.0
        applied = finite and acceptable
        if applied:
            scale_gradients(self.parameters, factor / scale)
            self._step(learning_rate)
        self.loss_scale.update(finite)
        self.inner.zero_grad(set_to_none=True)
        return Update(norm, learning_rate, applied, factor < 1.0, scale)

    def _step(self, learning_rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = learning_rate * group["rate_scale"]
        self.inner.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint's JSON keeps (moments are tensors and kept apart)."""
        return {"loss_scale": self.loss_scale.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss_scale.load_state(state["loss_scale"])


class EngineAdam(torch.optim.Optimizer):
    """AdamW whose arithmetic is the `FusedAdam` of TransformerEngine or Apex, behind the face of torch's.

    FusedAdam counts steps by group where torch counts them by parameter, knows plain tensors only, and does not survive
    an empty one. So it is lent this rank's part of every tensor for the length of a step, while groups, moments and
    counts stay laid out as torch lays them out: a checkpoint does not know which of the three wrote it.
    """

    def __init__(self, fused_adam: Any, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_eps,
        }
        super().__init__(groups, {**settings, "weight_decay": 0.0})
        self._lent: dict[Tensor, Tensor] = {}
        lent_groups = [self._lent_group(group) for group in self.param_groups]
        # the engines fault on tensors without elements, which a small parameter cut over many ranks has
        self._pairs = [pair for pair in zip(self.param_groups, lent_groups, strict=True) if pair[1]["params"]]
        lent_groups = [lent for _, lent in self._pairs]
        self._engine = fused_adam(lent_groups, **settings, adam_w_mode=True) if lent_groups else None

    def _lent_group(self, group: dict[str, Any]) -> dict[str, Any]:
        parts = {parameter: local(parameter).detach() for parameter in group["params"]}
        self._lent |= parts
        return {
            "params": [part for part in parts.values() if part.numel()],
            "weight_decay": group["weight_decay"],
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's may return a loss
        """One update of every parameter that has a gradient."""
        by_count: dict[int, list[Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_count.setdefault(int(self._state_of(parameter)["step"]), []).append(parameter)
        # one round as a rule: parameters that missed a gradient now and then have counts of their own
        for count, parameters in by_count.items():
            for parameter in parameters:
                self._lend(parameter)
            self._step_from(count)
            for parameter in parameters:
                self._lent[parameter].grad = None
                self.state[parameter]["step"] += 1

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _lend(self, parameter: Tensor) -> None:
        """The tensors of now: a sharded model or a loaded state may have put others in the place of the first."""
        part, gradient = self._lent[parameter], parameter.grad
        if self._engine is None or gradient is None or not part.numel():
            return
        part.data = local(parameter).detach()
        part.grad = local(gradient).contiguous()
        moments = {name: local(value) for name, value in self.state[parameter].items() if name != "step"}
        self._engine.state[part] = moments

    def _step_from(self, count: int) -> None:
        if self._engine is None:
            return
        for (group, _), engine_group in zip(self._pairs, self._engine.param_groups, strict=True):
            engine_group["lr"], engine_group["step"] = group["lr"], count
        self._engine.step()


@dataclass
class LossScale:
    """Of fp16 losses: halved after a step that overflowed, doubled after `window` that did not (0: kept as it is).

    torch's GradScaler decides from the gradients that one rank holds; here the decision comes from the norm over all
    axes, so every rank takes the same one, and the state is two numbers in a checkpoint's JSON.
    """

    scale: float
    window: int
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Learn from one step."""
        if self.window == 0:
            return
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, _SMALLEST_SCALE), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.scale, self.good_steps = min(self.scale * 2, _LARGEST_SCALE), 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
