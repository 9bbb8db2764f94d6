"""What is computed (`Workload`) and how it is laid over ranks (`Layout`): a plan is a function of these two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.planning import PlanningConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.model.costs import ModelCosts, model_costs, neighbor_tokens_per_token


@dataclass(frozen=True)
class Workload:
    """A training run, whatever it runs on."""

    model: ModelConfig
    retro: RetroConfig
    seq_length: int
    global_batch: int
    num_samples: int
    value_bytes: int
    freeze_decoder: bool = False

    @cached_property
    def costs(self) -> ModelCosts:
        """Parts of the model with the padded vocabulary."""
        return model_costs(self.model, self.retro, self.seq_length, vocabulary=self.model.padded_vocab_size())

    @property
    def training_flops(self) -> float:
        """Forward and backward of one token, without the gradients of what is frozen."""
        return self.costs.added_training_flops if self.freeze_decoder else self.costs.training_flops

    @property
    def neighbor_tokens(self) -> float:
        """Neighbour tokens of a sample."""
        if not self.retro.retro_add_retriever:
            return 0.0
        return neighbor_tokens_per_token(self.retro) * self.seq_length

    @property
    def encoder_width(self) -> int:
        """Width of an encoded neighbour token."""
        return self.retro.retro_encoder_hidden_size or self.model.hidden_size

    @property
    def num_tokens(self) -> float:
        """Tokens of the whole run."""
        return float(self.num_samples) * self.seq_length


@dataclass(frozen=True)
class Layout:
    """How a workload is cut over `world_size` ranks."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    pieces_per_rank: int = 1
    context: int = 1
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    sharding: str = "none"
    recompute: str = "none"
    micro_batch: int = 1
    gpus_per_node: int = 8

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Replicas."""
        return max(1, self.world_size // self.model_ranks)

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of one step on one replica."""
        return max(1, global_batch // (self.data * self.micro_batch))

    def describe(self) -> str:
        """Short text for a table."""
        parts = [f"tensor {self.tensor}{'+sequence' if self.sequence_parallel else ''}", f"pipeline {self.pipeline}"]
        if self.pieces_per_rank > 1:
            parts[-1] += f" x {self.pieces_per_rank}"
        if self.context > 1:
            parts.append(f"context {self.context}")
        return ", ".join([*parts, f"data {self.data} ({self.sharding})"])


def workload_of(settings: Settings) -> Workload:
    """The workload that a recipe describes."""
    training, optimizer = settings[TrainingConfig], settings[OptimizerConfig]
    samples = training.train_samples or (training.train_iters or 1) * training.global_batch_size
    return Workload(
        model=settings[ModelConfig],
        retro=settings[RetroConfig],
        seq_length=settings[DataConfig].seq_length,
        global_batch=training.global_batch_size,
        num_samples=samples,
        value_bytes=2 if optimizer.bf16 or optimizer.fp16 else 4,
        freeze_decoder=training.freeze_decoder,
    )


def layout_of(settings: Settings) -> Layout:
    """The layout that a recipe asks for, on its cluster."""
    parallel, planning = settings[ParallelConfig], settings[PlanningConfig]
    return Layout(
        world_size=planning.world_size(),
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        pieces_per_rank=_pieces_per_rank(settings[ModelConfig], parallel),
        context=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        schedule=parallel.pipeline_schedule,
        sharding=parallel.sharding(),
        recompute=parallel.recompute_granularity,
        micro_batch=settings[TrainingConfig].micro_batch_size,
        gpus_per_node=planning.plan_gpus_per_node,
    )


def _pieces_per_rank(model: ModelConfig, parallel: ParallelConfig) -> int:
    layers = parallel.num_layers_per_virtual_pipeline_stage
    if layers is None or parallel.pipeline_model_parallel_size == 1:
        return 1
    return max(1, round(model.num_layers / (parallel.pipeline_model_parallel_size * layers)))
