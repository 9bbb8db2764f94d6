"""What a plan is made for: the cluster, its prices, the corpus."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class PlanningConfig:
    """Planning: cluster, prices, corpus"""

    plan_for: str = option("pretrain", "the verb that would run", ours=True)
    plan_model: str | None = option(None, "a Hugging Face folder whose shape the plan takes", ours=True)
    plan_hardware: str = option("H100", "accelerator, a row of the hardware table", ours=True)
    plan_hardware_table: str | None = option(None, "a hardware table of your own (TOML)", ours=True)
    plan_nodes: int = option(1, "nodes of the cluster", minimum=1, ours=True)
    plan_gpus_per_node: int = option(8, "accelerators of a node", minimum=1, ours=True)
    plan_memory_margin: float = option(
        0.08, "share of the memory left to the allocator, the driver and NCCL", minimum=0.0, maximum=0.9, ours=True
    )
    plan_price_per_gpu_hour: float | None = option(None, "price of a GPU hour", minimum=0.0, ours=True)
    plan_price_per_cpu_hour: float | None = option(None, "price of a CPU core hour", minimum=0.0, ours=True)
    plan_corpus_tokens: int | None = option(
        None, "tokens of the training corpus; the token files' when they are there", minimum=1, ours=True
    )
    plan_database_tokens: int | None = option(
        None, "tokens of the retrieval database; the corpus's when not set", minimum=1, ours=True
    )
    plan_document_tokens: int = option(800, "tokens of a document, on average", minimum=1, ours=True)
    plan_data_workers: int = option(1, "workers that share the data and index work", minimum=1, ours=True)
    plan_shards: bool = option(True, "build every distinct shard on the meta device", ours=True)
    suggest: bool = option(False, "search layouts for this cluster and list the best five", ours=True)
    plan_json: str | None = option(None, "also write the plan's numbers to this file", ours=True)

    def world_size(self) -> int:
        """Accelerators of the cluster."""
        return self.plan_nodes * self.plan_gpus_per_node
