"""How a run is cut over processes, and which cuts are legal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_retro.config.data import DataConfig, InstructionConfig
from megatron_retro.config.fields import option
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.errors import Violation

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble")
SHARDINGS = ("none", "optimizer", "gradients", "full")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism: tensor, sequence, pipeline, context, data"""

    tensor_model_parallel_size: int = option(1, "ranks that share each matrix", minimum=1)
    pipeline_model_parallel_size: int = option(1, "stages of layers", minimum=1)
    context_parallel_size: int = option(1, "ranks that share each sequence", minimum=1)
    sequence_parallel: bool = option(False, "cut the residual stream over the tensor ranks")
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "interleaved stages of this size", minimum=1)
    pipeline_schedule: str = option("1f1b", "order of forwards and backwards", choices=SCHEDULES, ours=True)
    pipeline_layout: str | None = option(None, "decoder layers of each stage, as 3,4,4,5", ours=True)
    data_parallel_sharding: str = option("none", "what data ranks shard", choices=SHARDINGS, ours=True)
    use_distributed_optimizer: bool = option(False, "Megatron's name of --data-parallel-sharding optimizer")
    recompute_granularity: str = option(
        "none", "what the backward computes again beside norms and nonlinearities", choices=("none", "full")
    )
    compile: bool | None = option(None, "compile each layer by torch.compile; not set: on GPUs", ours=True)
    distributed_timeout_minutes: float = option(
        10.0, "a collective, or a lone process's read of data, that takes longer ends the job", minimum=0.01
    )
    check_replicas: bool = option(False, "compare replicated parameters between ranks at every save", ours=True)

    def model_parallel_size(self) -> int:
        """Ranks that hold one replica together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def sharding(self) -> str:
        """What data ranks shard, Megatron's flag included."""
        if self.use_distributed_optimizer and self.data_parallel_sharding == "none":
            return "optimizer"
        return self.data_parallel_sharding


def divisors(number: int) -> str:
    """Every divisor, as a person would list them."""
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)


def virtual_stages(settings: Settings) -> int:
    """Stages of each pipeline rank; 0 if the layers cannot be shared out so."""
    parallel, model = settings[ParallelConfig], settings[ModelConfig]
    size = parallel.num_layers_per_virtual_pipeline_stage
    if size is None:
        return 1
    stages, rest = divmod(model.num_layers, size * parallel.pipeline_model_parallel_size)
    return 0 if rest else stages


def data_parallel_size(settings: Settings, world_size: int) -> int:
    """Replicas; 0 when the processes cannot be shared out."""
    size, rest = divmod(world_size, settings[ParallelConfig].model_parallel_size())
    return 0 if rest else size


def world_size_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Processes = tensor x pipeline x context x data."""
    if ParallelConfig not in settings:
        return
    parallel = settings[ParallelConfig]
    needed = parallel.model_parallel_size()
    if world_size % needed:
        yield Violation(
            "tensor_model_parallel_size",
            f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} "
            f"x context {parallel.context_parallel_size}",
            f"a product that divides the {world_size} processes started ({divisors(world_size)})",
            f"start a multiple of {needed} processes",
        )


def heads_divide(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Each tensor rank holds whole query heads and whole key/value heads."""
    if not settings.has(ParallelConfig, ModelConfig):
        return
    model, size = settings[ModelConfig], settings[ParallelConfig].tensor_model_parallel_size
    if model.num_attention_heads % size:
        yield _not_divisible(size, "num_attention_heads", model.num_attention_heads)
    groups = model.num_key_value_heads()
    if model.group_query_attention and groups % size:
        yield _not_divisible(size, "num_query_groups", groups)


def widths_divide(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Each tensor rank holds an equal part of every MLP."""
    if not settings.has(ParallelConfig, ModelConfig):
        return
    size = settings[ParallelConfig].tensor_model_parallel_size
    width = settings[ModelConfig].ffn_width()
    if width % size:
        yield _not_divisible(size, "ffn_hidden_size", width)


def encoder_divides(settings: Settings, world_size: int) -> Iterator[Violation]:
    """The neighbour encoder is cut as the decoder is, also where its sizes follow from others."""
    if not settings.has(ParallelConfig, ModelConfig, RetroConfig) or not settings[RetroConfig].retro_add_retriever:
        return
    model, size = settings[ModelConfig], settings[ParallelConfig].tensor_model_parallel_size
    encoder = settings[RetroConfig].encoder_model(model)
    for field, number, decoders in (
        ("retro_encoder_num_attention_heads", encoder.num_attention_heads, model.num_attention_heads),
        ("retro_encoder_ffn_hidden_size", encoder.ffn_width(), model.ffn_width()),
    ):
        if number % size and number != decoders:  # the decoder's own numbers are tested by themselves
            yield _not_divisible(size, field, number)


def sequence_divides(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Sequence parallelism cuts the sequence, and each neighbour, in equal parts."""
    if ParallelConfig not in settings or not settings[ParallelConfig].sequence_parallel:
        return
    size = settings[ParallelConfig].tensor_model_parallel_size
    if DataConfig in settings and settings[DataConfig].seq_length % size:
        yield _not_divisible(size, "seq_length", settings[DataConfig].seq_length, " under --sequence-parallel")
    if RetroConfig in settings and settings[RetroConfig].retro_add_retriever:
        length = settings[RetroConfig].retrieved_length()
        if length % size:
            yield _not_divisible(size, "retro_chunk_length", length, " tokens of a neighbour under --sequence-parallel")


def _not_divisible(size: int, field: str, number: int, what: str = "") -> Violation:
    return Violation(
        field,
        number,
        f"a multiple of --tensor-model-parallel-size {size}{what}",
        f"change it, or take a tensor size from {divisors(number)}",
    )


def stages_have_layers(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Every stage holds at least one decoder layer."""
    if not settings.has(ParallelConfig, ModelConfig):
        return
    parallel, layers = settings[ParallelConfig], settings[ModelConfig].num_layers
    if parallel.pipeline_model_parallel_size > layers:
        yield Violation(
            "pipeline_model_parallel_size",
            parallel.pipeline_model_parallel_size,
            f"at most the {layers} decoder layers",
            "use fewer stages",
        )
    elif virtual_stages(settings) == 0:
        per_rank = divisors(layers // parallel.pipeline_model_parallel_size or 1)
        yield Violation(
            "num_layers_per_virtual_pipeline_stage",
            parallel.num_layers_per_virtual_pipeline_stage,
            f"a number that shares {layers} layers evenly over {parallel.pipeline_model_parallel_size} stages",
            f"take one of {per_rank}",
        )


def schedule_has_its_stages(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Interleaved schedules need several stages per rank; the simple ones can have one only."""
    if not settings.has(ParallelConfig, ModelConfig):
        return
    parallel = settings[ParallelConfig]
    size, stages = parallel.pipeline_model_parallel_size, virtual_stages(settings)
    if size == 1 and parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield Violation(
            "num_layers_per_virtual_pipeline_stage",
            parallel.num_layers_per_virtual_pipeline_stage,
            "not set without a pipeline",
            "drop it, or set --pipeline-model-parallel-size",
        )
    elif size > 1 and parallel.pipeline_schedule == "interleaved" and stages == 1:
        yield Violation(
            "pipeline_schedule",
            "interleaved",
            "several stages on each rank",
            "set --num-layers-per-virtual-pipeline-stage, or take 1f1b",
        )
    elif parallel.pipeline_schedule in ("1f1b", "gpipe") and stages > 1:
        yield Violation(
            "pipeline_schedule",
            parallel.pipeline_schedule,
            "interleaved or zero-bubble, which run several stages on a rank",
            "take --pipeline-schedule interleaved",
        )


def layout_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A layout by hand names every stage and every layer."""
    if not settings.has(ParallelConfig, ModelConfig) or settings[ParallelConfig].pipeline_layout is None:
        return
    parallel, layers = settings[ParallelConfig], settings[ModelConfig].num_layers
    stages = parallel.pipeline_model_parallel_size * virtual_stages(settings)
    counts = parse_layout(parallel.pipeline_layout or "")
    if not counts or min(counts) < 1 or sum(counts) != layers or len(counts) != stages:
        yield Violation(
            "pipeline_layout",
            parallel.pipeline_layout,
            f"{stages} numbers of at least 1 with the sum {layers}",
            "write the decoder layers of each stage in order, as 3,4,4,5",
        )


def parse_layout(text: str) -> tuple[int, ...]:
    """`3,4,5` -> (3, 4, 5); empty if it is no list of numbers."""
    parts = text.split(",")
    return tuple(int(part) for part in parts) if all(part.strip().isdigit() for part in parts) else ()


def batch_divides(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A global batch is whole microbatches on every data rank, at every size of the ramp-up."""
    if not settings.has(ParallelConfig, TrainingConfig):
        return
    training, replicas = settings[TrainingConfig], data_parallel_size(settings, world_size)
    unit = training.micro_batch_size * replicas
    sizes = [training.global_batch_size]
    if training.rampup_batch_size is not None and len(training.rampup_batch_size) == 3:
        sizes += training.rampup_batch_size[:2]
    wrong = [size for size in sizes if unit and size % unit]
    if wrong:
        yield Violation(
            "global_batch_size" if wrong[0] == training.global_batch_size else "rampup_batch_size",
            wrong[0],
            f"a multiple of {unit} (--micro-batch-size {training.micro_batch_size} x {replicas} data ranks)",
            "change one of them or the number of processes",
        )


def microbatches_fill_the_pipeline(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Interleaved and zero-bubble schedules run in rounds of equally many microbatches."""
    if not settings.has(ParallelConfig, TrainingConfig) or settings[ParallelConfig].pipeline_model_parallel_size == 1:
        return
    parallel, training = settings[ParallelConfig], settings[TrainingConfig]
    unit = training.micro_batch_size * data_parallel_size(settings, world_size)
    if parallel.pipeline_schedule in ("1f1b", "gpipe") or not unit or training.global_batch_size % unit:
        return
    count, stages = training.global_batch_size // unit, parallel.pipeline_model_parallel_size
    if count % max(1, count // stages):
        yield Violation(
            "global_batch_size",
            f"{training.global_batch_size} ({count} microbatches)",
            f"a multiple of {stages} microbatches, or fewer than that, for --pipeline-schedule "
            f"{parallel.pipeline_schedule} over {stages} stages",
            f"as --global-batch-size {unit * stages * (count // stages)}",
        )


def positions_stay_with_their_readers(settings: Settings, world_size: int) -> Iterator[Violation]:
    """The encoder of Megatron core's Retro reads the learned positions, which the first stage holds."""
    if not settings.has(ParallelConfig, ModelConfig, RetroConfig):
        return
    size = settings[ParallelConfig].pipeline_model_parallel_size
    if size > 1 and settings[RetroConfig].learned_neighbor_positions(settings[ModelConfig]):
        fix = "share it over tensor and data ranks"
        yield Violation("pipeline_model_parallel_size", size, "1 for a Retro of core with learned positions", fix)


def fp8_gradients_are_not_deferred(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Zero-bubble schedules compute weight gradients later, by products of their own."""
    if not _in_fp8(settings) or settings[ParallelConfig].pipeline_model_parallel_size == 1:
        return
    schedule = settings[ParallelConfig].pipeline_schedule
    if schedule == "zero-bubble":
        yield Violation("pipeline_schedule", schedule, "another one with --fp8-format", "take 1f1b or interleaved")


def _in_fp8(settings: Settings) -> bool:
    sections = ParallelConfig in settings and OptimizerConfig in settings
    return sections and settings[OptimizerConfig].fp8_format != "none"


def layers_can_be_compiled(settings: Settings, world_size: int) -> Iterator[Violation]:
    """What a compiler cannot take is refused where it is asked for; where it is not, layers run as they are."""
    if ParallelConfig in settings and settings[ParallelConfig].compile:
        for field, value, why in against_compiling(settings):
            yield Violation(field, value, f"another one with --compile: {why}", "change it, or leave --compile out")


def against_compiling(settings: Settings) -> Iterator[tuple[str, object, str]]:
    """Fields, their values, and why layers cannot be compiled with them."""
    parallel = settings[ParallelConfig]
    if parallel.pipeline_schedule == "zero-bubble" and parallel.pipeline_model_parallel_size > 1:
        yield "pipeline_schedule", "zero-bubble", "a compiled backward does not put weight gradients off"
    for section, name in _DROPOUT:
        chance = getattr(settings[section], name) if section in settings else 0.0
        if chance > 0.0:
            yield name, chance, "a compiler does not draw masks from the streams of layers"
    if RetroConfig in settings and settings[RetroConfig].retro_gate_type == "adaptive":
        yield "retro_gate_type", "adaptive", "the gate records its budget in the backward"
    if InstructionConfig in settings and settings[InstructionConfig].bucket_by_length:
        yield "bucket_by_length", True, "every length would be compiled for itself"


_DROPOUT: tuple[tuple[type, str], ...] = (
    (ModelConfig, "hidden_dropout"),
    (ModelConfig, "attention_dropout"),
    (RetroConfig, "retro_encoder_hidden_dropout"),
    (RetroConfig, "retro_encoder_attention_dropout"),
    (PeftConfig, "lora_dropout"),
)

PARALLEL_RULES = (
    world_size_fits,
    heads_divide,
    widths_divide,
    encoder_divides,
    sequence_divides,
    stages_have_layers,
    schedule_has_its_stages,
    layout_fits,
    batch_divides,
    microbatches_fill_the_pipeline,
    positions_stay_with_their_readers,
    fp8_gradients_are_not_deferred,
    layers_can_be_compiled,
)
