"""Rules between settings, and between settings and the number of processes. All broken ones are reported at once.

A rule is a small generator over (settings, world size) that names the field, its value, what would be legal and what
to do. It reads only sections that are there, edits nothing and imports nothing heavy; whoever adds a feature that
cannot be combined with another adds a rule to RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_retro.config.model import model_is_possible
from megatron_retro.config.parallel import (
    batch_divides,
    encoder_divides,
    fp8_fits,
    fp8_gradients_are_not_deferred,
    heads_divide,
    layout_fits,
    microbatches_fill_the_pipeline,
    no_context_parallelism,
    schedule_has_its_stages,
    sequence_divides,
    stages_have_layers,
    widths_divide,
    world_size_fits,
)
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import (
    buckets_are_of_one_size,
    degraded_shares_fit,
    one_thing_is_frozen,
    passages_have_a_reader,
    schedule_fits,
    tuned_parts_are_reached,
    validation_has_neighbors,
)
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
    fp8_gradients_are_not_deferred,
)
