"""The grid of layouts that must give the one-process numbers: meshes, and what varies in the model on them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_retro.testing.layouts import (
    random_batches,
    reference_outcome,
    run_layout,
    tiny_settings,
    worst_differences,
)

TOLERANCE = 1e-5
STEPS_TOLERANCE = 1e-4
_SHARDINGS = ("none", "optimizer", "gradients", "full")
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_VIRTUAL = {"num_layers_per_virtual_pipeline_stage": 1}
_SCHEDULES: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({},),
    2: (
        {"pipeline_schedule": "gpipe"},
        {"pipeline_schedule": "1f1b"},
        {"pipeline_schedule": "zero-bubble"},
        {"pipeline_schedule": "interleaved", **_VIRTUAL},
        {"pipeline_schedule": "zero-bubble", **_VIRTUAL},
    ),
    4: ({"pipeline_schedule": "gpipe"}, {"pipeline_schedule": "1f1b"}, {"pipeline_schedule": "zero-bubble"}),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "retro_gate_type": ("fixed", "fixed", "scalar", "heads", "adaptive"),
    "freeze_decoder": (False, False, True),
    "freeze_encoder": (False, False, True),
    "untie_embeddings_and_output_weights": (False, True),
    "recompute_granularity": ("none", "full"),
    "make_vocab_size_divisible_by": (1, 8),
    "swiglu": (False, True),
    "normalization": ("LayerNorm", "RMSNorm"),
    "disable_bias_linear": (False, True),
    "qk_layernorm": (False, True),
    "position_embedding_type": ("rope", "learned_absolute"),
    "retro_neighbor_positions": ("rotary", "continued", "relative", "none"),
    "retro_encoder_causal": (False, True),
    "retro_encoder_final_norm": (False, True),
    "retro_encoder_reads": ("last", "same-depth"),
    "retro_encoder_own_embedding": (False, False, True),
    "retro_attention_gate": (1.0, 1.0, 1.0, 0.0),
    "neighbors": ("some absent", "some absent", "all there", "none"),
    "steps": (1, 1, 3),
}


@dataclass(frozen=True)
class Case:
    """One layout with one variant of the model."""

    world_size: int
    mesh: dict[str, Any]
    variant: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in {**self.mesh, **self.variant}.items()) or "one process"

    @property
    def features(self) -> frozenset[str]:
        """What this case tries: its choices, the forms of pipeline and sharding with those of freezing, joint axes."""
        choices = {f"{name}={value}" for name, value in {**self.mesh, **self.variant}.items()}
        frozen = self.variant.get("freeze_decoder", False)
        schedule = (self.mesh.get("pipeline_schedule"), *(name for name in _VIRTUAL if name in self.mesh))
        sharding = self.mesh.get("data_parallel_sharding") if self.has_data_ranks else None
        axes = [self.mesh.get(name, 1) > 1 for name in _SIZES]
        joint = (*axes, self.mesh.get("sequence_parallel", False), self.has_data_ranks)
        return frozenset(choices | {f"frozen={frozen} {schedule}", f"frozen={frozen} {sharding}", f"axes {joint}"})

    @property
    def has_data_ranks(self) -> bool:
        """Whether gradients are summed over several ranks: they read other data, or share sequences."""
        return self.world_size > math.prod(int(self.mesh.get(name, 1)) for name in _SIZES)


def meshes(largest_world: int = 8) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every mesh of up to so many ranks, with every schedule and every sharding that it can have."""
    for tensor in (1, 2, 4):
        for sequence in (False, True) if tensor > 1 else (False,):
            for pipeline in (1, 2, 4):
                for schedule in _SCHEDULES[pipeline]:
                    for data in (1, 2):
                        world = tensor * pipeline * data
                        if 1 < world <= largest_world:
                            mesh = {
                                "tensor_model_parallel_size": tensor,
                                "sequence_parallel": sequence,
                                "pipeline_model_parallel_size": pipeline,
                                **schedule,
                            }
                            for sharding in _SHARDINGS if data > 1 else ("none",):
                                yield world, {**mesh, "data_parallel_sharding": sharding}


def context_meshes(largest_world: int = 8) -> Iterator[tuple[int, dict[str, Any]]]:
    """Meshes whose ranks share sequences, alone and with every other axis and schedule; shardings take turns."""
    shardings = itertools.cycle(_SHARDINGS)
    cuts = ((1, False), (2, False), (2, True))
    for context, (tensor, sequence), data, pipeline in itertools.product((2, 4), cuts, (1, 2), (1, 2)):
        world = context * tensor * data * pipeline
        for schedule in _SCHEDULES[pipeline] if world <= largest_world else ():
            for sharding in _SHARDINGS if world == context else (next(shardings),):
                yield (
                    world,
                    {
                        "context_parallel_size": context,
                        "tensor_model_parallel_size": tensor,
                        "sequence_parallel": sequence,
                        "pipeline_model_parallel_size": pipeline,
                        **schedule,
                        "data_parallel_sharding": sharding,
                        "seq_length": 16 * context,  # a chunk for each span
                    },
                )


def whole_grid(seed: int) -> list[Case]:
    """Every mesh with a variant drawn for it."""
    draw = random.Random(seed)
    plain = [Case(world, mesh, _variant(draw)) for world, mesh in meshes()]
    return plain + [Case(world, mesh, _shareable(_variant(draw))) for world, mesh in context_meshes()]


def drawn_part(seed: int) -> list[Case]:
    """A small part of a grid in which every form appears: each schedule, sharding, cut, gate and choice of a model."""
    cases = whole_grid(seed)
    missing = {feature for case in cases for feature in case.features}
    part = []
    while missing:
        best = max(cases, key=lambda case: len(case.features & missing) / case.world_size)
        part.append(best)
        missing -= best.features
    return part


def _variant(draw: random.Random) -> dict[str, Any]:
    variant = {name: draw.choice(values) for name, values in _CHOICES.items()}
    if variant["freeze_decoder"] or variant["freeze_encoder"]:  # then something must be left to train, or to freeze
        variant.update(neighbors="some absent", retro_attention_gate=1.0)
    return variant


def _shareable(variant: dict[str, Any]) -> dict[str, Any]:
    """What of a variant is refused where ranks share sequences, in another way."""
    return {**variant, "retro_gate_type": "scalar"} if variant["retro_gate_type"] == "adaptive" else variant


def worst_of_case(case: Case) -> dict[str, float]:
    """The differences of a case from one process, by name."""
    variant = dict(case.variant)
    kind, steps = variant.pop("neighbors", "some absent"), variant.pop("steps", 1)
    pipeline, data = case.mesh.get("pipeline_model_parallel_size", 1), 2 if case.world_size > 1 else 1
    settings = tiny_settings(**{"global_batch_size": max(2, pipeline) * data, **case.mesh, **variant})
    batches = random_batches(settings, neighbors=kind != "none", absent=kind == "some absent")
    return worst_differences(
        reference_outcome(settings, batches, steps), run_layout(settings, case.world_size, batches, steps)
    )


def tolerance(case: Case) -> float:
    """Float32 rounding, which grows over optimizer steps."""
    return TOLERANCE if case.variant.get("steps", 1) == 1 else STEPS_TOLERANCE
