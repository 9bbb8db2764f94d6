"""Where an index is searched: on GPUs where faiss has any, can copy the index there, and that costs less; else here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval.faiss_index import inverted_parts
from megatron_retro.retrieval.gpu_copies import copy_bytes, lack_of_memory, num_gpus, obstacles
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.speeds import GpuSpeeds, measure_gpu_speeds, score_seconds
from megatron_retro.runtime.console import readable_seconds


@dataclass(frozen=True)
class Placement:
    """The place, why not the other one, and what the GPUs do per second if they were asked."""

    on_gpus: bool
    why: str
    speeds: GpuSpeeds | None = None

    def __str__(self) -> str:
        return f"{f'{num_gpus()} GPUs' if self.on_gpus else 'CPU'} ({self.why})"


def place_search(project: Project, index: Any, nprobe: int, rows: int, score: float | None = None) -> Placement:
    """The place to search `rows` queries in an index, filled or not; `score` is what one score costs here, if known."""
    if project.config.retro_faiss_device == "cpu":
        return Placement(False, "--retro-faiss-device cpu")
    reasons = check_placement(project, index, nprobe)
    return Placement(False, "; ".join(reasons)) if reasons else _cheaper(project, index, nprobe, rows, score)


def check_placement(project: Project, index: Any, nprobe: int) -> tuple[str, ...]:
    """Why the GPUs cannot search an index; raises it where they were asked for by name."""
    reasons = _reasons(project, index, nprobe)
    if reasons and project.config.retro_faiss_device == "gpu":
        raise EnvironmentProblem(
            f"{project.choice.index_str} cannot be searched on GPUs",
            got="; ".join(reasons),
            fix="give --retro-faiss-device auto, or another --retro-index-str",
        )
    return reasons


def _reasons(project: Project, index: Any, nprobe: int) -> tuple[str, ...]:
    """Why the GPUs cannot do it."""
    config = project.config
    keep = max(config.retro_query_num_neighbors_query, config.retro_query_num_neighbors_save)
    reasons = obstacles(index, nprobe, keep)
    if reasons:
        return reasons
    lack = lack_of_memory(copy_bytes(index, _chunks(project)), project.memory_bytes)
    return (lack,) if lack else ()


def _cheaper(project: Project, index: Any, nprobe: int, rows: int, score: float | None) -> Placement:
    """Both places priced by what they do now; a GPU that was asked for by name is taken at any price."""
    parts, chunks = inverted_parts(index), _chunks(project)
    width, lists = (parts.dimension, parts.num_lists) if parts else (project.embedder.dimension, 1)
    speeds = measure_gpu_speeds(width)
    scores = rows * min(nprobe, lists) * chunks / lists
    there = copy_bytes(index, chunks) * speeds.copied_byte + scores * speeds.score
    here = scores * (score if score is not None else score_seconds(width))
    prices = f"{readable_seconds(there)} on GPUs, {readable_seconds(here)} on the CPU"
    asked = project.config.retro_faiss_device == "gpu"
    return Placement(asked or there < here, f"--retro-faiss-device gpu: {prices}" if asked else prices, speeds)


def _chunks(project: Project) -> int:
    return sum(span.size for span in project.blocks)
