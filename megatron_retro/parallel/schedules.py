"""Pipeline schedules of `torch.distributed.pipelining` over this rank's stages; they decide the order, we the stages.

Shapes on the boundaries are told beforehand, so no schedule runs the model to find them. One schedule serves all steps
with the same number of microbatches and the same boundary; others are made when they are needed.

What a rank holds does not grow with the number of microbatches: a buffer to receive into lives from its receive to the
end of the backward that needs it (torch allocates one for each microbatch, once for each schedule, for good), what is
sent lives until a later send (torch waits for none before the end of a step, and a send that nobody waited for keeps
its tensor), and parameters that are whole within a step are gathered once (torch keeps three stages whole and gathers
the others again).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from megatron_retro.parallel.data_parallel import reduce_in_backward, reduce_what_is_left
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


_SENDS_UNDER_WAY = 2


class BoundedStage(PipelineStage):
    """torch's stage, whose buffers exist while they are needed: from a receive to the backward of its microbatch.

    With `waits_for_sends` it sends by itself, when its schedule asks what to send, and then waits for what it sent two
    sends ago. Whoever receives that has been told to before this send, so nobody waits for another in a circle.
    """

    waits_for_sends = False

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._sends: deque[list[dist.Work]] = deque()

    def _sent(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """What is left to send."""
        if not self.waits_for_sends or not ops:
            return ops
        self._sends.append(torch_schedules._batch_p2p(ops))
        self._wait_for_sends(but=_SENDS_UNDER_WAY)
        return []

    def _wait_for_sends(self, but: int = 0) -> None:
        while len(self._sends) > but:
            torch_schedules._wait_batch_p2p(self._sends.popleft())

    def clear_runtime_states(self) -> None:
        """A step begins, or an evaluation has ended."""
        self._wait_for_sends()
        super().clear_runtime_states()

    def _prepare_forward_infra(self, *arguments: Any, **keywords: Any) -> Any:
        return self._described(super()._prepare_forward_infra, *arguments, **keywords)

    def _prepare_backward_infra(self, *arguments: Any, **keywords: Any) -> Any:
        return self._described(super()._prepare_backward_infra, *arguments, **keywords)

    def _described(self, prepare: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Let torch make its buffers on the meta device: descriptions, without memory."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*arguments, **keywords)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive a microbatch's input into new buffers."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        ops: list[dist.P2POp] = super().get_fwd_recv_ops(fwd_chunk_id)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the gradient of a microbatch's output into new buffers."""
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        ops: list[dist.P2POp] = super().get_bwd_recv_ops(bwd_chunk_id)
        return ops

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """The next stage is on this rank; where it has no gradient torch fills the buffer with zeros."""
        pairs = zip(self.grad_recv_info[mb_index], next_stage_bwd_outputs, strict=True)
        self._allocate(info for info, gradient in pairs if gradient is None)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        """Without a backward, nothing is kept but what is sent."""
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)
        if not (self.has_backward and torch.is_grad_enabled()):
            self._release(self.args_recv_info[fwd_chunk_id])
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a microbatch's output; without a backward it is not kept."""
        ops: list[dist.P2POp] = super().get_fwd_send_ops(fwd_chunk_id)
        if not (self.has_backward and torch.is_grad_enabled()):
            self.fwd_cache.pop(fwd_chunk_id)
        return self._sent(ops)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradient of a microbatch's input."""
        ops: list[dist.P2POp] = super().get_bwd_send_ops(bwd_chunk_id)
        return self._sent(ops)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        """What was received for this microbatch has served; autograd holds what deferred gradients still need."""
        super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
        self._release(self.args_recv_info[bwd_chunk_id])
        self._release(self.grad_recv_info.get(bwd_chunk_id, ()))

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """In a step's last backward each layer's gradients are reduced as they come, beside the products of others.

        torch reduces them all behind it. Deferred gradients come later than a layer's backward ends, so they wait.
        """
        if not (last_backward and isinstance(self.submod, FSDPModule)) or self.dw_builder is not None:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        reduce_in_backward(self.submod)
        received = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]
        return stage_backward(*received), None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce what is left, and wait for nothing: who runs the schedule does, when all stages are done."""
        if isinstance(self.submod, FSDPModule):
            reduce_in_backward(self.submod)
            reduce_what_is_left(self.submod)

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _release(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=False)


class ForwardOnly(_PipelineScheduleRuntime):
    """Every microbatch through all stages, without a backward, on any number of stages per rank.

    torch has such a schedule for one stage per rank only, and its check of an order wants backwards. Parameters that
    are whole within a step stay so after it; who evaluates shards them again when all is done.
    """

    def __init__(self, stages: list[PipelineStage], num_microbatches: int, *, gather_once: bool) -> None:
        super().__init__(stages, num_microbatches)  # type: ignore[no-untyped-call]
        ranks, num_stages = stages[0].group_size, stages[0].num_stages
        self.pipeline_order_with_comms = forward_order(ranks, num_stages, num_microbatches, gather_once=gather_once)

    def step(self, *arguments: Any, **keywords: Any) -> Any:
        """One group of microbatches; keeps nothing of it."""
        outputs = super().step(*arguments, **keywords)
        self.unsharded_stages.clear()
        for stage in self._stages:
            stage.clear_runtime_states()
        return outputs


def forward_order(ranks: int, num_stages: int, num_microbatches: int, *, gather_once: bool) -> dict[int, list[_Action]]:
    """What each rank does in an evaluation: one stage after the other, all microbatches through each."""
    forwards = {
        rank: [
            _Action(stage, _ComputationType.FORWARD, microbatch)
            for stage in range(rank, num_stages, ranks)
            for microbatch in range(num_microbatches)
        ]
        for rank in range(ranks)
    }
    gathered = {rank: _add_unshard_reshard(list(actions)) for rank, actions in forwards.items()}
    if gather_once:
        gathered = {rank: gathered_once(actions, reshard=False) for rank, actions in gathered.items()}
    return _add_send_recv(gathered, lambda stage: stage % ranks, num_stages)


def gathered_once(actions: Sequence[_Action], *, reshard: bool = True) -> list[_Action]:
    """An order in which each stage's parameters are gathered before their first use, and freed at the end or kept."""
    kept: list[_Action] = []
    whole: dict[int, None] = {}
    for action in actions:
        if action.computation_type == _ComputationType.RESHARD:
            continue
        if action.computation_type == _ComputationType.UNSHARD:
            if action.stage_index in whole:
                continue
            whole[action.stage_index] = None
        kept.append(action)
    return kept + [_Action(stage, _ComputationType.RESHARD, None) for stage in whole if reshard]


def build_schedule(
    kind: str,
    stages: Sequence[Stage],
    num_microbatches: int,
    boundary: Boundary,
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    training: bool,
    gather_once: bool,
) -> Any:
    """The schedule over this rank's stages for steps of this shape.

    With `gather_once`, parameters are gathered once per step instead of for each use.
    """
    torch_stages: list[Any] = [_torch_stage(stage, boundary, device, group, training) for stage in stages]
    for stage in torch_stages:  # schedules of one stage each wait by themselves, and send and receive as one
        stage.waits_for_sends = not training or kind not in ("gpipe", "1f1b")
    if not training:
        return ForwardOnly(torch_stages, num_microbatches, gather_once=gather_once)
    options: dict[str, Any] = {"loss_fn": _loss_as_given, "scale_grads": False}
    few = num_microbatches < torch_stages[0].num_stages  # then 1F1B's order is GPipe's, and torch's 1F1B refuses
    if kind == "gpipe" or (kind == "1f1b" and few):
        return ScheduleGPipe(torch_stages[0], num_microbatches, **options)
    if kind == "1f1b":
        return Schedule1F1B(torch_stages[0], num_microbatches, **options)
    interleaved = ScheduleInterleaved1F1B if kind == "interleaved" else ScheduleInterleavedZeroBubble
    schedule = interleaved(torch_stages, num_microbatches, **options)
    if gather_once:
        order = schedule.pipeline_order_with_comms
        schedule.pipeline_order_with_comms = {rank: gathered_once(actions) for rank, actions in order.items()}
    return schedule


def _torch_stage(
    stage: Stage, boundary: Boundary, device: torch.device, group: dist.ProcessGroup, training: bool
) -> PipelineStage:
    part = stage.part
    inputs = () if part.first else boundary.tensors(part.receives_neighbors)
    losses = torch.empty(() if training else boundary.losses, dtype=torch.float32, device="meta", requires_grad=True)
    outputs = losses if part.last else boundary.tensors(part.sends_neighbors)
    return BoundedStage(
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
