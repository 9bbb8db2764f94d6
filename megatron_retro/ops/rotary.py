"""Rotary positions: tables of cosines and sines, and their application to queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.ops.backend_names import NATIVE
from megatron_retro.ops.backends import backend_of, formula_of


@dataclass(frozen=True)
class RotaryFrequencies:
    """The rotary frequencies of a head, of whose dimensions the first `rotated` are rotated."""

    rotated: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse(self, device: torch.device) -> Tensor:
        """[rotated / 2] radians per position, float32."""
        exponent = torch.arange(0, self.rotated, 2, dtype=torch.float32, device=device) / self.rotated
        frequencies = 1.0 / self.base**exponent
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "llama3":
            return self._llama3(frequencies)
        if self.scaling == "yarn":
            return self._yarn(frequencies)
        return frequencies

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by: YaRN sharpens attention over its longer text."""
        return yarn_amplitude(self.factor) if self.scaling == "yarn" else 1.0

    def _llama3(self, frequencies: Tensor) -> Tensor:
        """Long waves are stretched, short ones kept, those between blended."""
        wavelengths = 2 * math.pi / frequencies
        low, high = self.low_frequency_factor, self.high_frequency_factor
        smooth = ((self.original_max_positions / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies

    def _yarn(self, frequencies: Tensor) -> Tensor:
        """What turns often over the original text is kept, what turns seldom is stretched, what is between is mixed."""
        fast, slow = (self._dimension_of(turns) for turns in YARN_TURNS)
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), self.rotated - 1)
        place = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        stretched = ((place - low) / (high - low or 0.001)).clamp(0, 1)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)

    def _dimension_of(self, turns: float) -> float:
        """The pair of dimensions that turns so often over the original text."""
        positions = self.original_max_positions / (turns * 2 * math.pi)
        return self.rotated * math.log(positions) / (2 * math.log(self.base))


YARN_TURNS = (32, 1)  # over the original text: where stretching begins, and where it is whole


def yarn_amplitude(factor: float) -> float:
    """YaRN's attention factor."""
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of some positions: [B or 1, S, rotated / 2], float32."""

    cosine: Tensor
    sine: Tensor


def rotary_table(position_ids_BS: Tensor, frequencies: RotaryFrequencies) -> RotaryTable:
    """The table of the given positions."""
    positions_BS = position_ids_BS.float()
    if frequencies.scaling == "interpolated":  # positions, not frequencies: float32 rounds otherwise
        positions_BS = positions_BS * (1 / frequencies.factor)
    angles = positions_BS[..., None] * frequencies.inverse(position_ids_BS.device)
    amplitude = frequencies.amplitude()
    if amplitude == 1.0:
        return RotaryTable(angles.cos(), angles.sin())
    return RotaryTable(angles.cos() * amplitude, angles.sin() * amplitude)


def apply_rotary(
    heads_BSND: Tensor, table: RotaryTable, *, interleaved: bool = False, may_overwrite: bool = False
) -> Tensor:
    """Rotate the first dimensions of each head by its position's angles; the rest passes.

    `may_overwrite` says that nobody else needs `heads`: where no gradient is recorded they are rotated in place.
    """
    backend = _serving(heads_BSND)
    if backend == NATIVE:
        heads_BSND = heads_BSND if heads_BSND.stride(-1) == 1 else heads_BSND.contiguous()
        tables = table.cosine.contiguous(), table.sine.contiguous()
        if may_overwrite and not (torch.is_grad_enabled() and heads_BSND.requires_grad):
            torch.ops.megatron_retro.rotary_(heads_BSND, *tables, interleaved, False)
            return heads_BSND
        rotated_BSND: Tensor = torch.ops.megatron_retro.rotary(heads_BSND, *tables, interleaved, False)
        return rotated_BSND
    return formula_of(backend, _reference)(heads_BSND, table.cosine, table.sine, interleaved)


def rotate_both(
    query_BSND: Tensor, key_BSGD: Tensor, table: RotaryTable, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys that nobody else needs."""
    query, key = (
        apply_rotary(each, table, interleaved=interleaved, may_overwrite=True) for each in (query_BSND, key_BSGD)
    )
    return query, key


def split_heads(
    projected_BSGND: Tensor, table: RotaryTable | None, *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, G * (N - 2), D], keys and values [B, S, G, D] of groups that hold them in this order.

    Queries and keys are rotated: at once, where a formula does it and both are then views of what it gives. A compiler
    fuses either way, and better what stays apart.
    """
    groups, heads = projected_BSGND.shape[2], projected_BSGND.shape[3] - 2
    views = 1 in (groups, heads) and not torch.compiler.is_compiling()
    at_once = table is not None and views and _serving(projected_BSGND) != NATIVE
    if table is not None and at_once:
        both, value = torch.split(projected_BSGND, [heads + 1, 1], -2)
        query, key = torch.split(apply_rotary(both, table, interleaved=interleaved), [heads, 1], -2)
    else:
        query, key, value = torch.split(projected_BSGND, [heads, 1, 1], -2)
    query, key, value = query.flatten(2, 3), key.squeeze(-2), value.squeeze(-2)
    if table is not None and not at_once:
        query, key = rotate_both(query, key, table, interleaved=interleaved)
    return query, key, value


def _serving(heads: Tensor) -> str:
    return backend_of("rotary", heads.device.type, heads.dtype)


def _reference(heads_BSND: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    rotated, width = 2 * cosine.shape[-1], heads_BSND.shape[-1]
    rotating, *passing = torch.split(heads_BSND, [rotated, width - rotated], -1) if rotated < width else [heads_BSND]
    of_heads = (*cosine.shape[:2], *(1 for _ in heads_BSND.shape[2:-1]), rotated // 2)
    cosine, sine = (table.reshape(of_heads).to(heads_BSND.dtype) for table in (cosine, sine))
    first, second = (rotating[..., 0::2], rotating[..., 1::2]) if interleaved else rotating.chunk(2, -1)
    turned, other = first * cosine - second * sine, second * cosine + first * sine
    parts = [torch.stack((turned, other), -1).flatten(-2)] if interleaved else [turned, other]
    return torch.cat((*parts, *passing), -1) if len(parts) + len(passing) > 1 else parts[0]
