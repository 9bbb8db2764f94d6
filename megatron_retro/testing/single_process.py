"""A whole model in one process, without mesh, stages or wrappers: the reference that every layout is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_retro.assembly.parallel_model import GATE_BUDGET, StepResult
from megatron_retro.assembly.stage_building import compute_dtype, freeze, trained_parts, uses_peft
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.microbatch import Microbatch
from megatron_retro.model.gates import budget_losses, set_gate_budgets
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.optim.clipping import squared_norm
from megatron_retro.parallel.layer_transforms import multiply_in_fp8, recompute_layers
from megatron_retro.peft.attach import attach, connect, is_added
from megatron_retro.peft.attach import initialize as initialize_added


def one_process(settings: Settings, device: torch.device) -> SingleProcess:
    """The whole model with its first values."""
    model, retro, training = settings[ModelConfig], settings[RetroConfig], settings[TrainingConfig]
    module = Retro(model, retro).to(device)
    initialize(module, model, retro, training.seed)
    if uses_peft(settings):
        attach(module, settings[PeftConfig])
        connect(module)
        initialize_added(module, training.seed)
    freeze(module, trained_parts(settings))
    if settings[OptimizerConfig].fp8_format != "none":
        multiply_in_fp8(module, device, exempt=is_added)
    recompute_layers(module, settings[ParallelConfig].recompute_granularity)
    return SingleProcess(module, device, compute_dtype(settings[OptimizerConfig]))


class SingleProcess:
    """Trains a model on one device; parameters stay float32, `compute_dtype` is what they are used in."""

    data_rank = 0
    data_size = 1

    def __init__(self, module: Retro, device: torch.device, compute_dtype: torch.dtype = torch.float32) -> None:
        self.module: nn.Module = module
        self.device = device
        self._retro = module.retro
        self._compute_dtype = compute_dtype

    def train_step(
        self, microbatches: Sequence[Microbatch[Tensor]], *, loss_scale: float = 1.0, step: int = 0
    ) -> StepResult:
        """Gradients of the mean loss over all unmasked tokens of all microbatches, times `loss_scale`."""
        self.module.train()
        num_tokens = int(sum(batch.loss_mask_BS.sum() for batch in microbatches))
        set_gate_budgets(self.module, self._retro, step, loss_scale / len(microbatches))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in microbatches:
            part = (self._losses(replace(batch, labels_BS=batch.counted_labels())) * batch.loss_mask_BS).sum()
            (part * (loss_scale / max(num_tokens, 1))).backward()  # type: ignore[no-untyped-call]
            loss_sum += part.detach().double()
        budgets = budget_losses(self.module)
        extra = {} if budgets is None else {GATE_BUDGET: budgets / loss_scale}
        return StepResult(loss_sum.item(), float(num_tokens), extra)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch[Tensor]]) -> list[Tensor]:
        """Loss of every token of every microbatch."""
        was_training = self.module.training
        self.module.eval()
        losses = [self._losses(batch).float().cpu() for batch in microbatches]
        self.module.train(was_training)
        return losses

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of all gradients."""
        return squared_norm(self.module.parameters())

    def _losses(self, batch: Microbatch[Tensor]) -> Tensor:
        parameters = {}
        if self._compute_dtype != torch.float32:
            parameters = {name: value.to(self._compute_dtype) for name, value in self.module.named_parameters()}
        losses: Tensor = functional_call(
            self.module,
            parameters,
            (batch.tokens_BS, batch.neighbors),
            {
                "labels_BS": batch.labels_BS,
                "position_ids_BS": batch.position_ids_BS,
                "document_ids_BS": batch.document_ids_BS,
            },
        )
        return losses
