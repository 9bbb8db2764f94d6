"""Conversations as training data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

CONTEXT_PLACES = ("prompt", "encoder", "split", "none")


@dataclass(frozen=True)
class InstructionConfig:
    """Instruction tuning: conversations, template, masks, packing"""

    instruction_data: tuple[str, ...] | None = option(
        None, "conversation files, with weights: w1 f1.jsonl w2 f2.jsonl, or files alone", ours=True
    )
    instruction_valid_data: tuple[str, ...] | None = option(None, "conversation files to evaluate on", ours=True)
    instruction_template: str = option(
        "instruct-retro", "how a conversation is written: instruct-retro, or a .jinja file", ours=True
    )
    loss_on_all_replies: bool = option(False, "train on every reply instead of the last", ours=True)
    context_place: str = option(
        "prompt", "where passages go; split: the top one in the prompt, the rest to the encoder",
        choices=CONTEXT_PLACES, ours=True,
    )  # fmt: skip
    num_contexts: int = option(5, "passages of a conversation that are used", minimum=0, ours=True)
    pack_examples: bool = option(False, "several conversations per row, each blind to the others", ours=True)
    bucket_by_length: bool = option(
        False, "a step's rows are of like length, and cut to the longest of them", ours=True
    )
    skip_long_examples: bool = option(False, "pass over conversations longer than a row instead of stopping", ours=True)
