"""Dropout's random numbers as a function of (seed, step, microbatch, layer), so that data and pipeline layouts agree.

Each layer starts its own stream for each microbatch; nothing is carried from step to step, so a resumed run needs no
state. Ranks that cut the residual stream (sequence parallelism) draw differently, and so do tensor ranks inside a
region, where each has its own heads; elsewhere tensor ranks draw the same. Masks therefore depend on the tensor
size, on sequence parallelism and on the microbatch size, and on nothing else of the layout. A model without dropout
draws nothing and is not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_retro.config.model import ModelConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import regions_of
from megatron_retro.runtime.seeds import derived_seed


class Streams:
    """Where a rank stands: the step and the number of the microbatch in the global batch."""

    def __init__(self, seed: int, axis: TensorAxis | None) -> None:
        self._seed = seed
        self._axis = axis
        self._cut_stream = axis.rank if axis is not None and axis.sequence_parallel else 0
        self.step = 0
        self.microbatch = 0

    def attach(self, model: Retro) -> None:
        """Let every layer, and every region of a cut one, draw from its own stream."""
        for name, layer in model.layers.items():
            layer.register_forward_pre_hook(_Start(self, name), prepend=True)
        if self._axis is not None and not self._axis.sequence_parallel:
            modules = dict(model.named_modules())
            for path in regions_of(modules):
                switch = _OwnHeads(self._axis.rank)
                modules[path].register_forward_pre_hook(switch.enter)
                modules[path].register_forward_hook(switch.leave)

    def start(self, place: str) -> None:
        """Begin the stream of a place in the model, for the current microbatch."""
        torch.manual_seed(derived_seed(self._seed, "dropout", self.step, self.microbatch, place, self._cut_stream))


class _Start:
    def __init__(self, streams: Streams, place: str) -> None:
        self._streams, self._place = streams, place

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            self._streams.start(self._place)


class _OwnHeads:
    """Inside a region each tensor rank draws its own numbers; outside all draw the same again."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._afterwards = 0

    def enter(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            inside, self._afterwards = (int(seed) for seed in torch.randint(1 << 62, (2,)))
            torch.manual_seed(inside + self._rank)

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module.training:
            torch.manual_seed(self._afterwards)


def has_dropout(model: ModelConfig, retro: RetroConfig) -> bool:
    """Whether anything is drawn at all."""
    encoder = retro.encoder_model(model)
    return any((model.hidden_dropout, model.attention_dropout, encoder.hidden_dropout, encoder.attention_dropout))
