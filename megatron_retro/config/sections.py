"""Every section that a recipe may hold."""

from __future__ import annotations

from megatron_retro.config.ablation import AblationConfig
from megatron_retro.config.checkpoint import CheckpointConfig
from megatron_retro.config.collect import CollectConfig
from megatron_retro.config.contexts import ContextsConfig
from megatron_retro.config.convert import ConvertConfig
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.evaluation import EvaluationConfig
from megatron_retro.config.finetuning import InstructionConfig
from megatron_retro.config.inference import (
    ChatConfig,
    EngineConfig,
    GenerateConfig,
    LiveRetrievalConfig,
    SamplingConfig,
    ServeConfig,
)
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.observability import ObservabilityConfig
from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.peft import PeftConfig
from megatron_retro.config.perplexity import PerplexityConfig
from megatron_retro.config.planning import PlanningConfig
from megatron_retro.config.preprocess import InputConfig, PreprocessConfig, TrainTokenizerConfig
from megatron_retro.config.reporting import ReportConfig
from megatron_retro.config.retrieval import EmbedderConfig, InspectorConfig, RetrievalConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.training import TrainingConfig
from megatron_retro.config.workers import WorkersConfig

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
