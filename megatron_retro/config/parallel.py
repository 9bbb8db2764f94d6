"""How the run is cut over processes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble")
SHARDINGS = ("none", "optimizer", "gradients", "full")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism: tensor, sequence, pipeline, context, data"""

    tensor_model_parallel_size: int = option(1, "ranks that share each matrix", minimum=1)
    pipeline_model_parallel_size: int = option(1, "stages of layers", minimum=1)
    context_parallel_size: int = option(1, "ranks that share each sequence", minimum=1)
    sequence_parallel: bool = option(False, "cut the residual stream over the tensor ranks")
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "interleaved stages of this size", minimum=1)
    pipeline_schedule: str = option("1f1b", "order of forwards and backwards", choices=SCHEDULES, ours=True)
    pipeline_layout: str | None = option(None, "decoder layers of each stage, as 3,4,4,5", ours=True)
    data_parallel_sharding: str = option("none", "what data ranks shard", choices=SHARDINGS, ours=True)
    use_distributed_optimizer: bool = option(False, "Megatron's name of --data-parallel-sharding optimizer")
    recompute_granularity: str = option(
        "none", "activations computed again in the backward", choices=("none", "selective", "full")
    )
    distributed_timeout_minutes: float = option(10.0, "a collective that takes longer ends the job", minimum=0.01)
    check_replicas: bool = option(False, "compare replicated parameters between ranks at every save", ours=True)

    def model_parallel_size(self) -> int:
        """Ranks that hold one replica together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def sharding(self) -> str:
        """What data ranks shard, Megatron's flag included."""
        if self.use_distributed_optimizer and self.data_parallel_sharding == "none":
            return "optimizer"
        return self.data_parallel_sharding
