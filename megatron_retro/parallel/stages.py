"""One pipeline stage: the part of the model that a rank holds, as torch's schedules call it.

The boundary carries `(hidden, encoded neighbours)` in residual form: the same on all tensor ranks, or under sequence
parallelism each rank's part of the sequence and of each neighbour. A stage before the first retrieval layer, or behind
the last one, passes hidden states alone. What is passed through is a fresh node of autograd (zero-bubble schedules find
their inputs through it), and a boundary always requires a gradient (they lose gradients silently where it does not).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_retro.model.context import SequenceContext
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.deferred_gradients import DeferredWeightGradients
from megatron_retro.parallel.partition import StagePart
from megatron_retro.parallel.randomness import Streams


class Stage(nn.Module):
    """Tokens or a boundary in; a boundary, or losses, out. Every argument of a microbatch comes by name."""

    def __init__(self, model: Retro, part: StagePart, axis: TensorAxis | None) -> None:
        super().__init__()
        self.model = model
        self.part = part
        self.axis = axis
        self.deferred_gradients: DeferredWeightGradients | None = None
        self.streams: Streams | None = None
        self.loss_factor = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64)

    def context(
        self,
        tokens_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        neighbor_tokens_BCKR: Tensor | None = None,
        neighbor_mask_BCKR: Tensor | None = None,
        **others: Tensor | None,
    ) -> SequenceContext:
        """Positions, masks and neighbours of a microbatch, the same on every stage."""
        neighbors = None
        if neighbor_tokens_BCKR is not None and neighbor_mask_BCKR is not None:
            neighbors = Neighbors(neighbor_tokens_BCKR, neighbor_mask_BCKR)
        return self.model.prepare(
            tokens_BS.shape[0],
            tokens_BS.shape[1],
            tokens_BS.device,
            neighbors=neighbors,
            position_ids_BS=position_ids_BS,
            document_ids_BS=document_ids_BS,
        )

    def forward(
        self,
        *received: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        tokens_BS: Tensor,
        microbatch: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """In training the last stage gives the sum of unmasked losses times `loss_factor`, else each token's loss.

        `microbatch` is the number in the global batch, which random streams begin from.
        """
        if self.streams is not None and self.training and microbatch is not None:
            self.streams.microbatch = int(microbatch[0])
            self.streams.start("embedding")
        context = self.context(tokens_BS, **others)
        received = tuple(_boundary(tensor) for tensor in received)
        hidden = self.model.embed(tokens_BS, context) if self.part.first else received[0]
        passed = received[1] if len(received) > 1 else None
        neighbors = passed
        if passed is not None and self.axis is not None and self.part.retrieves:
            neighbors = self.axis.gather(passed)
        hidden, encoded = self.model.run_layers(hidden, neighbors, context)
        if self.part.last:
            # a label below zero costs the loss no work
            labels_BS = labels_BS.where(loss_mask_BS > 0, -1) if self.training else labels_BS
            losses_BS = self.model.head(hidden, labels_BS)
            return self._training_loss((losses_BS * loss_mask_BS).sum()) if self.training else losses_BS
        if not self.part.sends_neighbors or context.retrieval is None:
            return _boundary(hidden)
        if passed is None:
            assert encoded is not None
            passed = encoded if self.axis is None else self.axis.split(encoded)
        return _boundary(hidden), _boundary(passed)

    def _training_loss(self, loss_sum: Tensor) -> Tensor:
        self.loss_sum += loss_sum.detach()
        return loss_sum * self.loss_factor


class _Border(torch.autograd.Function):
    """What crosses between ranks is contiguous, both ways; the result is a fresh node of autograd."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _boundary(tensor: Tensor) -> Tensor:
    """A fresh node of autograd that requires a gradient."""
    fresh: Tensor = _Border.apply(tensor)  # type: ignore[no-untyped-call]
    return fresh if fresh.requires_grad or not torch.is_grad_enabled() else fresh.requires_grad_()
