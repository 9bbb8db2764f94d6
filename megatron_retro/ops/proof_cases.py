"""What kernels are proven on: a small seeded grid for each operator, odd sizes among even ones, and one size to time.

A case is called through the operator's face, so that what is proven is what serves, its backward pass too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.activation import GELU, GELU_TANH, SQUARED_RELU, SWIGLU, activate
from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.linear_cross_entropy import linear_cross_entropy
from megatron_retro.ops.norm import layer_norm, residual_norm, rms_norm
from megatron_retro.ops.precision import Formula
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, apply_rotary, rotary_table


@dataclass(frozen=True)
class Case:
    """A call of a face, and the formula that is the truth in float64 where the face's own reference is not."""

    face: Formula
    inputs: Sequence[Tensor | None]
    formula: Formula | None = None


@dataclass(frozen=True)
class Sizes:
    """How large the timed case is."""

    tokens: int
    width: int
    vocabulary: int


TIMED: Mapping[str, Sizes] = {"cpu": Sizes(128, 256, 1000), "cuda": Sizes(8192, 4096, 32_000)}
# Odd, but not tiny: the largest of few errors is luck, and where all cancels there is none to compare.
_ROWS = ((65, 64), (33, 37), (19, 1000), (257, 8))


class Grid:
    """Makes the cases of one type and place; the same seed gives the same numbers everywhere."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def proven(self, operator: str) -> Iterator[Case]:
        """The grid of an operator."""
        if operator in _NORMS:
            for rows, width in _ROWS:
                yield self._norm(operator, rows, width)
        elif operator in _ACTIVATIONS:
            for rows, width in _ROWS:
                for with_bias in (False, True):
                    yield self._activation(operator, rows, width, with_bias=with_bias)
        elif operator == "rotary":
            for interleaved in (False, True):
                for sizes in ((2, 3, 2, 32, 16), (1, 2, 3, 10, 6), (2, 65, 1, 128, 128)):
                    yield self._rotary(*sizes, interleaved=interleaved)
        elif operator == "chunked_cross_attention":
            for rotated in (False, True):
                for shape in _ATTENTIONS:
                    yield self._attention(*shape, rotated=rotated)
        else:
            for tokens, width, vocabulary in ((39, 16, 33), (130, 64, 1100)):
                yield self._loss(tokens, width, vocabulary)

    def timed(self, operator: str) -> Case:
        """A size as a layer has it."""
        sizes = TIMED[self._device.type]
        if operator in _NORMS:
            return self._norm(operator, sizes.tokens, sizes.width)
        if operator in _ACTIVATIONS:
            return self._activation(operator, sizes.tokens, sizes.width, with_bias=False)
        if operator == "rotary":
            return self._rotary(1, sizes.tokens, sizes.width // 64, 64, 64, interleaved=False)
        if operator == "chunked_cross_attention":
            chunks, heads = sizes.tokens // 128, sizes.width // 64
            return self._attention(1, sizes.tokens // 2, 0, heads, heads, 64, 64, 256, chunks, rotated=True)
        return self._loss(sizes.tokens, sizes.width, sizes.vocabulary)

    def _leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self._device, self._dtype).requires_grad_()

    def _norm(self, operator: str, rows: int, width: int) -> Case:
        hidden, residual = self._leaf(rows, width, scale=2.0), self._leaf(rows, width)
        weight, bias = self._leaf(width), self._leaf(width)
        if operator == "layer_norm":
            return Case(partial(layer_norm, epsilon=1e-5, weight_plus_one=True), (hidden, weight, bias))
        if operator == "rms_norm":
            return Case(partial(rms_norm, epsilon=1e-5), (hidden, weight))
        centered = operator == "residual_layer_norm"
        face = partial(residual_norm, epsilon=1e-5, centered=centered)
        return Case(face, (hidden, residual, weight, bias if centered else None))

    def _activation(self, operator: str, rows: int, width: int, *, with_bias: bool) -> Case:
        kind = SWIGLU if operator == "gated_activation" else operator
        shape = (2, width) if kind == SWIGLU else (width,)
        projected, bias = self._leaf(rows, *shape, scale=3.0), self._leaf(*shape) if with_bias else None
        return Case(lambda given, shift: activate(given, kind, shift), (projected, bias))

    def _rotary(self, batch: int, length: int, heads: int, size: int, rotated: int, *, interleaved: bool) -> Case:
        positions = torch.randint(0, 500, (batch, length), generator=self._generator).to(self._device)
        table = rotary_table(positions, RotaryFrequencies(rotated, 10000.0))

        def face(wide: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            return apply_rotary(wide[..., :size], RotaryTable(cosine, sine), interleaved=interleaved)

        return Case(face, (self._leaf(batch, length, heads, size + 16), table.cosine, table.sine))

    def _attention(
        self,
        batch: int,
        length: int,
        first: int,
        heads: int,
        groups: int,
        size: int,
        chunk_length: int,
        keys: int,
        chunks: int,
        *,
        rotated: bool,
    ) -> Case:
        query, both = self._leaf(batch, length, heads, size), self._leaf(batch, chunks, keys, groups, 2 * size)
        mask = torch.rand(batch, chunks, keys, generator=self._generator) > 0.3
        mask[0, 0], mask[-1, -1, :2] = False, True  # absent neighbours; a key that is alone has no gradient to compare
        frequencies = RotaryFrequencies(2 * (size // 4), 10000.0)
        tables = [rotary_table(torch.arange(count, device=self._device)[None], frequencies) for count in (length, keys)]
        rotary: dict[str, Any] = {"query_table": tables[0], "key_table": tables[1]} if rotated else {}

        def face(q: Tensor, kv: Tensor, allowed: Tensor) -> Tensor:
            key, value = kv[..., :size], kv[..., size:]
            return chunked_cross_attention(q, key, value, allowed, chunk_length, first_position=first, **rotary)

        return Case(face, (query, both, mask.to(self._device)))

    def _loss(self, tokens: int, width: int, vocabulary: int) -> Case:
        hidden, weight = self._leaf(1, tokens, width), self._leaf(vocabulary, width, scale=width**-0.5)
        labels = torch.randint(-1, vocabulary, (1, tokens), generator=self._generator)
        return Case(linear_cross_entropy, (hidden, weight, labels.to(self._device)), formula=_loss_formula)


def _loss_formula(hidden: Tensor, weight_VH: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight_VH)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits[0], labels[0], ignore_index=-1, reduction="none")[None]


_NORMS = ("layer_norm", "rms_norm", "residual_layer_norm", "residual_rms_norm")
_ACTIVATIONS = ("gated_activation", GELU, GELU_TANH, SQUARED_RELU)
# batch, length, first position, query heads, key heads, head size, chunk length, keys of a chunk, chunks
_ATTENTIONS = (
    (2, 43, 0, 4, 2, 16, 8, 22, 5),
    (2, 21, 6, 2, 2, 12, 4, 40, 6),
    (1, 50, 0, 2, 1, 132, 10, 33, 5),
    (1, 200, 0, 4, 2, 64, 64, 150, 3),
    (1, 99, 1, 2, 1, 128, 32, 65, 3),
)
