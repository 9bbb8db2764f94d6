"""What a conversion makes of a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

CONVERSIONS = ("checkpoint", "huggingface", "remote-code", "peft", "megatron-core")
OPTIMIZER_STATES = ("auto", "none", "required")
EXPORT_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion: into what"""

    convert_to: str = option("checkpoint", "what DESTINATION becomes", choices=CONVERSIONS, ours=True)
    convert_dtype: str = option("float32", "numbers of what is written", choices=EXPORT_TYPES, ours=True)
    convert_shard_megabytes: int = option(4096, "size of an exported file", minimum=1, ours=True)
    convert_merge: bool = option(False, "write what was tuned beside a model into its weights (LoRA, (IA)3)", ours=True)
    convert_base: str | None = option(
        None,
        "the checkpoint that an adapter in the format of Hugging Face's peft belongs to; with --convert-to peft, the "
        "folder or hub name of the base that the adapter names, where the run does not know it",
        ours=True,
    )
    convert_neutral_arguments: tuple[str, ...] | None = option(
        None, "arguments of a Megatron-LM run that are not known here and leave its model's function alone", ours=True
    )
    convert_vocab_size: int | None = option(
        None,
        "true vocabulary of a Megatron-LM checkpoint: the rows behind it, which fill its tables up, are cut off",
        minimum=1,
        ours=True,
    )
    convert_optimizer: str = option(
        "auto",
        "state of a Megatron-LM checkpoint's Adam: taken where it can be, never, or else an error",
        choices=OPTIMIZER_STATES,
        ours=True,
    )
    convert_decoder_only: bool = option(
        False, "export the decoder of a model that reads neighbours, as it computes with the gate shut", ours=True
    )


@dataclass(frozen=True)
class PushConfig:
    """Where an export goes on a hub"""

    push_public: bool = option(False, "a model that is made now may be seen by everybody", ours=True)
    push_message: str = option("Upload from megatron_retro", "the first line of the hub's commit", ours=True)
