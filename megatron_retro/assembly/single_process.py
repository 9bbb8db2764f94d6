"""A whole model in one process: the plainest way to train, and the reference that every layout is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_retro.assembly.trainable import StepResult, TensorBatch
from megatron_retro.config.model import RetroConfig
from megatron_retro.model.gates import AdaptiveGate
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.optim.clipping import squared_norm

GATE_BUDGET = "gate budget"


class SingleProcess:
    """Trains a model on one device; parameters stay float32, `compute_dtype` is what they are used in."""

    def __init__(self, module: Retro, device: torch.device, compute_dtype: torch.dtype = torch.float32) -> None:
        self._module = module
        self._device = device
        self._compute_dtype = compute_dtype

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    data_rank = 0
    data_size = 1
    is_reporter = True

    def train_step(self, microbatches: Sequence[TensorBatch], *, loss_scale: float = 1.0, step: int = 0) -> StepResult:
        """Gradients of the mean loss over all unmasked tokens of all microbatches, times `loss_scale`."""
        self._module.train()
        num_tokens = int(sum(batch.loss_mask_BS.sum() for batch in microbatches))
        set_gate_budgets(self._module, self._module.retro, step, loss_scale / len(microbatches))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in microbatches:
            # a label below zero costs the loss no work
            counted = replace(batch, labels_BS=batch.labels_BS.where(batch.loss_mask_BS > 0, -1))
            part = (self._losses(counted) * batch.loss_mask_BS).sum()
            (part * (loss_scale / max(num_tokens, 1))).backward()  # type: ignore[no-untyped-call]
            loss_sum += part.detach().double()
        budgets = charged_budgets(self._module)
        extra = {} if budgets is None else {GATE_BUDGET: budgets / loss_scale}
        return StepResult(loss_sum.item(), float(num_tokens), extra)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[TensorBatch]) -> list[Tensor]:
        """Loss of every token of every microbatch."""
        was_training = self._module.training
        self._module.eval()
        losses = [self._losses(batch).float().cpu() for batch in microbatches]
        self._module.train(was_training)
        return losses

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of all gradients."""
        return squared_norm(self._module.parameters())

    def check_replicas(self) -> None:
        """Nothing is replicated."""

    def _losses(self, batch: TensorBatch) -> Tensor:
        arguments: dict[str, Any] = {
            "labels_BS": batch.labels_BS,
            "position_ids_BS": batch.position_ids_BS,
            "document_ids_BS": batch.document_ids_BS,
        }
        neighbors = neighbors_of(batch)
        parameters = {}
        if self._compute_dtype != torch.float32:
            parameters = {name: value.to(self._compute_dtype) for name, value in self._module.named_parameters()}
        losses: Tensor = functional_call(self._module, parameters, (batch.tokens_BS, neighbors), arguments)
        return losses


def neighbors_of(batch: TensorBatch) -> Neighbors | None:
    """The neighbours of a microbatch as the model takes them."""
    if batch.neighbor_tokens_BCKR is None or batch.neighbor_mask_BCKR is None:
        return None
    return Neighbors(batch.neighbor_tokens_BCKR, batch.neighbor_mask_BCKR)


def set_gate_budgets(module: nn.Module, retro: RetroConfig, step: int, factor: float) -> None:
    """Tell adaptive gates what their budget weighs at this step, for one microbatch; it grows from 0 at first."""
    warmup = retro.retro_gate_budget_warmup
    grown = min(1.0, step / warmup) if warmup > 0 else 1.0
    for part in module.modules():
        if isinstance(part, AdaptiveGate):
            part.budget_scale = retro.retro_gate_budget_weight * grown * factor
            part.charged = 0.0


def charged_budgets(module: nn.Module) -> float | None:
    """What the gates here charged since their budgets were set; None where no gate decides for itself."""
    charged = [float(part.charged) for part in module.modules() if isinstance(part, AdaptiveGate)]
    return sum(charged) if charged else None
