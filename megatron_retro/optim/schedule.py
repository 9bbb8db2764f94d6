"""The learning rate and the batch size as pure functions of the samples consumed.

Steps are counted in samples, so a run that changes its batch size keeps its curve. The rate of a step is that of the
sample count at its END: the first step of a warm-up is not lost on a rate of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_retro.config.training import OptimizerConfig, TrainingConfig
from megatron_retro.errors import ConfigError


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Samples of each step: constant, or growing by equal increments over the first samples."""

    final: int
    start: int
    increment: int
    ramp_samples: int

    def at(self, samples: int) -> int:
        """Samples of the step that begins after `samples`."""
        if self.start >= self.final or samples >= self.ramp_samples:
            return self.final
        num_increments = (self.final - self.start) // self.increment
        grown = samples * num_increments // max(self.ramp_samples, 1)
        return min(self.final, self.start + grown * self.increment)


def batch_size_schedule(config: TrainingConfig) -> BatchSizeSchedule:
    """The schedule that the settings ask for."""
    if config.rampup_batch_size is None:
        return BatchSizeSchedule(config.global_batch_size, config.global_batch_size, 1, 0)
    start, increment, ramp_samples = config.rampup_batch_size
    return BatchSizeSchedule(config.global_batch_size, start, increment, ramp_samples)


def run_length(config: TrainingConfig) -> int:
    """Samples of the whole run."""
    if config.train_samples is not None:
        return config.train_samples
    if config.train_iters is None:
        raise ConfigError("the run has no length", expected="--train-iters or --train-samples")
    schedule = batch_size_schedule(config)
    samples = 0
    for done in range(config.train_iters):
        if samples >= schedule.ramp_samples:
            return samples + (config.train_iters - done) * schedule.final
        samples += schedule.at(samples)
    return samples


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, then one of Megatron-LM's styles down to the minimum; all lengths in samples."""

    peak: float
    minimum: float
    style: str
    warmup: int
    decay: int
    final_decay: int
    final_style: str

    def at(self, samples: int) -> float:
        """The rate of the step that ends at `samples`."""
        if self.warmup > 0 and samples <= self.warmup:
            return self.peak * samples / self.warmup
        if self.style == "constant":
            return self.peak
        if samples > self.decay:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup, 1) / max(samples, 1)))
        return self.minimum + (self.peak - self.minimum) * self._remaining(samples)

    def _remaining(self, samples: int) -> float:
        """How much of the way from the minimum to the peak is left."""
        if self.style != "WSD":
            return _fallen(self.style, (samples - self.warmup) / max(self.decay - self.warmup, 1))
        left = self.decay - samples
        return 1.0 if left >= self.final_decay else _fallen(self.final_style, 1.0 - left / max(self.final_decay, 1))


def _fallen(shape: str, share: float) -> float:
    """From 1 to 0 while `share` goes from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (math.cos(math.pi * share) + 1.0)
    if shape == "exponential":
        return 2.0 * math.pow(0.5, share) - 1.0
    return 1.0 - math.sqrt(share) if shape == "minus_sqrt" else 1.0 - share


def learning_rate(optimizer: OptimizerConfig, training: TrainingConfig) -> LearningRate:
    """The schedule that the settings ask for; lengths given in steps count as final-size batches."""
    steps = training.global_batch_size
    decay = optimizer.lr_decay_samples
    if decay is None:
        decay = optimizer.lr_decay_iters * steps if optimizer.lr_decay_iters is not None else run_length(training)
    return LearningRate(
        peak=optimizer.lr,
        minimum=optimizer.min_lr,
        style=optimizer.lr_decay_style,
        warmup=optimizer.lr_warmup_samples or optimizer.lr_warmup_iters * steps,
        decay=decay,
        final_decay=optimizer.lr_wsd_decay_samples or (optimizer.lr_wsd_decay_iters or 0) * steps or decay // 10,
        final_style=optimizer.lr_wsd_decay_style,
    )
