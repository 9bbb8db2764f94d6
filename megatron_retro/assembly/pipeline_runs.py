"""Runs microbatches through the pipeline, with a schedule for each shape of step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.microbatch import Microbatch
from megatron_retro.parallel.data_parallel import wait_for_reductions
from megatron_retro.parallel.mesh import PIPELINE, TENSOR, ParallelMesh
from megatron_retro.parallel.stages import Stage

if TYPE_CHECKING:
    from megatron_retro.parallel.schedules import Boundary  # imported where it is used: it brings torch's compiler

# Microbatches of an evaluation that are under way together, per stage: enough to fill the pipeline twice.
EVALUATED_AT_ONCE = 2


class PipelineRuns:
    """The schedules of this rank's stages, made when they are first needed."""

    def __init__(self, settings: Settings, mesh: ParallelMesh, stages: Sequence[Stage], dtype: torch.dtype) -> None:
        self._settings, self._mesh, self._stages, self._dtype = settings, mesh, stages, dtype
        self._schedules: dict[tuple[Any, ...], Any] = {}

    def train(self, microbatches: Sequence[Microbatch[Tensor]], numbers: Tensor) -> None:
        """Forward and backward of all microbatches; every rank of the pipeline calls it."""
        schedule = self._schedule(microbatches, training=True)
        target = torch.zeros(len(microbatches), device=self._mesh.device)
        schedule.step(target=target, return_outputs=False, number=numbers, batch=_joined(microbatches))
        for stage in self._stages:
            wait_for_reductions(stage)

    def evaluate(self, microbatches: Sequence[Microbatch[Tensor]]) -> list[Tensor] | None:
        """Losses of every token on the ranks that hold the last stage; memory does not grow with the microbatches."""
        last, size = self._stages[-1].part, EVALUATED_AT_ONCE * self._stages[-1].part.num_stages
        losses: list[Tensor] = []
        for start in range(0, len(microbatches), size):
            group = microbatches[start : start + size]
            joined = self._schedule(group, training=False).step(batch=_joined(group))
            losses += [] if joined is None else joined.chunk(len(group))
        return losses if last.last else None

    def _schedule(self, microbatches: Sequence[Microbatch[Tensor]], *, training: bool) -> Any:
        from megatron_retro.parallel.schedules import build_schedule

        boundary = self._boundary(microbatches[0])
        key = (len(microbatches), boundary, training)
        if key not in self._schedules:
            self._schedules[key] = build_schedule(
                self._settings[ParallelConfig].pipeline_schedule,
                self._stages,
                len(microbatches),
                boundary,
                self._mesh.device,
                self._mesh.group(PIPELINE),
                training=training,
                gather_once=self._settings[ParallelConfig].sharding() != "full",
            )
        return self._schedules[key]

    def _boundary(self, batch: Microbatch[Tensor]) -> Boundary:
        from megatron_retro.parallel.schedules import Boundary

        model, retro = self._stages[0].model.model, self._settings[RetroConfig]
        cut = self._mesh.size(TENSOR) if self._settings[ParallelConfig].sequence_parallel else 1
        size, length = batch.tokens_BS.shape
        neighbors = None
        context = self._stages[0].context(batch)
        if context.retrieval is not None and context.retrieval.neighbors is not None:
            *leading, retrieved_length = context.retrieval.encoded_shape
            neighbors = (*leading, retrieved_length // cut, retro.encoded_width(model))
        return Boundary((size, length // cut, model.hidden_size), neighbors, (size, length), self._dtype)


def _joined(microbatches: Sequence[Microbatch[Tensor]]) -> Microbatch[Tensor]:
    """All microbatches as one, which the schedule cuts again."""
    return Microbatch.joined(microbatches, lambda tensors: torch.cat(list(tensors)), same_size=True)
