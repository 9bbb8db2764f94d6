"""Where the state of a run is kept."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: where, how often, how many"""

    save: str | None = option(None, "directory of this run's checkpoints, logs and report")
    load: str | None = option(None, "directory to start from; --save when that holds a checkpoint")
    save_interval: int = option(0, "steps between checkpoints; 0 = only at the end", minimum=0)
    keep_checkpoints: int = option(2, "complete checkpoints to keep; 0 = all", minimum=0, ours=True)
    async_save: bool = option(False, "write while training goes on")
    finetune: bool = option(False, "load weights only: fresh optimizer, schedule and data position")
    no_load_optim: bool = option(False, "take no optimizer state from --load")
    no_load_rng: bool = option(False, "take no random states from --load")
    allow_data_change: bool = option(
        False,
        "go on with other data, blend, seed or sequence length; the position counts in their order",
        ours=True,
    )
