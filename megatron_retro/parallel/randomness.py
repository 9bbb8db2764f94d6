"""Dropout's random numbers as a function of (seed, step, microbatch, layer), so that data and pipeline layouts agree.

Each layer starts its own stream for each microbatch; nothing is carried from step to step, so a resumed run needs no
state. Ranks that cut the residual stream (sequence parallelism) draw differently, and so do tensor ranks inside a
region, where each has its own heads; elsewhere tensor ranks draw the same. Ranks that share sequences (context
parallelism) draw differently everywhere. Masks of the model therefore depend on the tensor and context sizes, on
sequence parallelism and on the microbatch size, and on nothing else of the layout. What is tuned beside it (`Dropout`,
LoRA's) drops the same elements for any other layout: every rank draws the whole mask and takes its part. A model
without dropout draws nothing and is not touched.

The seed of a stream says where it belongs: the layer's part, the same on all tensor ranks, then the region's, then the
rank's. It comes back with the generator's state when a layer is recomputed, whatever the step has gone on to since.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.leaves import Dropout
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import Style, cut_of, regions_of
from megatron_retro.runtime.seeds import derived_seed

_REGION_BITS, _RANK_BITS = 12, 8


class RandomStreams:
    """Where a rank stands: the step and the number of the microbatch in the global batch."""

    def __init__(self, seed: int, axis: TensorAxis | None, context_rank: int = 0) -> None:
        self._seed = derived_seed(seed, "context", context_rank) if context_rank else seed
        self._axis = axis
        self._cut_stream = axis.rank if axis is not None and axis.sequence_parallel else 0
        self.step = 0
        self.microbatch = 0

    def attach(self, model: Retro) -> None:
        """Let every layer, and every region of a cut one, draw from its own stream."""
        for name, layer in model.layers.items():
            layer.register_forward_pre_hook(_Start(self, name), prepend=True)
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if isinstance(module, Dropout):
                module.kept = _WholeMask(path, module.chance, self._axis)
        if self._axis is not None and not self._axis.sequence_parallel:
            for number, path in enumerate(regions_of(modules)):
                switch = _OwnHeads(2 * number + 1, self._axis.rank)
                modules[path].register_forward_pre_hook(switch.before)
                modules[path].register_forward_hook(switch.after)

    def start(self, place: str) -> None:
        """Begin the stream of a place in the model, for the current microbatch."""
        layer = derived_seed(self._seed, "dropout", self.step, self.microbatch, place) >> _REGION_BITS + _RANK_BITS
        _begin(layer, 0, self._cut_stream)


class _Start:
    def __init__(self, streams: RandomStreams, place: str) -> None:
        self._streams, self._place = streams, place

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            self._streams.start(self._place)


def _begin(layer: int, region: int, rank: int) -> None:
    torch.manual_seed((layer << _REGION_BITS | region) << _RANK_BITS | rank)


def _layer() -> int:
    """The part of the present stream's seed that all tensor ranks share."""
    return torch.initial_seed() >> _REGION_BITS + _RANK_BITS


class _OwnHeads:
    """Inside a region each tensor rank draws its own numbers; outside all draw the same again."""

    def __init__(self, number: int, rank: int) -> None:
        self._number, self._rank = number, rank

    def before(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            _begin(_layer(), self._number, self._rank)

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module.training:
            _begin(_layer(), self._number + 1, 0)


class _WholeMask:
    """The mask of what one module reads, drawn whole on every rank."""

    def __init__(self, path: str, chance: float, axis: TensorAxis | None) -> None:
        self._path, self._chance = path, chance
        reader = cut_of(path.rpartition(".")[0] + ".down.weight")
        self._axis = axis if reader.style is Style.ROW else None

    def __call__(self, hidden: Tensor) -> Tensor:
        ranks, width = 1 if self._axis is None else self._axis.size, hidden.shape[-1]
        shape = (*hidden.shape[:-1], ranks * width)
        draws = torch.Generator(hidden.device).manual_seed(derived_seed(_layer(), self._path))
        whole = torch.rand(shape, generator=draws, device=hidden.device) >= self._chance
        return whole if self._axis is None else whole.narrow(-1, self._axis.rank * width, width)


def has_dropout(model: nn.Module, config: ModelConfig, retro: RetroConfig) -> bool:
    """Whether anything is drawn at all."""
    encoder = retro.encoder_model(config)
    chances = (config.hidden_dropout, config.attention_dropout, encoder.hidden_dropout, encoder.attention_dropout)
    return any(chances) or any(isinstance(part, Dropout) and part.chance > 0.0 for part in model.modules())
