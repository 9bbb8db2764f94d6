"""What scales the cross-attention: a fixed number, a learned one, one for each head, or a decision per chunk.

An adaptive gate that is only charged for reading ends at zero, unnoticed: its slope p(1-p) vanishes there. The budget
here is the divergence of the mean rate from a target rate, whose slope in the gate's logit stays the target itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.ops.local_tensors import local


class ScalarGate(nn.Module):
    """tanh of one number that starts at 0: at first the model is the GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        return torch.tanh(local(self.value))


class HeadGate(nn.Module):
    """tanh of one number per head, each 0 at first: which heads read neighbours well is soon told."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.empty(num_heads))

    def forward(self) -> Tensor:
        """[N, 1]: the factors of what these heads read."""
        return torch.tanh(local(self.heads))[:, None]


class AdaptiveGate(nn.Module):
    """A rate per chunk, read off the decoder's state at the chunk's last token (the first that may see neighbours)."""

    def __init__(self, hidden_size: int, config: RetroConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(1))
        self.target_rate = config.retro_gate_target_rate
        self.budget_scale = config.retro_gate_budget_weight
        self.last_rates: Tensor | None = None
        self.budget_loss: Tensor | float = 0.0  # summed since it was last set to zero

    def forward(self, states_BCH: Tensor) -> Tensor:
        """[..., C] in (0, 1), one rate per state; in training the budget's gradient is attached."""
        scores = (states_BCH * local(self.weight)).sum(-1) + local(self.bias)
        rates = torch.sigmoid(scores)
        if self.training and scores.numel():
            budget = self.budget_scale * rate_divergence(scores, self.target_rate)
            rates = attach_auxiliary_loss(rates, budget, self._record)
        self.last_rates = rates.detach()
        return rates

    def _record(self, loss: Tensor) -> None:
        self.budget_loss = self.budget_loss + loss


def gate_of(config: ModelConfig, retro: RetroConfig) -> AdaptiveGate | HeadGate | ScalarGate | None:
    """The configured one; None for a fixed number."""
    if retro.retro_gate_type == "scalar":
        return ScalarGate()
    if retro.retro_gate_type == "heads":
        return HeadGate(config.num_attention_heads)
    return AdaptiveGate(config.hidden_size, retro) if retro.retro_gate_type == "adaptive" else None


def set_gate_budgets(module: nn.Module, retro: RetroConfig, step: int, factor: float) -> None:
    """Set what the budget of adaptive gates weighs at this step, for one microbatch; it grows from 0 at first."""
    warmup = retro.retro_gate_budget_warmup
    grown = min(1.0, step / warmup) if warmup > 0 else 1.0
    for part in module.modules():
        if isinstance(part, AdaptiveGate):
            part.budget_scale = retro.retro_gate_budget_weight * grown * factor
            part.budget_loss = 0.0


def budget_losses(module: nn.Module) -> float | None:
    """The budget losses of the gates here since they were set; None where no gate is adaptive."""
    losses = [float(part.budget_loss) for part in module.modules() if isinstance(part, AdaptiveGate)]
    return sum(losses) if losses else None


def rate_divergence(scores: Tensor, target: float) -> Tensor:
    """Kullback-Leibler divergence of the mean rate from the target: 0 at the target, infinite at 0 and 1.

    Computed from the scores (the rates' logits), so that a rate too small for a float still has its slope.
    """
    scores = scores.float().flatten()
    log_count = math.log(len(scores))
    log_open = torch.logsumexp(functional.logsigmoid(scores), 0) - log_count
    log_shut = torch.logsumexp(functional.logsigmoid(-scores), 0) - log_count
    return target * (math.log(target) - log_open) + (1 - target) * (math.log1p(-target) - log_shut)


def attach_auxiliary_loss(tensor: Tensor, loss: Tensor, record: Callable[[Tensor], None]) -> Tensor:
    """The tensor, whose backward pass adds the loss and records it (once, also with recomputation)."""
    attached: Tensor = _AttachAuxiliaryLoss.apply(tensor, loss, record)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return attached


class _AttachAuxiliaryLoss(torch.autograd.Function):
    """Passes a tensor through; the backward pass adds a second loss, on whatever stage it arose."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, loss: Tensor, record: Callable[[Tensor], None]) -> Tensor:
        context.save_for_backward(loss)
        context.record = record
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = context.saved_tensors
        context.record(loss.detach())
        return gradient, torch.ones_like(loss), None
