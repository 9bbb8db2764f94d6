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
from megatron_retro.optim.clipping import clip_factor, scale_gradients
from megatron_retro.optim.engine_adam import EngineAdam
from megatron_retro.optim.groups import parameter_groups
from megatron_retro.optim.loss_scale import LossScale

TORCH_ADAM = "adam"
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
        self, squared_norm: Tensor, learning_rate: float, *, finite: bool = True, acceptable: bool = True
    ) -> Update:
        """Apply the gradients, unless they are not finite or the caller finds the step not acceptable.

        `squared_norm` is that of the scaled gradients over all axes. `finite` is what all ranks found together: copies
        of one gradient can be broken on one rank alone.
        """
        scale = self.loss_scale.scale
        norm = math.sqrt(squared_norm.item()) / scale if math.isfinite(squared_norm.item()) else math.inf
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
        """Take up a checkpoint's state."""
        self.loss_scale.load_state(state["loss_scale"])
