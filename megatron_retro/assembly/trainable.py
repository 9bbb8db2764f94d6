"""What a training loop needs of a model, however it is cut: one step's gradients, and losses of single tokens.

`model_assembly.build_trainable` gives the object for a layout; `SingleProcess` is the case of one process. The loss
of a step is the sum over all unmasked tokens of the GLOBAL batch divided by their number, so it does not depend on
how the batch is shared between ranks or cut into microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorBatch:
    """One microbatch on the device; the fields of `data.batches.Batch` that a model reads."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None
    neighbor_tokens_BCKR: Tensor | None = None
    neighbor_mask_BCKR: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole global batch, the same on every rank."""

    loss_sum: float
    num_tokens: float
    extra_losses: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss of a token."""
        return self.loss_sum / max(self.num_tokens, 1.0)


class Trainable(Protocol):
    """A model (or this rank's part of it) that can be trained and measured."""

    @property
    def module(self) -> nn.Module:
        """This rank's parameters, under the names of the uncut model; what checkpoints and the optimizer read."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads."""
        ...

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is cut."""
        ...

    @property
    def is_reporter(self) -> bool:
        """True on the one rank that writes logs."""
        ...

    def train_step(self, microbatches: Sequence[TensorBatch], *, loss_scale: float = 1.0, step: int = 0) -> StepResult:
        """Forward and backward of this rank's share; leaves complete (reduced) gradients of `loss * loss_scale`.

        Every rank calls it; `step` is for schedules inside the model (the gate's budget).
        """
        ...

    def evaluate(self, microbatches: Sequence[TensorBatch]) -> list[Tensor] | None:
        """Loss of every token, [B, S] float32 on the CPU, one per microbatch, without gradients.

        Every rank calls it; only ranks that hold the end of the model get the losses, others None.
        """
        ...

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of all gradients of the uncut model, each parameter counted once; same on every rank."""
        ...

    def check_replicas(self) -> None:
        """Refuse to go on when parameters that should be the same on several ranks are not; every rank calls it."""
        ...
