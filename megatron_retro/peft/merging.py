"""Writing what was tuned into the weights, in float32: a whole model in memory, or parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_retro.config.training import PeftConfig
from megatron_retro.errors import ConfigError
from megatron_retro.model.leaves import Linear
from megatron_retro.model.retro import Retro
from megatron_retro.peft.attach import added_parameters
from megatron_retro.peft.methods import IA3, LORA, ia3_merged, lora_merged

MERGEABLE = ("lora", "ia3")


def require_mergeable(method: str) -> None:
    """Refuse what is no change of weights: a bottleneck bends its input, a virtual token is one more input."""
    if method not in MERGEABLE:
        raise ConfigError(
            "this method cannot be merged exactly", got=f"--peft-method {method}", expected="lora or ia3",
            fix="keep what was tuned beside the model; every command loads both",
        )  # fmt: skip


def merge(model: Retro, config: PeftConfig) -> None:
    """The model is a plain one again."""
    require_mergeable(config.peft_method)
    added = added_parameters(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear) or not (hasattr(module, LORA) or hasattr(module, IA3)):
            continue
        for kind in ("weight", "bias"):
            parameter: Tensor | None = getattr(module, kind)
            if parameter is not None:
                parameter.detach().copy_(merged(f"{name}.{kind}", parameter.detach(), added.get, config))
        delattr(module, LORA if hasattr(module, LORA) else IA3)


def merged(name: str, parameter: Tensor, added: Callable[[str], Tensor | None], config: PeftConfig) -> Tensor:
    """A base parameter with what was tuned beside it; `added` gives a tensor by name, None when there is none."""
    path, _, kind = name.rpartition(".")
    up, down = added(f"{path}.{LORA}.up.weight"), added(f"{path}.{LORA}.down.weight")
    if kind == "weight" and up is not None and down is not None:
        return lora_merged(parameter, up.detach(), down.detach(), config.lora_alpha / config.lora_rank)
    factors = added(f"{path}.{IA3}.weight")
    if factors is not None:
        return ia3_merged(parameter, factors.detach(), is_bias=kind == "bias")
    return parameter
