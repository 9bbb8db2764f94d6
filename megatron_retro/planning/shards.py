"""Every distinct rank's shard, built as the trainer builds it: at the real world size, on the meta device.

Tensor ranks hold equal parts and data ranks the same ones, so one rank of each pipeline place stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megatron_retro.assembly.stage_building import stage_on_meta
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import MegatronRetroError
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.planning.fake_ranks import fake_rank
from megatron_retro.planning.plan import Plan


@dataclass(frozen=True)
class Shard:
    """One built shard."""

    rank: int
    parameters: int
    trained_parameters: int


class PlanIsWrong(MegatronRetroError):
    """The arithmetic of a plan and the built model disagree: a fault of ours."""


def build_shards(settings: Settings, plan: Plan) -> list[Shard]:
    """Build each, and compare with what the plan counted."""
    parallel, layout = settings[ParallelConfig], plan.layout
    ranks_of_a_stage = layout.world_size // layout.pipeline
    shards = []
    for place in plan.ranks:
        rank = place.rank * ranks_of_a_stage
        with fake_rank(rank, layout.world_size, parallel) as mesh:
            shards.append(_build(settings, mesh, rank))
        expected = (place.parameters, place.trained_parameters)
        if (shards[-1].parameters, shards[-1].trained_parameters) != expected:
            raise PlanIsWrong(
                f"rank {rank} holds other parameters than the plan counts", got=shards[-1], expected=expected
            )
    return shards


def _build(settings: Settings, mesh: ParallelMesh, rank: int) -> Shard:
    parts = stage_parts(settings, settings[DataConfig].seq_length)
    own = [part for part in parts if part.index % mesh.size(PIPELINE) == mesh.rank(PIPELINE)]
    parameters: dict[int, nn.Parameter] = {}
    for part in own:
        model = stage_on_meta(settings, part, mesh).model
        parameters.update({id(parameter): parameter for parameter in model.parameters()})
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    return Shard(rank, _count(parameters.values()), _count(trained))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(local(parameter).numel() for parameter in parameters)
