"""`megatron-retro preprocess`: text files to token files."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.data import InputConfig, PreprocessConfig, TokenizerConfig, WorkersConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.config.training import ObservabilityConfig

DESCRIPTION = (
    "Tokenize text into Megatron's .bin/.idx files. Workers of one machine (--workers) and of many (--shard i/N, a "
    "SLURM array or job, mpirun) share the work; the result is the same byte for byte. --resume goes on after a kill."
)
SECTIONS: tuple[type, ...] = (InputConfig, PreprocessConfig, TokenizerConfig, WorkersConfig, ObservabilityConfig)
POSITIONAL: Positional | None = None
READS: Reads = {ObservabilityConfig: ("log_interval",)}


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Make the token files."""
    from megatron_retro.data.preprocessing.run import join_token_files, preprocess
    from megatron_retro.runtime.workers import this_worker

    if settings[PreprocessConfig].merge_token_files is not None:
        join_token_files(settings[InputConfig], settings[PreprocessConfig])
        return
    asked = settings.origin("log_interval") != DEFAULT_ORIGIN
    preprocess(
        settings[InputConfig],
        settings[PreprocessConfig],
        settings[TokenizerConfig],
        this_worker(settings[WorkersConfig].shard),
        log_interval=settings[ObservabilityConfig].log_interval if asked else None,
    )
