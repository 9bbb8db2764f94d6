"""One pipeline stage: the part of the model that a rank holds, as torch's schedules call it.

The boundary carries `(hidden, encoded neighbours)` in residual form: the same on all tensor ranks, or under sequence
parallelism each rank's part of the sequence and of each neighbour. A stage before the first retrieval layer, or behind
the last one, passes hidden states alone. What is passed through is a fresh node of autograd (zero-bubble schedules find
their inputs through it), and a boundary always requires a gradient (they lose gradients silently where it does not).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from megatron_retro.microbatch import Microbatch
from megatron_retro.model.context import SequenceContext
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.gradient_sums import GradientSums
from megatron_retro.parallel.layer_transforms import DeferredWeightGradients
from megatron_retro.parallel.partition import StagePart
from megatron_retro.parallel.randomness import RandomStreams


class Stage(nn.Module):
    """Tokens or a boundary in; a boundary, or losses, out."""

    def __init__(self, model: Retro, part: StagePart, axis: TensorAxis | None) -> None:
        super().__init__()
        self.model = model
        self.part = part
        self.axis = axis
        self.deferred_gradients: DeferredWeightGradients | None = None
        self.gradient_sums: GradientSums | None = None
        self.streams: RandomStreams | None = None
        self.loss_factor: Tensor | float = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64)

    def context(self, batch: Microbatch[Tensor]) -> SequenceContext:
        """Positions, masks and neighbours of a microbatch, the same on every stage."""
        size, length = batch.tokens_BS.shape
        return self.model.prepare(
            size,
            length,
            batch.tokens_BS.device,
            neighbors=batch.neighbors,
            position_ids_BS=batch.position_ids_BS,
            document_ids_BS=batch.document_ids_BS,
            document_bounds_BD=batch.document_bounds_BD,
        )

    def forward(
        self, *received: Tensor, batch: Microbatch[Tensor], number: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """In training the last stage gives the sum of unmasked losses times `loss_factor`, else each token's loss.

        `number` is the microbatch's in the global batch, which random streams begin from.
        """
        if self.streams is not None and self.training and number is not None:
            self.streams.microbatch = int(number[0])
            self.streams.start("embedding")
        context = self.context(batch)
        received = tuple(_boundary(tensor) for tensor in received)
        hidden = self.model.embed(batch.tokens_BS, context) if self.part.first else received[0]
        passed = received[1] if len(received) > 1 else None
        neighbors = passed
        if passed is not None and self.axis is not None and self.part.retrieves:
            neighbors = self.axis.gather(passed)
        hidden, encoded = self.model.run_layers(hidden, neighbors, context)
        if self.part.last:
            return self._losses(hidden, batch)
        if not self.part.sends_neighbors or context.retrieval is None:
            return _boundary(hidden)
        if passed is None:
            assert encoded is not None
            passed = encoded if self.axis is None else self.axis.split(encoded)
        return _boundary(hidden), _boundary(passed)

    def _losses(self, hidden: Tensor, batch: Microbatch[Tensor]) -> Tensor:
        if not self.training:
            return self.model.head(hidden, batch.labels_BS)
        losses_BS = self.model.head(hidden, batch.counted_labels())
        loss_sum = (losses_BS * batch.loss_mask_BS).sum()
        self.loss_sum += loss_sum.detach()
        return loss_sum * torch.as_tensor(self.loss_factor, dtype=loss_sum.dtype)


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


def _flattened(batch: Microbatch[Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    arrays = batch.arrays()
    return list(arrays.values()), tuple(arrays)


def _unflattened(tensors: Iterable[Tensor], names: tuple[str, ...]) -> Microbatch[Tensor]:
    return Microbatch.of_arrays(dict(zip(names, tensors, strict=True)))


# torch's schedules cut the microbatches of a step, which are given as one, through the tree of its tensors
register_pytree_node(Microbatch, _flattened, _unflattened)
