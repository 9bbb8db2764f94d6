"""Export of PEFT runs to the format of Hugging Face's `peft`, and the names that its import shares.

LoRA and (IA)3 follow the tensor rules of the decoder's family: an update of our fused matrices is one update of each of
theirs. Virtual tokens go out as their vectors (prompt tuning); the network that made them stays here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.checkpoint.loading import (
    Checkpoint,
    base_path,
    describe_checkpoint,
    open_base,
    open_checkpoint,
    stored_settings,
)
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.convert.checkpoint_files import parameter_names, read_parameter
from megatron_retro.convert.exported_text import export_text_files
from megatron_retro.convert.families import GPT2, Family
from megatron_retro.convert.hugging_face_settings import hugging_face_from_model
from megatron_retro.convert.model_card import CARD, model_card
from megatron_retro.convert.origin import ORIGIN
from megatron_retro.convert.tensor_rules import Rule
from megatron_retro.data.hub import name_and_revision
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.peft.methods import IA3, LORA
from megatron_retro.peft.prompts import PROMPT, PromptEncoder
from megatron_retro.runtime.strict_json import json_text

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROMPT_VECTORS = "prompt_embeddings"


@dataclass(frozen=True)
class LinearNames:
    """One of our linear layers and the family's layers that it fuses; `input_first` is how GPT-2 stores a matrix."""

    ours: str
    theirs: tuple[str, ...]
    rule: Rule
    input_first: bool

    def split(self, weight: Tensor, model: ModelConfig) -> list[Tensor]:
        """A weight of any number of columns into one [rows, columns] for each of theirs."""
        parts = self.rule.split(weight, model)
        return [part.T if self.input_first else part for part in parts]

    def join(self, parts: list[Tensor], model: ModelConfig) -> Tensor:
        """The inverse."""
        return self.rule.join([part.T if self.input_first else part for part in parts], model)


def linear_names(model: ModelConfig) -> tuple[Family, list[LinearNames]]:
    """The decoder's linear layers, under our names and under their family's."""
    family, _ = hugging_face_from_model(model)
    weights = [rule for rule in family.tensor_rules(model) if ".attention." in rule.ours or ".mlp." in rule.ours]
    found = [
        LinearNames(
            rule.ours.removesuffix(".weight"),
            tuple(name.removesuffix(".weight") for name in rule.theirs),
            rule,
            family is GPT2,
        )
        for rule in weights
        if rule.ours.endswith(".weight") and "norm." not in rule.ours
    ]
    return family, found


def export_peft(
    source: Path, destination: Path, *, dtype: torch.dtype, decoder_only: bool = False, base: str | None = None
) -> Path:
    """Write a PEFT run as a folder that `PeftModel.from_pretrained(base, folder)` loads.

    It names its base: as given, else as the run knows where it came from, so that peft finds it alone.
    """
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    settings = stored_settings(checkpoint)
    method, model = settings[PeftConfig].peft_method, settings[ModelConfig]
    if method not in _WRITERS:
        raise ConfigError(
            f"{checkpoint.path} holds nothing that peft has a form for",
            got=f"--peft-method {method}",
            expected="lora, ia3 or p-tuning",
            fix="--convert-to huggingface exports a whole model" if method == "none" else "keep it in our format",
        )
    names = parameter_names(checkpoint)
    elsewhere = sorted(name for name in names if name.startswith("encoder.") or ".cross_attention." in name)
    if elsewhere and not decoder_only:
        raise ConfigError(
            f"{checkpoint.path} tunes parts that no Hugging Face decoder has",
            got=", ".join(elsewhere[:3]),
            fix="--convert-decoder-only exports the decoder's part alone",
        )
    family, linears = linear_names(model)
    tensors = dict(_WRITERS[method](checkpoint, settings, linears))
    config = {"task_type": "CAUSAL_LM", "inference_mode": True, **_named_base(checkpoint, base)}
    config |= _config(settings, tensors, family)
    with new_directory(destination) as partial:
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial / ADAPTER_TENSORS, metadata={"format": "pt"})
        write_file(partial / ADAPTER_CONFIG, json_text(config, indent=2) + "\n")
        export_text_files(checkpoint.path, settings[TokenizerConfig], partial)
        write_file(partial / CARD, model_card(checkpoint.path, destination.name, "peft"))
    return destination


def _named_base(checkpoint: Checkpoint, given: str | None) -> dict[str, str | None]:
    """The model that was imported and tuned beside; nothing where it is one of ours, or its import is gone."""
    if given is None:
        with suppress(ArtifactError):
            given = describe_checkpoint(base_path(checkpoint)).manifest.inputs.get(ORIGIN)
    elif Path(given).exists():
        given = str(Path(given).absolute())
    name, revision = (None, None) if given is None else name_and_revision(given)
    return {"base_model_name_or_path": name, "revision": revision}


def _config(settings: Settings, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
    peft, model = settings[PeftConfig], settings[ModelConfig]
    if peft.peft_method == "p-tuning":
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": peft.num_virtual_tokens,
            "token_dim": model.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": model.num_attention_heads,
            "num_layers": model.num_layers,
        }
    modules = {_module_of(name) for name in tensors}
    targets = sorted({".".join(module.split(".")[-2:]) for module in modules})
    common = {"target_modules": targets, "fan_in_fan_out": family is GPT2}
    if peft.peft_method == "lora":
        numbers = {"r": peft.lora_rank, "lora_alpha": peft.lora_alpha, "lora_dropout": peft.lora_dropout}
        return {"peft_type": "LORA", "bias": "none", **numbers, **common}
    return {"peft_type": "IA3", "feedforward_modules": [name for name in targets if name.startswith("mlp.")], **common}


def _module_of(name: str) -> str:
    return name.removeprefix(PREFIX).split(".lora_")[0].removesuffix(".ia3_l")


def _lora_tensors(
    checkpoint: Checkpoint, settings: Settings, linears: list[LinearNames]
) -> Iterator[tuple[str, Tensor]]:
    names = parameter_names(checkpoint)
    for linear in linears:
        path = f"{linear.ours}.{LORA}"
        if f"{path}.up.weight" in names:
            down = read_parameter(checkpoint, f"{path}.down.weight")
            parts = linear.split(read_parameter(checkpoint, f"{path}.up.weight"), settings[ModelConfig])
            for module, part in zip(linear.theirs, parts, strict=True):
                yield f"{PREFIX}{module}.lora_A.weight", down.clone()
                yield f"{PREFIX}{module}.lora_B.weight", part


def _factor_tensors(
    checkpoint: Checkpoint, settings: Settings, linears: list[LinearNames]
) -> Iterator[tuple[str, Tensor]]:
    names, model = parameter_names(checkpoint), settings[ModelConfig]
    for linear in linears:
        if f"{linear.ours}.{IA3}.weight" not in names:
            continue
        factors = read_parameter(checkpoint, f"{linear.ours}.{IA3}.weight")
        if factors.dim() == 1:
            yield f"{PREFIX}{linear.theirs[0]}.ia3_l", factors[None]
            continue
        queries = factors.new_ones(len(factors), _query_rows(model))
        parts = linear.split(torch.cat((queries, factors), 1)[..., None], model)
        # Factors of queries are ones: they go out only where the family has one matrix for all three.
        for module, part in list(zip(linear.theirs, parts, strict=True))[-2:]:
            yield f"{PREFIX}{module}.ia3_l", part


def _query_rows(model: ModelConfig) -> int:
    return model.num_attention_heads // model.num_key_value_heads() * model.head_size()


def _prompt_tensors(
    checkpoint: Checkpoint, settings: Settings, linears: list[LinearNames]
) -> Iterator[tuple[str, Tensor]]:
    encoder = PromptEncoder(settings[ModelConfig].hidden_size, settings[PeftConfig])
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(read_parameter(checkpoint, f"embedding.{PROMPT}.{name}"))
        yield PROMPT_VECTORS, encoder() - learned_positions(open_base(checkpoint), settings)


def learned_positions(base: Checkpoint, settings: Settings) -> Tensor:
    """What a family with learned positions adds to virtual tokens; ours replace word and position."""
    count = settings[PeftConfig].num_virtual_tokens
    if settings[ModelConfig].position_embedding_type != "learned_absolute":
        return torch.zeros(count, settings[ModelConfig].hidden_size)
    return read_parameter(base, "embedding.position.weight")[:count]


_WRITERS: Mapping[str, Callable[[Checkpoint, Settings, list[LinearNames]], Iterator[tuple[str, Tensor]]]] = {
    "lora": _lora_tensors,
    "ia3": _factor_tensors,
    "p-tuning": _prompt_tensors,
}
