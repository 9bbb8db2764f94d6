"""Measures the memory of real training steps: peak resident set of every rank, less what it was after the imports."""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.assembly.parallel_model import build_parallel_model
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, TrainingConfig
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.optim.optimizer import TrainingOptimizer
from megatron_retro.testing.processes import run_ranks

_PAGE = 4096
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


@dataclass(frozen=True)
class Measured:
    """One rank, in bytes."""

    peak: int
    after_step: int


def resident_bytes() -> int:
    """This process's resident set now."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * _PAGE


class PeakWatch:
    """Samples the resident set from a thread while the block runs."""

    def __init__(self, seconds: float = 0.002) -> None:
        self.peak = 0
        self._seconds, self._stop = seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident_bytes())
            time.sleep(self._seconds)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_steps(settings: Settings, world_size: int, num_steps: int = 2) -> list[Measured]:
    """Train on random tokens; one entry for each rank."""
    return run_ranks(_measure, world_size, settings, num_steps, timeout=600.0)


def return_freed_memory() -> None:
    """Let the C library give back each freed tensor at once, so that the resident set is what is alive."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)


def _measure(settings: Settings, num_steps: int) -> Measured:
    return_freed_memory()
    baseline = resident_bytes()
    with PeakWatch() as watch:
        trainable = build_parallel_model(settings, torch.device("cpu"))
        optimizer = TrainingOptimizer(trainable.module, settings[OptimizerConfig])
        training = settings[TrainingConfig]
        count = training.global_batch_size // (trainable.data_size * training.micro_batch_size)
        for step in range(num_steps):
            trainable.train_step([random_batch(settings) for _ in range(count)], step=step)
            optimizer.update(trainable.squared_gradient_norm(), 1e-4)
        after = resident_bytes()
    return Measured(watch.peak - baseline, after - baseline)


def random_batch(settings: Settings) -> Microbatch[Tensor]:
    """A microbatch of random tokens with all neighbours there."""
    model, retro, data = settings[ModelConfig], settings[RetroConfig], settings[DataConfig]
    shape = (settings[TrainingConfig].micro_batch_size, data.seq_length)
    tokens = torch.randint(model.vocab_size or 1, shape)
    neighbors = None
    if retro.reads_neighbors():
        chunks = data.seq_length // retro.retro_chunk_length
        wide = (shape[0], chunks, retro.retro_num_neighbors, retro.retrieved_length())
        neighbors = Neighbors(torch.randint(model.vocab_size or 1, wide), torch.ones(wide, dtype=torch.bool))
    return Microbatch(tokens, tokens, torch.ones(shape), neighbors=neighbors)
