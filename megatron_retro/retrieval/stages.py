"""`build-retrieval` from plan to verify: every stage can be run alone, again, and by many workers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_retro.artifacts.manifest import manifest_path
from megatron_retro.config.retrieval import STAGES
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.build_estimate import estimate_build
from megatron_retro.retrieval.faiss_index import new_index
from megatron_retro.retrieval.index_building import encode, merge
from megatron_retro.retrieval.index_training import train
from megatron_retro.retrieval.neighbor_search import query
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.search_device import check_device
from megatron_retro.retrieval.verification import verify
from megatron_retro.runtime.console import say


def plan(project: Project) -> None:
    """Print the estimate of files, memory and time."""
    if project.worker.index == 0:
        print(estimate_build(project).text(), flush=True)


_RUNNERS: Mapping[str, Callable[[Project], None]] = {
    "plan": plan,
    "train": train,
    "encode": encode,
    "merge": merge,
    "query": query,
    "verify": verify,
}


def build_retrieval(settings: Settings) -> None:
    """Run the stages of --retro-tasks, in their order."""
    project = Project(settings)
    check_settings(project)
    asked = project.config.retro_tasks or STAGES
    _require_stages_before(project, asked)
    project.fix_index_spec()
    for stage in STAGES:
        if stage in asked and stage in _RUNNERS:
            _RUNNERS[stage](project)
            say(f"{stage}: done")


def _require_stages_before(project: Project, asked: Sequence[str]) -> None:
    """Refuse stages whose input is neither here nor among what is asked for."""
    trained, merged = project.layout.trained, project.layout.merged
    for stages, maker, made in ((("encode", "merge"), "train", trained), (("query", "verify"), "merge", merged)):
        needy = next((stage for stage in stages if stage in asked), None)
        if needy is not None and maker not in asked and not manifest_path(made).exists():
            raise ConfigError(
                f"--retro-tasks {needy} needs what the stage {maker} makes, which is not there",
                got=f"no {made} of an earlier run",
                fix=f"add the stages before it (--retro-tasks {' '.join(STAGES[1 : STAGES.index(needy) + 1])}); "
                "what is finished is not made again",
            )


def check_settings(project: Project) -> None:
    """Refuse impossible settings before anything is written."""
    config = project.config
    if project.index_spec["train_chunks"] == 0:
        raise ConfigError(
            "no chunk is left to train the index on",
            got=f"--retro-index-train-load-fraction {config.retro_index_train_load_fraction:g} of "
            f"{project.choice.train_chunks} chunks",
            fix="raise the fraction",
        )
    if config.retro_candidates == "bm25" and config.retro_refine:
        raise ConfigError(
            "--retro-refine orders candidates by their vectors, which those of BM25 do not have",
            fix="leave it out, or --retro-candidates bm25",
        )
    if config.retro_query_num_neighbors_query < config.retro_query_num_neighbors_save:
        raise ConfigError(
            "--retro-query-num-neighbors-query is smaller than --retro-query-num-neighbors-save",
            got=f"{config.retro_query_num_neighbors_query} < {config.retro_query_num_neighbors_save}",
            fix="query at least as many candidates as are saved",
        )
    if config.retro_faiss_device == "gpu":
        index = new_index(project.choice.index_str, project.embedder.dimension)
        check_device(project, index)
