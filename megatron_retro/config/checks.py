"""Rules between settings, and between settings and the number of processes. All broken ones are reported at once.

A rule is a small generator over (settings, world size) that names the field, its value, what would be legal and what
to do. It reads only sections that are there, edits nothing and imports nothing heavy; whoever adds a feature that
cannot be combined with another adds a rule to RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megatron_retro.config.data import DataConfig
from megatron_retro.config.instruction_checks import (
    buckets_are_of_one_size,
    one_thing_is_frozen,
    passages_have_a_reader,
    tuned_parts_are_reached,
)
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.model_checks import model_violations
from megatron_retro.config.optimizer import OptimizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.precision_checks import fp8_fits, fp8_products_are_not_put_off
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.schedule_checks import schedule_violations
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.errors import ConfigError, Violation

Rule = Callable[[Settings, int], Iterator[Violation]]


def violations(settings: Settings, world_size: int, rules: Sequence[Rule] | None = None) -> list[Violation]:
    """Every rule that these settings break on this many processes."""
    return [violation for rule in (RULES if rules is None else rules) for violation in rule(settings, world_size)]


def require_legal(settings: Settings, world_size: int) -> None:
    """Refuse settings that cannot be, before anything is built or any process is met."""
    found = violations(settings, world_size)
    if found:
        raise ConfigError.from_violations(found)


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


def _has(settings: Settings, *sections: type) -> bool:
    return ParallelConfig in settings and all(section in settings for section in sections)


def world_size_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Processes = tensor x pipeline x context x data."""
    if not _has(settings):
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
    if not _has(settings, ModelConfig):
        return
    model, size = settings[ModelConfig], settings[ParallelConfig].tensor_model_parallel_size
    if model.num_attention_heads % size:
        yield _not_divisible(size, "num_attention_heads", model.num_attention_heads)
    groups = model.num_key_value_heads()
    if model.group_query_attention and groups % size:
        yield _not_divisible(size, "num_query_groups", groups)


def widths_divide(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Each tensor rank holds an equal part of every MLP."""
    if not _has(settings, ModelConfig):
        return
    size = settings[ParallelConfig].tensor_model_parallel_size
    width = settings[ModelConfig].ffn_width()
    if width % size:
        yield _not_divisible(size, "ffn_hidden_size", width)


def encoder_divides(settings: Settings, world_size: int) -> Iterator[Violation]:
    """The neighbour encoder is cut as the decoder is."""
    if not _has(settings, RetroConfig) or not settings[RetroConfig].retro_add_retriever:
        return
    retro, size = settings[RetroConfig], settings[ParallelConfig].tensor_model_parallel_size
    for field in ("retro_encoder_num_attention_heads", "retro_encoder_ffn_hidden_size"):
        number = getattr(retro, field)
        if number is not None and number % size:
            yield _not_divisible(size, field, number)


def sequence_divides(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Sequence parallelism cuts the sequence, and each neighbour, in equal parts."""
    if not _has(settings) or not settings[ParallelConfig].sequence_parallel:
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
    if not _has(settings, ModelConfig):
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
    if not _has(settings, ModelConfig):
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
    if not _has(settings, ModelConfig) or settings[ParallelConfig].pipeline_layout is None:
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
    if not _has(settings, TrainingConfig):
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
    if not _has(settings, TrainingConfig) or settings[ParallelConfig].pipeline_model_parallel_size == 1:
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


def no_context_parallelism(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Sequences are shared over tensor ranks only; docs/decisions.md says what failed."""
    if _has(settings) and settings[ParallelConfig].context_parallel_size > 1:
        yield Violation(
            "context_parallel_size",
            settings[ParallelConfig].context_parallel_size,
            "1",
            "share long sequences with --tensor-model-parallel-size and --sequence-parallel",
        )


def schedule_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Lengths are given once, rates and ramps can be."""
    if OptimizerConfig in settings and TrainingConfig in settings:
        yield from schedule_violations(settings[OptimizerConfig], settings[TrainingConfig])


def model_is_possible(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Decoder and retriever; the vocabulary may still be the tokenizer's."""
    if _has(settings, ModelConfig, RetroConfig):
        model = settings[ModelConfig]
        yield from model_violations(replace(model, vocab_size=model.vocab_size or 1), settings[RetroConfig])


def validation_has_neighbors(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A Retro that trains with neighbours is evaluated with neighbours."""
    if not _has(settings, DataConfig, RetroConfig, TrainingConfig) or settings[TrainingConfig].eval_iters == 0:
        return
    data = settings[DataConfig]
    has_tables = settings[RetroConfig].retro_add_retriever and data.neighbor_path is not None
    if has_tables and data.valid_data_path is not None and data.valid_neighbor_path is None:
        yield Violation(
            "valid_neighbor_path",
            None,
            "one table for each file of --valid-data-path",
            "query them with build-retrieval (--retro-query-corpus valid=PREFIX), or --eval-iters 0",
        )


def degraded_shares_fit(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A chunk reads its own neighbours, another's, or none."""
    if DataConfig not in settings:
        return
    data = settings[DataConfig]
    if data.neighbor_random_share + data.neighbor_absent_share > 1:
        got = f"{data.neighbor_random_share} with --neighbor-absent-share {data.neighbor_absent_share}"
        yield Violation("neighbor_random_share", got, "shares of together at most 1", "lower one of them")


RULES: tuple[Rule, ...] = (
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
    no_context_parallelism,
    schedule_fits,
    model_is_possible,
    validation_has_neighbors,
    degraded_shares_fit,
    passages_have_a_reader,
    buckets_are_of_one_size,
    one_thing_is_frozen,
    tuned_parts_are_reached,
    fp8_fits,
    fp8_products_are_not_put_off,
)
