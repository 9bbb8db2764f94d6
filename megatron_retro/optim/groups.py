"""Parameter groups: which rate and which decay a parameter gets, told from its name.

Decay is for matrices that multiply activations. Biases, norms and gates are left alone, and so is anything of fewer
than two dimensions. Rates follow the part of the model: decoder, neighbour encoder, cross-attention, gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_retro.config.training import OptimizerConfig

PARTS = ("decoder", "encoder", "cross_attention", "gate")


@dataclass(frozen=True)
class GroupKey:
    """What all parameters of one group share."""

    part: str
    decays: bool

    @property
    def name(self) -> str:
        return self.part if self.decays else f"{self.part} (no decay)"


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    words = name.split(".")
    if "gate" in words:
        return "gate"
    if words[0] == "encoder":
        return "encoder"
    if "cross_attention" in words or "cross_norm" in words:
        return "cross_attention"
    return "decoder"


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: factors of (IA)3 start from one, and would shrink what they scale."""
    words = name.split(".")
    is_norm = any(word.endswith("norm") for word in words)
    return parameter.ndim >= 2 and words[-1] != "bias" and not is_norm and not {"gate", "ia3"} & set(words)


def group_key(name: str, parameter: nn.Parameter) -> GroupKey:
    """The group of a parameter."""
    return GroupKey(part_of(name), decays(name, parameter))


def rate_scale(part: str, config: OptimizerConfig) -> float:
    """The factor of a part's learning rate."""
    scale: float = getattr(config, f"lr_scale_{part}")
    return scale


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them; frozen parameters are left out."""
    members: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            members.setdefault(group_key(name, parameter), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if key.decays else 0.0,
            "rate_scale": rate_scale(key.part, config),
            "group_name": key.name,
        }
        for key, parameters in members.items()
    ]
