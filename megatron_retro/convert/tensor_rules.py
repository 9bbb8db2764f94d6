"""Rules that join one of our tensors from the tensors of another program, and split it into them.

Where numbers change, they do so in float32: what is stored in fewer bits is rounded once, as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig

Join = Callable[[Sequence[Tensor], ModelConfig], Tensor]
Split = Callable[[Tensor, ModelConfig], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """`ours` is made of `theirs`, in order; `{i}` stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    join: Join
    split: Split

    def of_layer(self, index: int) -> Rule:
        """The rule of one layer."""
        names = tuple(name.format(i=index) for name in self.theirs)
        return Rule(self.ours.format(i=index), names, self.join, self.split)


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda parts, _: parts[0], lambda whole, _: [whole])


def by_head(ours: str, theirs: str) -> Rule:
    """A vector over all heads into one for each."""
    return Rule(
        ours,
        (theirs,),
        lambda parts, config: parts[0].reshape(-1, config.head_size()),
        lambda whole, _: [whole.flatten()],
    )


def transposed(ours: str, theirs: str) -> Rule:
    """GPT-2 stores its matrices input first."""
    return Rule(ours, (theirs,), lambda parts, _: parts[0].T, lambda whole, _: [whole.T])


def norm_weight(ours: str, theirs: str) -> Rule:
    """A norm whose weight the other program stores as it is applied; ours may be stored less one."""

    def join(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return parts[0].float() - 1 if config.apply_layernorm_1p else parts[0]

    def split(whole: Tensor, config: ModelConfig) -> list[Tensor]:
        return [whole.float() + 1 if config.apply_layernorm_1p else whole]

    return Rule(ours, (theirs,), join, split)


def query_key_value(ours: str, theirs: tuple[str, str, str]) -> Rule:
    """Three matrices (or biases) into one, grouped by key/value head: its query heads, its key, its value."""
    return Rule(ours, theirs, join_heads, split_heads)


def scaled(rule: Rule, factor: float, part: int | None = None) -> Rule:
    """The same rule of a model that multiplies what `theirs` give (one of them, or all) by a factor when it runs."""

    def factors(parts: Sequence[Tensor]) -> list[float]:
        return [factor if part in (None, number) else 1.0 for number in range(len(parts))]

    def join(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return rule.join([one.float() * by for one, by in zip(parts, factors(parts), strict=True)], config)

    def split(whole: Tensor, config: ModelConfig) -> list[Tensor]:
        parts = rule.split(whole, config)
        return [one.float() / by for one, by in zip(parts, factors(parts), strict=True)]

    return Rule(rule.ours, rule.theirs, join, split)


def scaled_plus_one(rule: Rule, factor: float) -> Rule:
    """The same of a norm's weight that is stored less one."""
    return Rule(
        rule.ours,
        rule.theirs,
        lambda parts, config: rule.join([(one.float() + 1) * factor - 1 for one in parts], config),
        lambda whole, config: [(one.float() + 1) / factor - 1 for one in rule.split(whole, config)],
    )


def join_heads(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """query [N*D, ...], key [G*D, ...], value -> [G, (N/G + 2) * D, ...]."""
    groups = config.num_key_value_heads()
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1)


def split_heads(whole: Tensor, config: ModelConfig) -> list[Tensor]:
    """The inverse."""
    size = config.head_size()
    rows = [config.num_attention_heads // config.num_key_value_heads() * size, size, size]
    return [part.reshape(-1, *part.shape[2:]) for part in torch.split(whole, rows, 1)]


def fused_query_key_value(ours: str, theirs: str) -> Rule:
    """GPT-2's one matrix: all queries, all keys, all values, input first (a bias has no input dimension)."""

    def join(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return join_heads(parts[0].movedim(0, -1).chunk(3), config)

    def split(whole: Tensor, config: ModelConfig) -> list[Tensor]:
        return [torch.cat(split_heads(whole, config)).movedim(-1, 0)]

    return Rule(ours, (theirs,), join, split)


def stacked_query_key_value(ours: str, theirs: str) -> Rule:
    """Phi-3's one matrix: all queries, all keys, all values."""

    def join(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        rows = [
            heads * config.head_size() for heads in (config.num_attention_heads, *2 * (config.num_key_value_heads(),))
        ]
        return join_heads(torch.split(parts[0], rows), config)

    return Rule(ours, (theirs,), join, lambda whole, config: [torch.cat(split_heads(whole, config))])


def stacked_gated(ours: str, theirs: str) -> Rule:
    """Phi-3's one matrix: gate over up."""
    return Rule(
        ours, (theirs,), lambda parts, _: torch.unflatten(parts[0], 0, (2, -1)), lambda whole, _: [whole.flatten(0, 1)]
    )


def gated(ours: str, theirs: tuple[str, str]) -> Rule:
    """Gate and up into [2, F, ...]."""
    return Rule(ours, theirs, lambda parts, _: torch.stack(list(parts)), lambda whole, _: list(whole))
