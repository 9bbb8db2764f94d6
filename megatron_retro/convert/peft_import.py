"""Import of adapters of Hugging Face's `peft` as PEFT runs: LoRA, (IA)3, prompt tuning, P-tuning.

Our matrices are fused where theirs are not, so updates of several of theirs become one of ours whose rank is the sum
of those whose inputs differ. Nothing is approximated; what has no counterpart is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import Checkpoint, open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, PeftConfig
from megatron_retro.convert.checkpoint_files import write_checkpoint
from megatron_retro.convert.hugging_face_peft import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    PREFIX,
    PROMPT_VECTORS,
    LinearNames,
    learned_positions,
    linear_names,
)
from megatron_retro.convert.origin import FOLDED, first_input
from megatron_retro.convert.safetensors_folder import opened, read_json
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.peft.methods import IA3, LORA
from megatron_retro.peft.prompts import PROMPT

Imported = tuple[PeftConfig, dict[str, Tensor]]
# fields that change the function and what they must be to leave it alone
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "num_transformer_submodules": (None, 1),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) begin by taking their part out of the base's weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}


def import_peft(source: Path, base: Path, run: Path) -> Path:
    """Write step 0 of `run`: the adapter of a folder, whose base is the checkpoint `base`."""
    theirs = read_json(source / ADAPTER_CONFIG)
    checkpoint = open_checkpoint(base)
    settings = stored_settings(checkpoint)
    kind = str(theirs.get("peft_type"))
    if kind not in ("LORA", "IA3", "PROMPT_TUNING", "P_TUNING"):
        raise ConfigError(
            f"adapters of type {kind} cannot be imported", expected="LORA, IA3, PROMPT_TUNING or P_TUNING"
        )
    changed = [
        f"{name} = {theirs[name]!r}" for name, plain in _PLAIN.items() if theirs.get(name, plain[0]) not in plain
    ]
    if changed:
        raise ConfigError(f"{source / ADAPTER_CONFIG} asks for what has no counterpart here", got="; ".join(changed))
    folded = first_input(checkpoint, FOLDED)
    if folded is not None and kind != "IA3":  # factors of rows and columns commute with a multiplier
        raise ConfigError(
            f"{source} would have another scale over {checkpoint.path}",
            got=f"an adapter of type {kind}, and weights that hold the multipliers of {folded}",
            fix="export the base (--convert-to huggingface), tune that, and import it as the adapter's base",
        )
    with opened(source / ADAPTER_TENSORS) as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        peft, added = _prompt(tensors, checkpoint, settings)
    else:
        used: set[str] = set()
        peft, added = (_lora if kind == "LORA" else _factors)(theirs, tensors, settings[ModelConfig], used)
        unknown = sorted(set(tensors) - used)
        if unknown:
            raise ArtifactError(f"{source} tunes what has no counterpart here", got=", ".join(unknown[:5]))
    kinds = (ModelConfig, RetroConfig, TokenizerConfig)
    written = Settings([*(settings[one] for one in kinds), peft, CheckpointConfig(load=str(base.absolute()))])
    shapes = {name: tuple(tensor.shape) for name, tensor in added.items()}
    inputs = {"base": checkpoint.manifest.fingerprint}
    if (tokenizer := checkpoint.manifest.inputs.get("tokenizer")) is not None:
        inputs["tokenizer"] = tokenizer
    return write_checkpoint(run, written, shapes, lambda name: added[name].contiguous(), inputs)


def _lora(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], model: ModelConfig, used: set[str]) -> Imported:
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    for linear in linear_names(model)[1]:
        pairs = [_pair(tensors, f"{PREFIX}{module}", used) for module in linear.theirs]
        if any(pair is not None for pair in pairs):
            updates[linear.ours] = _fused(linear, pairs, model)
    if not updates:
        raise ArtifactError("the adapter holds no LoRA of this model", got=", ".join(sorted(tensors)[:3]))
    rank = max(len(down) for _, down in updates.values())
    stored_rank = int(theirs["r"])
    scale = float(theirs["lora_alpha"]) / (math.sqrt(stored_rank) if theirs.get("use_rslora") else stored_rank)
    # The layers that the adapter leaves alone have an update of zero: our targets are the same in every layer.
    targets = tuple(dict.fromkeys(".".join(path.split(".")[-2:]) for path in updates))
    added: dict[str, Tensor] = {}
    for linear in linear_names(model)[1]:
        if linear.ours.endswith(targets):
            up, down = updates.get(linear.ours) or _no_update(linear, updates, model)
            missing = rank - len(down)
            added[f"{linear.ours}.{LORA}.up.weight"] = torch.nn.functional.pad(up, (0, missing))
            added[f"{linear.ours}.{LORA}.down.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
    return PeftConfig(
        peft_method="lora",
        lora_rank=rank,
        lora_alpha=scale * rank,
        lora_dropout=float(theirs.get("lora_dropout", 0.0)),
        lora_targets=targets,
    ), added


def _pair(tensors: Mapping[str, Tensor], module: str, used: set[str]) -> tuple[Tensor, Tensor] | None:
    """B and A of one of their layers."""
    names = (f"{module}.lora_B.weight", f"{module}.lora_A.weight")
    if names[0] not in tensors or names[1] not in tensors:
        return None
    used.update(names)
    return tensors[names[0]], tensors[names[1]]


def _fused(
    linear: LinearNames, pairs: Sequence[tuple[Tensor, Tensor] | None], model: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Our up and down: each of their B stands in the columns of its own A; A that are equal share theirs."""
    inputs: list[Tensor] = []
    places: list[int] = []
    for pair in pairs:
        if pair is None:
            places.append(-1)
            continue
        known = (number for number, one in enumerate(inputs) if torch.equal(one, pair[1]))
        places.append(next(known, len(inputs)))
        if places[-1] == len(inputs):
            inputs.append(pair[1])
    starts = [sum(map(len, inputs[:number])) for number in range(len(inputs) + 1)]
    parts = []
    for rows, pair, place in zip(_rows(linear, model), pairs, places, strict=True):
        part = torch.zeros(rows, starts[-1])
        if pair is not None:
            part[:, starts[place] : starts[place + 1]] = pair[0]
        parts.append(part)
    return linear.join(parts, model), torch.cat(inputs)


def _rows(linear: LinearNames, model: ModelConfig) -> list[int]:
    """Output sizes of their layers."""
    heads, groups, size = model.num_attention_heads, model.num_key_value_heads(), model.head_size()
    if linear.ours.endswith("query_key_value"):
        rows = [heads * size, groups * size, groups * size]
        return rows if len(linear.theirs) == 3 else [sum(rows)]
    if linear.ours.endswith("mlp.up"):
        return [model.ffn_width()] * len(linear.theirs)
    return [model.hidden_size]


def _no_update(
    linear: LinearNames, updates: Mapping[str, tuple[Tensor, Tensor]], model: ModelConfig
) -> tuple[Tensor, Tensor]:
    ending = ".".join(linear.ours.split(".")[-2:])
    up, down = next(pair for path, pair in updates.items() if path.endswith(ending))
    return torch.zeros_like(up), torch.zeros_like(down)


def _factors(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], model: ModelConfig, used: set[str]) -> Imported:
    added: dict[str, Tensor] = {}
    for linear in linear_names(model)[1]:
        names = [f"{PREFIX}{module}.ia3_l" for module in linear.theirs]
        name = f"{linear.ours}.{IA3}.weight"
        if linear.ours.endswith("mlp.down"):
            factors = tensors.get(names[0], torch.ones(1, model.ffn_width()))
            if len(factors) == 1:
                used.update(names)
                added[name] = factors[0]
        elif linear.ours.endswith("query_key_value"):
            shapes = [(rows, 1) for rows in _rows(linear, model)]
            found = [tensors.get(one, torch.ones(shape)) for one, shape in zip(names, shapes, strict=True)]
            whole = linear.join(found, model)[..., 0]
            queries = whole.shape[1] - 2 * model.head_size()
            if [tuple(one.shape) for one in found] == shapes and bool((whole[:, :queries] == 1).all()):
                used.update(names)
                added[name] = whole[:, queries:]
    return PeftConfig(peft_method="ia3"), added


def _prompt(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, settings: Settings) -> Imported:
    """Vectors behind a prompt encoder that passes them on exactly: relu(x) - relu(-x) is x."""
    width = settings[ModelConfig].hidden_size
    vectors = tensors.get(PROMPT_VECTORS)
    if vectors is None or vectors.shape[-1] != width or len(tensors) != 1:
        raise ArtifactError(
            "the adapter holds no virtual tokens of this model",
            got=", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()),
            expected=f"{PROMPT_VECTORS} [tokens, {width}]",
        )
    peft = PeftConfig(peft_method="p-tuning", num_virtual_tokens=len(vectors), prompt_encoder_hidden_size=2 * width)
    positions = learned_positions(checkpoint, Settings([settings[ModelConfig], peft]))
    both = torch.cat((torch.eye(width), -torch.eye(width)))
    values = {
        "table.weight": vectors + positions,
        "up.weight": both,
        "up.bias": torch.zeros(2 * width),
        "down.weight": both.T,
        "down.bias": torch.zeros(width),
    }
    return peft, {f"embedding.{PROMPT}.{name}": value for name, value in values.items()}
