"""How a job that many workers share is divided."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class WorkersConfig:
    """Workers of a job that many share"""

    shard: str | None = option(None, "this worker as i/N, from 0; read from SLURM or MPI when not set", ours=True)
