"""A model of Megatron-LM's as an import needs it: settings of ours, and a tensor for each of our parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.megatron_adam import StoredAdam


@dataclass(frozen=True)
class MegatronModel:
    """`sources` gives the stored name of each parameter of ours, `read` its whole tensor, `names` are all stored ones.

    `arguments` are those of its run, `adam` is its optimizer's state by names of ours. The vocabulary of `model` is
    that of the stored tables, padding included.
    """

    path: Path
    model: ModelConfig
    retro: RetroConfig
    sources: Mapping[str, str]
    names: Collection[str]
    read: Callable[[str], Tensor]
    arguments: Mapping[str, Any]
    adam: StoredAdam
    skipped: tuple[str, ...]
    tensor_ranks: int
    fingerprint: Mapping[str, str]
