"""Where `generate` meets several processes: each holds a part of the model, the first one searches and prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_retro.inference.neighbor_sources import NeighborSource
    from megatron_retro.inference.text_generator import TextGenerator


@dataclass(frozen=True)
class Ready:
    """A generator, whether this process tells what it does, and the device if others share the work."""

    generator: TextGenerator
    is_reporter: bool
    shared_device: torch.device | None = None

    def source(self, mode: str, passages: Sequence[str]) -> NeighborSource | None:
        """As the generator's; among several processes the first one's answers are everybody's."""
        generator = self.generator
        if self.shared_device is None:
            return generator.source(mode, passages)
        if (mode == "none" and not passages) or not generator.forward.reads_neighbors:
            return None
        from megatron_retro.inference.staged_forward import SharedSource

        own = generator.source(mode, passages) if self.is_reporter else None
        return SharedSource(own, generator.forward.neighbor_shape, self.shared_device)


@contextmanager
def ready_generator(settings: Settings, path: Path) -> Iterator[Ready]:
    """The generator of --load, alone or as a part of the processes that a launcher started."""
    from megatron_retro.cli.generate import load
    from megatron_retro.inference.text_generator import build_text_generator
    from megatron_retro.runtime.launch import find_launch

    launch, parallel = find_launch(), settings[ParallelConfig]
    if launch.world_size != parallel.model_parallel_size():
        raise ConfigError(
            "the processes are not those of one model",
            got=f"{launch.world_size} process(es)",
            expected=f"tensor x pipeline = {parallel.model_parallel_size()}",
            fix="start that many (torchrun --nproc-per-node), or change the parallel sizes",
        )
    if launch.alone:
        yield Ready(build_text_generator(load(settings), settings[EngineConfig], settings[LiveRetrievalConfig]), True)
        return
    from megatron_retro.runtime.process_group import process_group

    minutes = parallel.distributed_timeout_minutes
    use_gpu = {"cpu": False, "cuda": True}.get(settings[EngineConfig].device)
    with process_group(launch, timeout_minutes=minutes, use_gpu=use_gpu) as device:
        yield Ready(_staged(settings, path, device, launch.rank == 0), launch.rank == 0, device)


def _staged(settings: Settings, path: Path, device: torch.device, searches: bool) -> TextGenerator:
    """This rank's part; the first rank opens the index."""
    from megatron_retro.assembly.loaded_stage import load_stage
    from megatron_retro.config.retro import RetroConfig
    from megatron_retro.inference.engine import EngineLimits
    from megatron_retro.inference.staged_forward import StagedForward
    from megatron_retro.inference.text_generator import TextGenerator, open_index
    from megatron_retro.parallel.mesh import build_mesh

    engine, parallel = settings[EngineConfig], settings[ParallelConfig]
    mesh = build_mesh(parallel, device)
    stage, stored, tokenizer = load_stage(path, parallel, mesh, dtype=engine.dtype)
    folder = settings[LiveRetrievalConfig].retro_index
    index = None
    if searches and folder is not None:
        index = open_index(Path(folder), stored[RetroConfig].retro_chunk_length, tokenizer.fingerprint)
    limits = EngineLimits(engine.max_batch_size, engine.max_sequence_length, engine.prefill_tokens)
    return TextGenerator(StagedForward(stage, stored, mesh), tokenizer, limits, index)
