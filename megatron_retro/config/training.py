"""How long, how much at once, what is evaluated and what ends the run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batches, length, evaluation, faults"""

    micro_batch_size: int = option(1, "sequences of one forward", minimum=1)
    global_batch_size: int = option(8, "sequences of one step", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = option(None, "start, increment, samples of the ramp-up", minimum=1)
    train_iters: int | None = option(None, "steps of the run", minimum=1)
    train_samples: int | None = option(None, "samples of the run", minimum=1)
    seed: int = option(1234, "seeds weights, order and dropout", minimum=0)
    freeze_decoder: bool = option(False, "train only what retro-fitting added", ours=True)
    eval_interval: int = option(0, "steps between evaluations; 0 = only at the end", minimum=0)
    eval_iters: int = option(10, "batches of one evaluation; 0 = none", minimum=0)
    retrieval_health: bool = option(True, "evaluate with real, no, random and shuffled neighbours", ours=True)
    deterministic_mode: bool = option(False, "only deterministic kernels")
    non_finite_policy: str = option(
        "skip", "a step whose loss or gradient is not finite", choices=("skip", "rollback", "stop"), ours=True
    )
    max_bad_steps: int = option(10, "bad steps in a row that end the run", minimum=1, ours=True)
    loss_spike_factor: float = option(0.0, "a loss this many times the recent median counts as bad; 0 = off", ours=True)
    exit_interval: int | None = option(None, "stop at a multiple of this many steps", minimum=1)
    exit_duration_in_mins: float | None = option(None, "save and stop after this long", minimum=0.0)
    exit_signal_handler: bool = option(True, "save and stop on SIGTERM and SIGUSR1")
    exit_on_requeue_code: int = option(75, "exit code of a run that wants to go on", ours=True)
