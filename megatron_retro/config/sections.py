"""Every section that a recipe may hold."""

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
from megatron_retro.config.evaluation import AblationConfig, EvaluationConfig, PerplexityConfig, ReportConfig
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
