"""`megatron-retro evaluate TASK...`: figures of a trained model. A task is a row of TASKS."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.data import DataConfig, TokenizerConfig, WorkersConfig
from megatron_retro.config.evaluation import EvaluationConfig, PerplexityConfig
from megatron_retro.config.inference import READ_BY_A_GENERATOR, EngineConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import nearest
from megatron_retro.config.training import CheckpointConfig, TrainingConfig
from megatron_retro.errors import ConfigError

# task -> `module:function`, called as function(settings, the tasks asked for that name it)
_SETS = (
    *("nq", "triviaqa", "webquestions", "squad1", "squad2", "newsqa", "quoref", "drop", "narrativeqa"),
    *("qasper", "quality", "doc2dial", "boolq", "qmsum", "govreport", "summscreen"),
)
TASKS: Mapping[str, str] = {
    "perplexity": "megatron_retro.evaluation.perplexity_run:run_perplexity",
    **dict.fromkeys(_SETS, "megatron_retro.cli.evaluation_sets:run_sets"),
}
DESCRIPTION = """Measure a trained model (--load).

perplexity: sliding windows over held-out text; bits per byte; real, no, random and shuffled neighbours with
paired intervals; the leakage curve. Data settings that are not given are those of the training run.

nq ... summscreen: question and summary sets from their published files (--eval-data TASK=FILE), asked and scored as
published; killed and started again, or shared by --shard i/N, they go on where they were."""
SECTIONS: tuple[type, ...] = (
    CheckpointConfig,
    DataConfig,
    TokenizerConfig,
    TrainingConfig,
    PerplexityConfig,
    EvaluationConfig,
    EngineConfig,
    WorkersConfig,
    ParallelConfig,
)
POSITIONAL: Positional | None = Positional("tasks", "+", "what to measure: " + ", ".join(TASKS))
READS: Reads = READ_BY_A_GENERATOR


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Run each program once, with all of its tasks."""
    asked: dict[str, list[str]] = {}
    for name in positional:
        if name not in TASKS:
            raise ConfigError(f"there is no task {name!r}{nearest(name, TASKS)}", expected=", ".join(TASKS))
        asked.setdefault(TASKS[name], []).append(name)
    for program, tasks in asked.items():
        module, function = program.split(":")
        getattr(importlib.import_module(module), function)(settings, tasks)
