"""What is wrong with a recipe: every broken rule, by name, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import violations
from megatron_retro.config.settings import Settings
from megatron_retro.errors import MegatronRetroError, Violation
from megatron_retro.planning.plan import Plan
from megatron_retro.planning.variants import fitting_change
from megatron_retro.runtime.console import readable_bytes


def structural_faults(settings: Settings) -> list[Violation]:
    """Broken rules between settings, and between settings and the number of processes."""
    found = violations(settings, settings[PlanningConfig].world_size())
    found += _missing_vocabulary(settings)
    found += _sequence_against_chunk(settings)
    unique = {(violation.field, str(violation.got)): violation for violation in found}
    return list(unique.values())


def _missing_vocabulary(settings: Settings) -> Iterator[Violation]:
    if settings[ModelConfig].vocab_size is None:
        yield Violation("vocab_size", None, "the size of the vocabulary", "a plan opens no tokenizer: set it")


def _sequence_against_chunk(settings: Settings) -> Iterator[Violation]:
    data, retro = settings[DataConfig], settings[RetroConfig]
    if retro.retro_add_retriever and data.seq_length % retro.retro_chunk_length:
        below = data.seq_length // retro.retro_chunk_length * retro.retro_chunk_length
        yield Violation(
            "seq_length",
            data.seq_length,
            f"a multiple of --retro-chunk-length {retro.retro_chunk_length}",
            f"as {max(below, retro.retro_chunk_length)} or {below + retro.retro_chunk_length}",
        )


def memory_faults(plan: Plan, margin: float) -> list[Violation]:
    """Does the fullest rank fit?"""
    usable = plan.machine.memory_bytes * (1 - margin)
    if plan.peak_memory <= usable:
        return []
    rank = max(range(len(plan.memory)), key=lambda index: plan.memory[index].total)
    kind, size = max(plan.memory[rank].rows(), key=lambda row: row[1])
    change = fitting_change(plan, usable)
    return [
        Violation(
            "plan_hardware",
            f"{plan.machine.name}, {readable_bytes(plan.peak_memory)} needed on pipeline rank {rank} "
            f"({readable_bytes(size)} of it {kind})",
            f"at most {readable_bytes(usable)} ({plan.machine.memory_gb:g} GB less {margin:.0%})",
            change or "no one or two changes of the layout make it fit: try --suggest, or more nodes",
        )
    ]


def data_faults(settings: Settings) -> tuple[list[str], list[str]]:
    """What is wrong with the files that a run would read, and which are not there yet."""
    data = settings[DataConfig]
    if data.mock_data or data.data_path is None:
        return [], []
    absent = [path for path in _files(data, settings[RetroConfig]) if not path.exists()]
    if absent:
        return [], [f"{path} is not there yet" for path in absent]
    from megatron_retro.data.builders import build_dataset

    try:
        build_dataset(settings, "train", eod=None)
    except MegatronRetroError as error:
        return [str(error)], []
    return [], []


def _files(data: DataConfig, retro: RetroConfig) -> Iterator[Path]:
    from megatron_retro.data.blends import parse_data_path

    for entry in parse_data_path(data.data_path or ()):
        yield Path(f"{entry.path}.idx")
    if retro.retro_add_retriever and retro.retro_num_neighbors:
        yield from (Path(path) for path in data.neighbor_path or ())
        if data.database_path is not None:
            yield Path(data.database_path)
