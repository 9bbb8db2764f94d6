"""Rules of instruction tuning and parameter-efficient tuning."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_retro.config.finetuning import InstructionConfig
from megatron_retro.config.peft import PeftConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.errors import Violation


def passages_have_a_reader(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Passages for the encoder need an encoder that reads."""
    if InstructionConfig not in settings:
        return
    place = settings[InstructionConfig].context_place
    if place in ("encoder", "split") and not settings[RetroConfig].reads_neighbors():
        yield Violation(
            "context_place",
            place,
            "prompt or none",
            "this model reads no neighbours: turn the gate on, or load a Retro",
        )


def buckets_are_of_one_size(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A bucket is the rows of a step, so steps must be of one size."""
    if InstructionConfig in settings and settings[InstructionConfig].bucket_by_length:
        ramp = settings[TrainingConfig].rampup_batch_size
        if ramp is not None:
            yield Violation("rampup_batch_size", ramp, "none", "--bucket-by-length needs steps of one size")


def tuned_parts_are_reached(settings: Settings, world_size: int) -> Iterator[Violation]:
    """What is tuned beside encoder and cross-attention alone learns from passages in the encoder, or not at all."""
    if PeftConfig not in settings or settings[PeftConfig].peft_method in ("none", "p-tuning"):
        return
    place, parts = settings[InstructionConfig].context_place, settings[PeftConfig].peft_parts
    if "decoder" not in parts and place not in ("encoder", "split"):
        yield Violation(
            "peft_parts",
            parts,
            f"the decoder too with --context-place {place}, or nothing would be trained",
            "add it, or give passages to the encoder",
        )


def one_thing_is_frozen(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Tuning beside the model freezes all of it; a GPT is a decoder and nothing else."""
    if TrainingConfig not in settings or not settings[TrainingConfig].freeze_decoder:
        return
    if PeftConfig in settings and settings[PeftConfig].peft_method != "none":
        yield Violation("freeze_decoder", True, "off", "--peft-method freezes the whole model already")
    elif RetroConfig in settings and not settings[RetroConfig].reads_neighbors():
        yield Violation(
            "freeze_decoder", True, "off without a retriever that reads", "nothing else would be left to train"
        )
