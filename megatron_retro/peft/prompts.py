"""P-tuning: virtual tokens before the prompt, their vectors made by a small prompt encoder.

Virtual token j has the id -1 - j. They are in the rows from the start (`virtual_token_ids`), so chunks, packing,
caches and masks count them as they count any token; only the embedding knows that they stand for no word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.training import PeftConfig
from megatron_retro.model.leaves import Embedding, Linear, TokenEmbedding
from megatron_retro.ops.local_tensors import local

PROMPT = "prompt"


class PromptEncoder(nn.Module):
    """A table of vectors and a two-layer network over it."""

    def __init__(self, width: int, config: PeftConfig) -> None:
        super().__init__()
        self.table = Embedding(config.num_virtual_tokens, width)
        self.up: Linear | None = Linear(width, (config.prompt_encoder_hidden_size,), bias=True)
        self.down: Linear | None = Linear(config.prompt_encoder_hidden_size, (width,), bias=True)

    def own_part(self, tokens_BS: Tensor) -> Tensor:
        """The tokens whose vectors this rank holds: all, unless a cut replaces this method."""
        return tokens_BS

    def forward(self) -> Tensor:
        """The vectors of all virtual tokens [V, H]."""
        vectors = local(self.table.weight)
        if self.up is None or self.down is None:
            return vectors
        made: Tensor = self.down(functional.relu(self.up(vectors)))
        return made

    @torch.no_grad()
    def fold(self) -> None:
        """Keep the vectors and drop the network that makes them: a model that trains no more needs only those."""
        self.table.weight.copy_(self())
        self.up = self.down = None


def virtual_token_ids(count: int) -> tuple[int, ...]:
    """The ids of the virtual tokens, in order."""
    return tuple(-1 - number for number in range(count))


def configured_virtual_tokens(config: PeftConfig) -> tuple[int, ...]:
    """What leads every text of a tuned model: virtual tokens with P-tuning, else nothing."""
    return virtual_token_ids(config.num_virtual_tokens) if config.peft_method == "p-tuning" else ()


def fold_prompt(embedding: TokenEmbedding) -> None:
    """Fold the prompt encoder of an embedding, if it has one."""
    prompt: PromptEncoder | None = getattr(embedding, PROMPT, None)
    if prompt is not None:
        prompt.fold()


def virtual_tokens_of(embedding: nn.Module | None) -> tuple[int, ...]:
    """The same, read off a model's embedding."""
    prompt: PromptEncoder | None = getattr(embedding, PROMPT, None)
    return () if prompt is None else virtual_token_ids(len(prompt.table.weight))


def attach_prompt(embedding: TokenEmbedding, config: PeftConfig) -> None:
    """Let the embedding know virtual tokens."""
    with embedding.word.weight.device:
        embedding.add_module(PROMPT, PromptEncoder(embedding.word.weight.shape[-1], config))
    embedding.word.register_forward_pre_hook(_hide_virtual_ids)
    embedding.register_forward_hook(_insert_vectors)


def _hide_virtual_ids(word: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].clamp(min=0), *arguments[1:])


def _insert_vectors(embedding: nn.Module, arguments: tuple[Any, ...], hidden_BSH: Tensor) -> Tensor:
    prompt: PromptEncoder = getattr(embedding, PROMPT)
    tokens_BS = prompt.own_part(arguments[0])
    vectors = functional.embedding((-1 - tokens_BS).clamp(min=0), prompt())
    return torch.where((tokens_BS < 0)[..., None], vectors.to(hidden_BSH.dtype), hidden_BSH)
