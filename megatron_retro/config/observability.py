"""What a run tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class ObservabilityConfig:
    """Logs, TensorBoard, profiler"""

    log_interval: int = option(10, "steps between log lines", minimum=1)
    log_throughput: bool = option(True, "tokens per second and FLOP utilisation")
    tensorboard_dir: str | None = option(None, "write TensorBoard events here")
    profile: bool = option(False, "record a torch.profiler window")
    profile_step_start: int = option(10, "first profiled step", minimum=0)
    profile_step_end: int = option(12, "step after the last profiled one", minimum=0)
    peak_tflops: float | None = option(None, "peak rate of one device, for utilisation", minimum=0.0, ours=True)
