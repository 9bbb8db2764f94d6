"""Parameter-efficient tuning."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

METHODS = ("none", "lora", "adapter", "p-tuning", "ia3")
PARTS = ("decoder", "encoder", "cross-attention")
LORA_TARGETS = ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down", "query", "key_value", "output")


@dataclass(frozen=True)
class PeftConfig:
    """Parameter-efficient tuning: LoRA, adapters, P-tuning, (IA)3"""

    peft_method: str = option("none", "train this instead of the whole model", choices=METHODS, ours=True)
    peft_parts: tuple[str, ...] = option(("decoder",), "where it is added", choices=PARTS, ours=True)
    peft_load: str | None = option(None, "start from this adapter", ours=True)
    lora_rank: int = option(32, "rank of the low-rank update", minimum=1, ours=True)
    lora_alpha: float = option(32.0, "the update is scaled by alpha / rank", minimum=0.0, ours=True)
    lora_dropout: float = option(0.0, "dropout of LoRA's input", minimum=0.0, maximum=1.0, ours=True)
    lora_targets: tuple[str, ...] = option(
        ("attention.query_key_value",), "linear layers that get an update, by the end of their name",
        choices=LORA_TARGETS, ours=True,
    )  # fmt: skip
    adapter_size: int = option(32, "bottleneck of an adapter", minimum=1, ours=True)
    adapter_parallel: bool = option(False, "adapters read the input of their block instead of its output", ours=True)
    num_virtual_tokens: int = option(100, "P-tuning: virtual tokens before the prompt", minimum=1, ours=True)
    prompt_encoder_hidden_size: int = option(2048, "P-tuning: width of the prompt encoder", minimum=1, ours=True)
