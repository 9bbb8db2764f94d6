"""From a pretrained GPT to a Retro: which settings it brings, which weights, and what is made fresh.

The decoder's weights come from the GPT's checkpoint. The neighbour encoder, cross-attention and its norms and gates are
fresh, with values that depend on the seed and the name alone; or they start from the decoder (`warm_start`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from itertools import groupby

import torch

from megatron_retro.assembly.stage_building import trained_parts, trains
from megatron_retro.assembly.warm_start import starts_from_decoder
from megatron_retro.checkpoint.live_state import MODEL
from megatron_retro.checkpoint.loading import Checkpoint, Described, found_tokenizer
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.fields import field_specs
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, MEGATRON_ORIGIN, Settings, section_name
from megatron_retro.data.model_text import FILE_SETTINGS
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.model.retro import Retro
from megatron_retro.optim.groups import part_of

DECODER_SECTIONS: tuple[type, ...] = (ModelConfig, TokenizerConfig)
WHOLE_MODEL_SECTIONS: tuple[type, ...] = (*DECODER_SECTIONS, RetroConfig)


@dataclass(frozen=True)
class ParameterSource:
    """One parameter (or the same one of several layers) of the retro-fitted model."""

    parameter: str
    shape: tuple[int, ...]
    source: str
    trains: bool


def inherited_settings(
    settings: Settings, checkpoint: Described, sections: tuple[type, ...] = DECODER_SECTIONS
) -> Settings:
    """Settings with the shape and the tokenizer of a model; a decoder that the user set otherwise is refused."""
    changes: dict[str, object] = {}
    wrong = []
    for section in sections:
        stored = checkpoint.manifest.config.get(section_name(section), {})
        for spec in field_specs(section):
            if spec.name not in stored:
                continue
            value = spec.converted(stored[spec.name])
            mine = getattr(settings[section], spec.name)
            origin, is_dropout = settings.origin(spec.name), "dropout" in spec.name
            if origin == DEFAULT_ORIGIN or (origin == MEGATRON_ORIGIN and not is_dropout):
                changes[spec.name] = value
            elif mine != value and section is ModelConfig and not is_dropout:
                wrong.append(f"{spec.flag}: {value!r} there, {mine!r} here")
    if wrong:
        raise ConfigError(
            f"the model under {checkpoint.path} has another shape than was asked for",
            got="; ".join(wrong),
            fix="leave the decoder's settings out: they come from the checkpoint",
        )
    settings = settings.replace(**changes)
    tokenizer = found_tokenizer(settings[TokenizerConfig], checkpoint.path)
    return settings.replace(**{name: getattr(tokenizer, name) for name in FILE_SETTINGS if name in changes})


def parameter_sources(settings: Settings, checkpoint: Checkpoint) -> list[ParameterSource]:
    """Where each parameter of the new model comes from, and whether it will change."""
    with torch.device("meta"):
        model = Retro(settings[ModelConfig], settings[RetroConfig])
    rows = []
    for name, parameter in model.named_parameters():
        from_gpt = MODEL + name in checkpoint.index.sizes
        warm = settings[RetroConfig].retro_init == "decoder" and starts_from_decoder(name)
        source = "checkpoint" if from_gpt else "decoder" if warm else "fresh"
        rows.append(ParameterSource(name, tuple(parameter.shape), source, trains(name, trained_parts(settings))))
    lost = [row.parameter for row in rows if row.source == "fresh" and part_of(row.parameter) == "decoder"]
    if lost:
        raise ArtifactError(
            f"{checkpoint.path} does not hold the whole decoder", got=", ".join(lost[:5]), fix="give a GPT's checkpoint"
        )
    return rows


def collapsed(rows: list[ParameterSource]) -> list[ParameterSource]:
    """The sources with the layers of one kind in one row: `layers.{0-5}.mlp.up.weight`."""

    def kind(row: ParameterSource) -> tuple[str, tuple[int, ...], str, bool]:
        return re.sub(r"\.\d+\.", ".*.", row.parameter), row.shape, row.source, row.trains

    order = {kind(row): number for number, row in reversed(list(enumerate(rows)))}
    result = []
    for _, group in groupby(sorted(rows, key=lambda row: order[kind(row)]), key=kind):
        members = list(group)
        numbers = [int(found[1]) for row in members if (found := re.search(r"\.(\d+)\.", row.parameter))]
        name = members[0].parameter
        if len(members) > 1:
            name = re.sub(r"\.\d+\.", f".{{{_spans(numbers)}}}.", name, count=1)
        result.append(dataclasses.replace(members[0], parameter=name))
    return result


def _spans(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
