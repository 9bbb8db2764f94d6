"""`megatron-retro convert`: foreign models into checkpoints, and checkpoints into Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.model import ConvertConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = """Read SOURCE, write DESTINATION.

SOURCE is a Hugging Face folder (config.json with safetensors: Llama, Qwen 2 and 3, Mistral, Nemotron, StableLM,
GPT-2), a checkpoint of Megatron-LM's Retro (mp_rank_XX/model_optim_rng.pt), or a checkpoint of ours. With
--convert-to checkpoint (the default) DESTINATION becomes a run whose step 0 holds the weights: start from it with
`pretrain --load DESTINATION --finetune` or `retrofit --load DESTINATION`. With --convert-to huggingface it becomes
a folder that AutoModelForCausalLM loads. With --convert-to remote-code a whole Retro, encoder and all, becomes a
folder that it loads with trust_remote_code=True where megatron_retro is installed.

A run that tuned LoRA or (IA)3 beside a model becomes a whole model with --convert-merge, ours or Hugging Face's;
with --convert-to peft, what it tuned (P-tuning too) becomes a folder that PeftModel.from_pretrained loads over the
exported base. Such a folder comes in with --convert-base, the checkpoint that it belongs to. Tensors pass one by one;
no model is ever whole in memory."""
SECTIONS: tuple[type, ...] = (ConvertConfig,)
POSITIONAL: Positional | None = Positional("paths", "*", "SOURCE DESTINATION")


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Convert."""
    from megatron_retro.convert.conversion import convert
    from megatron_retro.errors import ConfigError

    if len(positional) != 2:
        raise ConfigError("convert takes two paths", got=" ".join(positional) or "none", expected="SOURCE DESTINATION")
    convert(settings[ConvertConfig], positional[0], positional[1])
