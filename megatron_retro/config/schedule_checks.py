"""Rules between lengths, batches and rates of a run."""

from __future__ import annotations

from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.training import TrainingConfig
from megatron_retro.errors import Violation


def schedule_violations(optimizer: OptimizerConfig, training: TrainingConfig) -> list[Violation]:
    """Every rule about lengths, batches and rates that the settings break."""
    found = _length_violations(optimizer, training) + _ramp_violations(training)
    if optimizer.min_lr > optimizer.lr:
        found.append(Violation("min_lr", optimizer.min_lr, f"at most --lr ({optimizer.lr})", "lower it"))
    if optimizer.bf16 and optimizer.fp16:
        found.append(Violation("fp16", True, "one of --bf16 and --fp16", "drop one"))
    return found


def _length_violations(optimizer: OptimizerConfig, training: TrainingConfig) -> list[Violation]:
    found = []
    for first, second, section in (
        ("train_iters", "train_samples", training),
        ("lr_decay_samples", "lr_decay_iters", optimizer),
        ("lr_warmup_samples", "lr_warmup_iters", optimizer),
    ):
        if getattr(section, first) and getattr(section, second):
            flag = "--" + second.replace("_", "-")
            found.append(Violation(first, getattr(section, first), f"alone, without {flag}", "give one of the two"))
    return found


def _ramp_violations(training: TrainingConfig) -> list[Violation]:
    ramp = training.rampup_batch_size
    if ramp is None:
        return []
    if len(ramp) != 3:
        return [Violation("rampup_batch_size", ramp, "three numbers: start, increment, samples", "give all three")]
    start, increment, _ = ramp
    if start > training.global_batch_size or (training.global_batch_size - start) % increment:
        expected = f"a start that reaches {training.global_batch_size} by whole increments"
        return [Violation("rampup_batch_size", ramp, expected, "change start or increment")]
    return []
