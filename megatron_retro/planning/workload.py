"""What a recipe computes (`Workload`), and how it is laid over the ranks of a cluster (`Layout`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_retro.assembly.stage_building import compute_dtype, trained_parts
from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig, virtual_stages
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, OptimizerConfig, TrainingConfig
from megatron_retro.errors import ConfigError
from megatron_retro.model.costs import ModelCosts, Trained, model_costs
from megatron_retro.model.retro import count_parameters


@dataclass(frozen=True)
class Workload:
    """A training run, whatever it runs on."""

    model: ModelConfig
    retro: RetroConfig
    seq_length: int
    global_batch: int
    num_samples: int
    value_bytes: int
    trained: Trained

    @cached_property
    def costs(self) -> ModelCosts:
        """Operations of every part, as the trainer's utilization counts them."""
        return model_costs(self.model, self.retro, self.seq_length)

    @cached_property
    def parameters(self) -> int:
        """Of the whole model, as the trainer counts them."""
        return count_parameters(self.model, self.retro)

    @property
    def training_flops(self) -> float:
        """Forward and backward of one token, without the gradients of what is frozen."""
        return self.costs.training_flops(self.trained)

    @property
    def num_tokens(self) -> float:
        """Tokens of the whole run."""
        return float(self.num_samples) * self.seq_length


def workload_of(settings: Settings) -> Workload:
    """The workload that a recipe describes."""
    training = settings[TrainingConfig]
    return Workload(
        model=settings[ModelConfig],
        retro=settings[RetroConfig],
        seq_length=settings[DataConfig].seq_length,
        global_batch=training.global_batch_size,
        num_samples=training.train_samples or (training.train_iters or 1) * training.global_batch_size,
        value_bytes=compute_dtype(settings[OptimizerConfig]).itemsize,
        trained=trained_parts(settings),
    )


@dataclass(frozen=True)
class Layout:
    """How a workload is cut over `world_size` ranks."""

    world_size: int
    gpus_per_node: int = 8
    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    stages_per_rank: int = 1
    schedule: str = "1f1b"
    pipeline_layout: str | None = None
    sharding: str = "none"
    recompute: str = "none"
    micro_batch: int = 1

    @property
    def data(self) -> int:
        """Ranks over which gradients are summed: those that read other data, and those that share sequences."""
        return max(1, self.world_size // (self.tensor * self.pipeline))

    @property
    def replicas(self) -> int:
        """Shares of a global batch."""
        return max(1, self.data // self.context)

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of one step on one replica."""
        return max(1, global_batch // (self.replicas * self.micro_batch))

    def applied_to(self, settings: Settings) -> Settings:
        """The same recipe in this layout (or in a similar one, where stages cannot have equally many layers)."""
        stages, layers = self.pipeline * self.stages_per_rank, settings[ModelConfig].num_layers
        return settings.replace(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.sequence_parallel,
            context_parallel_size=self.context,
            pipeline_model_parallel_size=self.pipeline,
            num_layers_per_virtual_pipeline_stage=None if self.stages_per_rank == 1 else -(-layers // stages),
            pipeline_schedule=self.schedule,
            pipeline_layout=self.pipeline_layout,
            data_parallel_sharding=self.sharding,
            use_distributed_optimizer=settings[ParallelConfig].use_distributed_optimizer and self.sharding != "none",
            recompute_granularity=self.recompute,
            micro_batch_size=self.micro_batch,
        )

    def describe(self) -> str:
        """Short text for a table."""
        stages = f" x {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
        tensor = f"tensor {self.tensor}{'+sequence' if self.sequence_parallel else ''}"
        context = f"context {self.context}, " if self.context > 1 else ""
        return f"{tensor}, {context}pipeline {self.pipeline}{stages}, data {self.replicas} ({self.sharding})"


def layout_of(settings: Settings) -> Layout:
    """The layout that a recipe asks for, on its cluster."""
    parallel, planning = settings[ParallelConfig], settings[PlanningConfig]
    return Layout(
        world_size=planning.world_size(),
        gpus_per_node=planning.plan_gpus_per_node,
        tensor=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        context=parallel.context_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        stages_per_rank=virtual_stages(settings) if parallel.pipeline_model_parallel_size > 1 else 1,
        schedule=parallel.pipeline_schedule,
        pipeline_layout=parallel.pipeline_layout,
        sharding=parallel.sharding(),
        recompute=parallel.recompute_granularity,
        micro_batch=settings[TrainingConfig].micro_batch_size,
    )


def with_model_shape(settings: Settings) -> Settings:
    """The same settings with the decoder's shape, where the recipe leaves it to what it starts from."""
    folder = settings[PlanningConfig].plan_model
    if folder is not None:
        return settings.replace(**_hugging_face_shape(Path(folder)))
    source = settings[CheckpointConfig].load
    if settings[ModelConfig].vocab_size is None and source is not None and Path(source).is_dir():
        from megatron_retro.assembly.retrofitting import inherited_settings
        from megatron_retro.checkpoint.loading import describe_checkpoint

        return inherited_settings(settings, describe_checkpoint(Path(source)))
    return settings


def _hugging_face_shape(folder: Path) -> dict[str, Any]:
    from megatron_retro.convert.hugging_face_config import model_from_hugging_face

    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        return asdict(model_from_hugging_face(json.loads(text)))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{folder} is no Hugging Face model", got=error, expected="a folder with a config.json"
        ) from None
