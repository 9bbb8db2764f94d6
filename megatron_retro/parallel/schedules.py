"""Pipeline schedules of `torch.distributed.pipelining` over this rank's stages; they decide the order, we the stages.

Shapes on the boundaries are told beforehand, so no schedule runs the model to find them. One schedule serves all steps
with the same number of microbatches and the same boundary; others are made when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from megatron_retro.parallel.stages import Stage


@dataclass(frozen=True)
class Boundary:
    """Local shapes of what stages exchange; no neighbours in a step without any. Losses are what the last one gives."""

    hidden: tuple[int, ...]
    neighbors: tuple[int, ...] | None
    losses: tuple[int, ...]
    dtype: torch.dtype

    def tensors(self, with_neighbors: bool) -> tuple[Tensor, ...]:
        """Descriptions on the meta device."""
        shapes = [self.hidden]
        if with_neighbors and self.neighbors is not None:
            shapes.append(self.neighbors)
        return tuple(torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True) for shape in shapes)


class ForwardOnly(_PipelineScheduleRuntime):
    """Every microbatch through all stages, without a backward, on any number of stages per rank.

    torch has such a schedule for one stage per rank only, and its check of an order wants backwards.
    """

    def __init__(self, stages: list[PipelineStage], num_microbatches: int) -> None:
        super().__init__(stages, num_microbatches)  # type: ignore[no-untyped-call]
        size, num_stages = stages[0].group_size, stages[0].num_stages
        forwards = {
            rank: [
                _Action(stage, _ComputationType.FORWARD, microbatch)
                for stage in range(rank, num_stages, size)
                for microbatch in range(num_microbatches)
            ]
            for rank in range(size)
        }
        gathered = {rank: _add_unshard_reshard(list(actions)) for rank, actions in forwards.items()}
        self.pipeline_order_with_comms = _add_send_recv(gathered, lambda stage: stage % size, num_stages)


def build_schedule(
    kind: str,
    stages: Sequence[Stage],
    num_microbatches: int,
    boundary: Boundary,
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    training: bool,
) -> Any:
    """The schedule over this rank's stages for steps of this shape."""
    torch_stages: list[Any] = [_torch_stage(stage, boundary, device, group, training) for stage in stages]
    if not training:
        return ForwardOnly(torch_stages, num_microbatches)
    options: dict[str, Any] = {"loss_fn": _loss_as_given, "scale_grads": False}
    few = num_microbatches < torch_stages[0].num_stages  # then 1F1B's order is GPipe's, and torch's 1F1B refuses
    if kind == "gpipe" or (kind == "1f1b" and few):
        return ScheduleGPipe(torch_stages[0], num_microbatches, **options)
    if kind == "1f1b":
        return Schedule1F1B(torch_stages[0], num_microbatches, **options)
    if kind == "interleaved":
        return ScheduleInterleaved1F1B(torch_stages, num_microbatches, **options)
    return ScheduleInterleavedZeroBubble(torch_stages, num_microbatches, **options)


def _torch_stage(
    stage: Stage, boundary: Boundary, device: torch.device, group: dist.ProcessGroup, training: bool
) -> PipelineStage:
    part = stage.part
    inputs = () if part.first else boundary.tensors(part.receives_neighbors)
    losses = torch.empty(() if training else boundary.losses, dtype=torch.float32, device="meta", requires_grad=True)
    outputs = losses if part.last else boundary.tensors(part.sends_neighbors)
    return PipelineStage(
        stage,
        part.index,
        part.num_stages,
        device,
        input_args=inputs,
        output_args=outputs,
        group=group,
        dw_builder=None if stage.deferred_gradients is None else stage.deferred_gradients.pop,
    )


def _loss_as_given(loss: Tensor, target: Tensor) -> Tensor:
    """The last stage computes the loss itself."""
    return loss
