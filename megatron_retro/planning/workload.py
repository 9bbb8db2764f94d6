"""What is computed (`Workload`) and how it is laid over ranks (`Layout`): a plan is a function of these two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_retro.assembly.stage_building import trained_parts, uses_peft
from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.model.costs import EVERYTHING, ModelCosts, Trained, model_costs, neighbor_tokens_per_token
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.cuts import cut_of
from megatron_retro.peft.attach import added_parameters, attach


@dataclass(frozen=True)
class Tuned:
    """Parameters beside a part of the model: those that every tensor rank holds whole, and those that are cut."""

    whole: int = 0
    cut: int = 0

    def __add__(self, other: Tuned) -> Tuned:
        return Tuned(self.whole + other.whole, self.cut + other.cut)

    def local(self, tensor: int) -> int:
        """One tensor rank's."""
        return self.whole + self.cut // tensor


@dataclass(frozen=True)
class Workload:
    """A training run, whatever it runs on."""

    model: ModelConfig
    retro: RetroConfig
    seq_length: int
    global_batch: int
    num_samples: int
    value_bytes: int
    trained: Trained = EVERYTHING
    peft: PeftConfig | None = None

    @cached_property
    def costs(self) -> ModelCosts:
        """Parts of the model with the padded vocabulary."""
        return model_costs(self.model, self.retro, self.seq_length, vocabulary=self.model.padded_vocab_size())

    @property
    def training_flops(self) -> float:
        """Forward and backward of one token, without the gradients of what is frozen."""
        return self.costs.training_flops(self.trained)

    @cached_property
    def tuned(self) -> dict[str, Tuned]:
        """What is tuned beside each part of the model that has something beside it."""
        found: dict[str, Tuned] = {}
        if self.peft is not None:
            with torch.device("meta"):
                model = Retro(self.model, self.retro)
            attach(model, self.peft)
            for name, parameter in added_parameters(model).items():
                words, size = name.split("."), parameter.numel()
                unit = ".".join(words[:2]) if words[0] == "layers" else words[0]
                more = Tuned(size, 0) if cut_of(name).whole else Tuned(0, size)
                found[unit] = found.get(unit, Tuned()) + more
        return found

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
        trained=trained_parts(settings),
        peft=settings[PeftConfig] if uses_peft(settings) else None,
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
