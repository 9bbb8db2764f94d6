"""Which sections a recipe may hold, and which of them each kind of run reads."""

from __future__ import annotations

from megatron_retro.config.data import (
    CollectConfig,
    ContextsConfig,
    DataConfig,
    InputConfig,
    InstructionConfig,
    PreprocessConfig,
    TokenizerConfig,
    TrainTokenizerConfig,
    WorkersConfig,
)
from megatron_retro.config.evaluation import (
    PERPLEXITY,
    AblationConfig,
    EvaluationConfig,
    PerplexityConfig,
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
from megatron_retro.config.model import ConvertConfig, ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.planning import PlanningConfig
from megatron_retro.config.retrieval import EmbedderConfig, InspectorConfig, RetrievalConfig
from megatron_retro.config.training import (
    CheckpointConfig,
    ObservabilityConfig,
    OptimizerConfig,
    PeftConfig,
    TrainingConfig,
)

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
    InstructionConfig,
    ContextsConfig,
    PeftConfig,
    CheckpointConfig,
    ConvertConfig,
    ObservabilityConfig,
    EmbedderConfig,
    RetrievalConfig,
    InspectorConfig,
    WorkersConfig,
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
    TokenizerConfig,
    TrainingConfig,
    PerplexityConfig,
    EvaluationConfig,
    EngineConfig,
    WorkersConfig,
    ParallelConfig,
)
INDEX_SECTIONS: tuple[type, ...] = (TokenizerConfig, RetroConfig, EmbedderConfig, RetrievalConfig, WorkersConfig)
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
