"""The model of a run on its layout, ready to train: one step's gradients, and losses of single tokens.

The loss of a step is the sum over all unmasked tokens of the GLOBAL batch divided by their number, so it does not
depend on how the batch is shared between ranks or cut into microbatches.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_retro.assembly.pipeline_runs import PipelineRuns
from megatron_retro.assembly.stage_building import (
    build_stage,
    compute_dtype,
    context_axis,
    draw_first_values,
    tensor_axis,
)
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig
from megatron_retro.microbatch import Microbatch
from megatron_retro.model.gates import budget_losses, set_gate_budgets
from megatron_retro.optim.clipping import squared_norm
from megatron_retro.parallel.cuts import CUTS, Cut
from megatron_retro.parallel.data_parallel import set_gradient_sync
from megatron_retro.parallel.mesh import CONTEXT, DATA, PIPELINE, TENSOR, ParallelMesh, build_mesh
from megatron_retro.parallel.partition import StagePart, describe_stages, stage_parts
from megatron_retro.parallel.sequence_parts import ArrayT, part_of
from megatron_retro.parallel.shared_parameters import require_equal, share_embedding
from megatron_retro.parallel.tensor_parallel import sum_partial_gradients
from megatron_retro.runtime.console import say, warn
from megatron_retro.runtime.process_group import explain_failure, on_axis

GATE_BUDGET = "gate budget"


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole global batch, the same on every rank, and still on the device: to read one is to wait."""

    loss_sum: Tensor | float
    num_tokens: Tensor | float
    extra_losses: dict[str, float]

    @property
    def loss(self) -> float:
        return float(self.loss_sum) / max(float(self.num_tokens), 1.0)


def build_parallel_model(settings: Settings, device: torch.device, *, draw: bool = True) -> ParallelModel:
    """The model on this rank's part of the layout; every rank of the default group calls it.

    Without `draw` its values are still to be given: by a checkpoint, and by `draw_first_values` for the rest.
    """
    mesh = build_mesh(settings[ParallelConfig], device)
    parts = stage_parts(settings, settings[DataConfig].seq_length)
    model = ParallelModel(settings, mesh, parts, draw=draw)
    if mesh.size(PIPELINE) > 1 and model.is_reporter:
        say(describe_stages(settings, settings[DataConfig].seq_length))
        if settings[ParallelConfig].sharding() == "full" and mesh.size(DATA) > 1:
            warn("--data-parallel-sharding full gathers every stage again for each microbatch of the pipeline")
    return model


class ParallelModel:
    """This rank's stages on the mesh. Every rank calls its methods."""

    def __init__(
        self,
        settings: Settings,
        mesh: ParallelMesh,
        parts: Sequence[StagePart],
        cuts: Sequence[Cut] = CUTS,
        *,
        draw: bool = True,
    ) -> None:
        self.settings, self.mesh, self._cuts = settings, mesh, cuts
        own = [part for part in parts if part.index % mesh.size(PIPELINE) == mesh.rank(PIPELINE)]
        self.stages = [build_stage(settings, part, mesh, cuts) for part in own]
        self._axis, self._context = tensor_axis(settings, mesh), context_axis(mesh)
        self._shared = share_embedding(mesh, parts, [(stage.part, stage.model) for stage in self.stages])
        self._module = _merged([stage.model for stage in self.stages])
        self._runs = PipelineRuns(settings, mesh, self.stages, compute_dtype(settings[OptimizerConfig]))
        self._sharding = settings[ParallelConfig].sharding()
        if draw:
            self.draw_first_values()

    def draw_first_values(self, given: Container[str] = ()) -> None:
        """Fill every parameter but those that something else gives."""
        for stage in self.stages:
            draw_first_values(stage, self.settings, self.mesh, given)

    @property
    def module(self) -> nn.Module:
        """This rank's parameters under the names of the uncut model: what checkpoints and the optimizer read."""
        return self._module

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads, as others do that share its sequences."""
        return self.mesh.rank(DATA) // self.mesh.size(CONTEXT)

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is cut."""
        return self.mesh.size(DATA) // self.mesh.size(CONTEXT)

    def own_part(self, batch: Microbatch[ArrayT]) -> Microbatch[ArrayT]:
        """What of a microbatch this rank computes on: all of it, or its spans of every sequence."""
        return part_of(batch, self.mesh.rank(CONTEXT), self.mesh.size(CONTEXT))

    @property
    def is_reporter(self) -> bool:
        """True on the one rank that writes logs."""
        return dist.get_rank() == 0

    def train_step(
        self, microbatches: Sequence[Microbatch[Tensor]], *, loss_scale: float = 1.0, step: int = 0
    ) -> StepResult:
        """Gradients of the mean loss over all unmasked tokens of the global batch, times `loss_scale`, from this rank's
        own parts of microbatches.

        `step` steps are done; an error names this one as the log does, counted from 1.
        """
        try:
            return self._train_step(microbatches, loss_scale, step)
        except RuntimeError as error:
            named = explain_failure(error, step + 1)
            if named is None:
                raise
            raise named from error

    def _train_step(self, microbatches: Sequence[Microbatch[Tensor]], loss_scale: float, step: int) -> StepResult:
        masks = torch.stack([batch.loss_mask_BS.sum(dtype=torch.float64) for batch in microbatches])
        num_tokens = self._sum_over(DATA, masks.sum())
        self._begin(training=True)
        budget_share = loss_scale / (len(microbatches) * self.data_size * self.mesh.size(TENSOR))
        for stage in self.stages:
            stage.loss_factor = loss_scale / num_tokens.clamp(min=1.0)
            set_gate_budgets(stage.model, self.settings[RetroConfig], step, budget_share)
            if stage.streams is not None:
                stage.streams.step = step
            if stage.gradient_sums is not None:
                stage.gradient_sums.sums_microbatches = len(microbatches) > 1 and not self._reduces_every_microbatch
        numbers = torch.arange(len(microbatches)) + self.data_rank * len(microbatches)
        if self._pipelined:
            self._runs.train(microbatches, numbers)
        else:
            self._accumulate(microbatches, numbers)
        self._finish_gradients()
        loss_sum = torch.stack([stage.loss_sum for stage in self.stages]).sum()
        extra = {GATE_BUDGET: self._gate_budget() / loss_scale} if self._has_adaptive_gates else {}
        return StepResult(self._sum_over(DATA, self._sum_over(PIPELINE, loss_sum)), num_tokens, extra)

    @property
    def _has_adaptive_gates(self) -> bool:
        retro = self.settings[RetroConfig]
        return retro.reads_neighbors() and retro.retro_gate_type == "adaptive"

    def _gate_budget(self) -> float:
        """Of all gates: each tensor rank charges its part, each stage its gates, each data rank its microbatches."""
        charged = torch.tensor(sum(budget_losses(stage.model) or 0.0 for stage in self.stages), dtype=torch.float64)
        charged = charged.to(self.device)
        for axis in (TENSOR, PIPELINE, DATA):
            charged = self._sum_over(axis, charged)
        return float(charged)

    def evaluate(self, microbatches: Sequence[Microbatch[Tensor]]) -> list[Tensor] | None:
        """Loss of every token of whole sequences, [B, S] float32 on the device, one for each own part of a microbatch;
        None without the model's end."""
        was_training = self._module.training
        self._begin(training=False)
        with torch.no_grad():
            if self._pipelined:
                losses = self._runs.evaluate(microbatches)
            else:
                losses = [self.stages[0](batch=batch) for batch in microbatches]
        for stage in self.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self._begin(training=was_training)
        if losses is None:
            return None
        with torch.no_grad():
            return [loss.float() if self._context is None else self._context.whole(loss.float()) for loss in losses]

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of all gradients of the uncut model, each parameter counted once."""
        stages = (self.mesh.group(PIPELINE),) if self._pipelined else ()
        return squared_norm(self._module.parameters(), stages)

    def check_replicas(self) -> None:
        """Refuse to go on when parameters that should be the same on several ranks are not; every rank calls it."""
        named = [(name, parameter.detach()) for name, parameter in self._module.named_parameters()]
        for axis in (TENSOR, DATA):
            if self.mesh.size(axis) > 1:
                same = [(name, tensor) for name, tensor in named if not _is_cut_along(tensor, axis)]
                require_equal(same, self.mesh.group(axis), axis)

    @property
    def _pipelined(self) -> bool:
        return self.mesh.size(PIPELINE) > 1

    @property
    def _reduces_every_microbatch(self) -> bool:
        return self._sharding in ("gradients", "full") and not self._pipelined

    def _begin(self, *, training: bool) -> None:
        if self._shared is not None:
            self._shared.sync_copies()
        for stage in self.stages:
            stage.train(training)
            stage.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    def _accumulate(self, microbatches: Sequence[Microbatch[Tensor]], numbers: Tensor) -> None:
        stage = self.stages[0]
        for number, batch in enumerate(microbatches):
            set_gradient_sync(stage, self._sharding, last=number == len(microbatches) - 1)
            loss: Tensor = stage(batch=batch, number=numbers[number : number + 1])
            loss.backward()  # type: ignore[no-untyped-call]

    def _finish_gradients(self) -> None:
        if self._axis is not None:
            for stage in self.stages:
                sum_partial_gradients(stage.model, self._axis, self._cuts)
        if self._shared is not None:
            self._shared.sum_gradients()

    def _sum_over(self, axis: str, value: Tensor) -> Tensor:
        if self.mesh.size(axis) > 1:
            with on_axis(axis):
                dist.all_reduce(value, group=self.mesh.group(axis))
        return value


def _is_cut_along(tensor: Tensor, axis: str) -> bool:
    placements = getattr(tensor, "placements", ())
    names = getattr(getattr(tensor, "device_mesh", None), "mesh_dim_names", None) or ()
    return any(name == axis and not placement.is_replicate() for name, placement in zip(names, placements, strict=True))


def _merged(models: Sequence[nn.Module]) -> nn.Module:
    """One tree of the parts of several stages, under the names of the uncut model; the first copy of shared ones."""
    if len(models) == 1:
        return models[0]
    whole = nn.Module()
    for model in models:
        for name, child in model.named_children():
            if name not in whole._modules:
                whole.add_module(name, nn.ModuleDict() if name == "layers" else child)
            if isinstance(layers := whole._modules[name], nn.ModuleDict) and isinstance(child, nn.ModuleDict):
                layers.update(dict(child.items()))
    return whole
