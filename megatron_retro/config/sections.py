"""Which sections a recipe may hold, which of them each kind of run reads, and the rules between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_retro.config.context_rules import CONTEXT_RULES
from megatron_retro.config.conversion import ConvertConfig, PushConfig
from megatron_retro.config.data import (
    CollectConfig,
    ContextsConfig,
    DataConfig,
    ExecutorConfig,
    InputConfig,
    InstructionConfig,
    ObjectStorageConfig,
    PreprocessConfig,
    TokenizerConfig,
    TrainTokenizerConfig,
    WorkersConfig,
    degraded_shares_fit,
)
from megatron_retro.config.evaluation import (
    PERPLEXITY,
    AblationConfig,
    EvaluationConfig,
    PerplexityConfig,
    PlanningConfig,
    ReportConfig,
)
from megatron_retro.config.inference import (
    ChatConfig,
    EngineConfig,
    GenerateConfig,
    LiveRetrievalConfig,
    SamplingConfig,
    ServeConfig,
)
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.model_rules import model_is_possible
from megatron_retro.config.parallel import PARALLEL_RULES, ParallelConfig
from megatron_retro.config.retrieval import DuplicatesConfig, EmbedderConfig, InspectorConfig, RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import (
    TRAINING_RULES,
    CheckpointConfig,
    ObservabilityConfig,
    OptimizerConfig,
    PeftConfig,
    TrainingConfig,
)
from megatron_retro.errors import ConfigError, Violation

ALL_SECTIONS: tuple[type, ...] = (
    CollectConfig,
    InputConfig,
    PreprocessConfig,
    TrainTokenizerConfig,
    ModelConfig,
    RetroConfig,
    ParallelConfig,
    OptimizerConfig,
    TrainingConfig,
    TokenizerConfig,
    DataConfig,
    ObjectStorageConfig,
    InstructionConfig,
    ContextsConfig,
    PeftConfig,
    CheckpointConfig,
    ConvertConfig,
    PushConfig,
    ObservabilityConfig,
    EmbedderConfig,
    RetrievalConfig,
    InspectorConfig,
    DuplicatesConfig,
    WorkersConfig,
    ExecutorConfig,
    PlanningConfig,
    SamplingConfig,
    LiveRetrievalConfig,
    ChatConfig,
    GenerateConfig,
    EngineConfig,
    ServeConfig,
    EvaluationConfig,
    PerplexityConfig,
    AblationConfig,
    ReportConfig,
)
# All that a run of training is told; finetune reads conversations and methods of tuning besides.
TRAINING_SECTIONS: tuple[type, ...] = (
    ModelConfig,
    RetroConfig,
    DataConfig,
    ObjectStorageConfig,
    TokenizerConfig,
    TrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    CheckpointConfig,
    ObservabilityConfig,
)
FINETUNING_SECTIONS = (InstructionConfig, PeftConfig, *TRAINING_SECTIONS)
EVALUATION_SECTIONS: tuple[type, ...] = (
    CheckpointConfig,
    DataConfig,
    ObjectStorageConfig,
    TokenizerConfig,
    TrainingConfig,
    PerplexityConfig,
    EvaluationConfig,
    EngineConfig,
    WorkersConfig,
    ParallelConfig,
)
PREPROCESSING_SECTIONS: tuple[type, ...] = (
    InputConfig,
    PreprocessConfig,
    ObjectStorageConfig,
    TokenizerConfig,
    WorkersConfig,
    ExecutorConfig,
    ObservabilityConfig,
)
INDEX_SECTIONS: tuple[type, ...] = (
    TokenizerConfig,
    RetroConfig,
    EmbedderConfig,
    RetrievalConfig,
    ObjectStorageConfig,
    WorkersConfig,
    ExecutorConfig,
)
# What the runs of a study can be told. The workers are those of the study: a run of it is whole.
STUDIED_SECTIONS: dict[str, tuple[type, ...]] = {
    "pretrain": TRAINING_SECTIONS,
    "retrofit": TRAINING_SECTIONS,
    "finetune": FINETUNING_SECTIONS,
    PERPLEXITY: tuple(section for section in EVALUATION_SECTIONS if section is not WorkersConfig),
}
STUDY_SECTIONS: tuple[type, ...] = (
    AblationConfig,
    WorkersConfig,
    *dict.fromkeys((*FINETUNING_SECTIONS, *STUDIED_SECTIONS[PERPLEXITY])),
)

# A rule names the field, its value, what would be legal and what to do. It reads only sections that are there.
Rule = Callable[[Settings, int], Iterator[Violation]]


def violations(settings: Settings, world_size: int) -> list[Violation]:
    """Every rule that these settings break on this many processes."""
    return [violation for rule in RULES for violation in rule(settings, world_size)]


def require_legal(settings: Settings, world_size: int) -> None:
    """Refuse settings that cannot be, before anything is built or any process is met."""
    found = violations(settings, world_size)
    if found:
        raise ConfigError.from_violations(found)


# Whoever adds a feature that cannot be combined with another adds a rule beside the section that it speaks of.
RULES: tuple[Rule, ...] = (*PARALLEL_RULES, *CONTEXT_RULES, model_is_possible, *TRAINING_RULES, degraded_shares_fit)
