"""The Adam of TransformerEngine or Apex behind the face of torch's AdamW.

Their FusedAdam counts steps by group where torch counts them by parameter, knows plain tensors only, and does not
survive an empty one. So it is lent this rank's part of every tensor for the length of a step, while groups, moments
and counts stay laid out as torch lays them out: a checkpoint does not know which of the three wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_retro.config.training import OptimizerConfig
from megatron_retro.ops.local_tensors import local


class EngineAdam(torch.optim.Optimizer):
    """AdamW whose arithmetic is an engine's `FusedAdam`; parameters are float32 and their own master weights."""

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
