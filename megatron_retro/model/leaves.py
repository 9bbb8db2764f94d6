"""The modules that own parameters. Nothing else touches a weight, and each reads it as this rank's plain tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig
from megatron_retro.ops.linear import linear
from megatron_retro.ops.linear_cross_entropy import linear_cross_entropy
from megatron_retro.ops.local_tensors import local
from megatron_retro.ops.norm import layer_norm, norm_of_sum, residual_norm, rms_norm
from megatron_retro.ops.recomputation import as_offered, offered


class Linear(nn.Module):
    """x @ W.T + b for a weight [..., rows, columns]: the output's last dimensions are the weight's first ones.

    Extra leading dimensions (heads, the two halves of a gated MLP) make a cut of one dimension a cut of whole heads.
    `multiply` computes the product; an instance may be given another one (FP8, or deferred weight gradients).
    """

    def __init__(self, input_size: int, output_shape: tuple[int, ...], *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*output_shape, input_size))
        self.bias = nn.Parameter(torch.empty(*output_shape)) if bias else None
        self.multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., columns] -> [..., *output_shape]."""
        weight = local(self.weight)
        bias = None if self.bias is None else local(self.bias)
        with as_offered(hidden):
            if weight.dim() == 2:
                return self.multiply(hidden, weight, bias)
            output = self.multiply(hidden, weight.flatten(0, -2), None if bias is None else bias.flatten())
        return torch.unflatten(output, -1, weight.shape[:-1])


class HeadsToHidden(Linear):
    """The projection that closes an attention: [..., N, D] -> [..., H], weight [H, N * D]."""

    def __init__(self, num_heads: int, head_size: int, output_size: int, *, bias: bool) -> None:
        super().__init__(num_heads * head_size, (output_size,), bias=bias)

    def forward(self, heads: Tensor) -> Tensor:
        """Join the heads and project."""
        return super().forward(heads.flatten(-2))


class Norm(nn.Module):
    """The configured normalization of the last dimension."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.normalization == "LayerNorm" else None
        self.epsilon = config.norm_epsilon
        self.weight_plus_one = config.apply_layernorm_1p

    def forward(self, hidden: Tensor, added: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Same shape. With `added`: the norm of their sum, and the sum, in one pass over memory."""
        weight, bias = self._here()
        if added is not None:
            return residual_norm(
                added,
                hidden,
                weight,
                bias,
                epsilon=self.epsilon,
                centered=bias is not None,
                weight_plus_one=self.weight_plus_one,
            )
        if bias is None:
            return rms_norm(hidden, weight, epsilon=self.epsilon, weight_plus_one=self.weight_plus_one)
        return layer_norm(hidden, weight, bias, epsilon=self.epsilon, weight_plus_one=self.weight_plus_one)

    def recomputed(self, normed: Tensor, hidden: Tensor) -> AbstractContextManager[Any]:
        """In this block no product keeps `normed` for the backward; it follows from `hidden`, which the norm keeps."""
        return self._recomputed(normed, hidden, lambda: self.forward(hidden.detach()))

    def recomputed_from_sum(self, normed: Tensor, summed: Tensor) -> AbstractContextManager[Any]:
        """The same for what this norm made of a sum."""
        return self._recomputed(normed, summed, lambda: self._of_sum(summed.detach()))

    def _recomputed(self, normed: Tensor, hidden: Tensor, compute: Callable[[], Any]) -> AbstractContextManager[Any]:
        if normed.numel() != hidden.numel():  # gathered for a cut region: no longer what the norm gave
            return nullcontext()
        return offered(normed, compute)

    def _of_sum(self, summed: Tensor) -> Tensor:
        weight, bias = self._here()
        return norm_of_sum(
            summed,
            weight,
            bias,
            epsilon=self.epsilon,
            centered=bias is not None,
            weight_plus_one=self.weight_plus_one,
        )

    def _here(self) -> tuple[Tensor, Tensor | None]:
        return local(self.weight), None if self.bias is None else local(self.bias)


class NoNorm(nn.Module):
    """In the place of a norm that a layer does not have."""

    def forward(self, hidden: Tensor, added: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The same, or the sum, as a norm and the sum would be."""
        if added is None:
            return hidden
        summed = hidden + added
        return summed, summed

    def recomputed(self, normed: Tensor, hidden: Tensor) -> AbstractContextManager[Any]:
        """There is nothing to compute again."""
        return nullcontext()

    recomputed_from_sum = recomputed


class HeadsNorm(nn.Module):
    """One RMSNorm over all heads of a projection together."""

    def __init__(self, config: ModelConfig, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.empty(num_heads, head_size))
        self.width = num_heads * head_size
        self.epsilon = config.norm_epsilon
        self.weight_plus_one = config.apply_layernorm_1p

    def forward(self, heads_BSND: Tensor) -> Tensor:
        """Same shape."""
        weight = local(self.heads).flatten()
        normed = rms_norm(heads_BSND.flatten(-2), weight, epsilon=self.epsilon, weight_plus_one=self.weight_plus_one)
        return normed.view(heads_BSND.shape)


def norm_of_heads(config: ModelConfig, num_heads: int) -> Norm | HeadsNorm:
    """The configured norm of queries, or of keys."""
    size = config.head_size()
    return Norm(config, size) if config.qk_norm_scope == "head" else HeadsNorm(config, num_heads, size)


class Embedding(nn.Module):
    """A table of vectors: tokens or positions. `scale` multiplies them, rounded to their type as it was trained."""

    def __init__(self, num_rows: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        return self.scaled(functional.embedding(ids, local(self.weight)))

    def scaled(self, vectors: Tensor) -> Tensor:
        """What rows of the table are as hidden states."""
        if self.scale == 1.0:
            return vectors
        return vectors * torch.full((), self.scale, dtype=vectors.dtype, device=vectors.device)


class Output(nn.Module):
    """Logits, or the loss of every token. Owns a weight when it is not tied to the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size or 0
        shape = (config.padded_vocab_size(), config.hidden_size)
        untied = config.untie_embeddings_and_output_weights
        self.weight = nn.Parameter(torch.empty(shape)) if untied else None

    def forward(self, hidden_BSH: Tensor, labels_BS: Tensor | None = None, tied: Embedding | None = None) -> Tensor:
        """[B, S, V] logits of the true vocabulary, or with labels [B, S] losses in float32."""
        table = self.weight if self.weight is not None else tied.weight if tied is not None else None
        if table is None:
            raise ValueError("a tied output needs the embedding")
        weight_VH = local(table)
        if len(weight_VH) > self.vocab_size:
            weight_VH = weight_VH[: self.vocab_size]
        if labels_BS is None:
            return linear(hidden_BSH, weight_VH)
        return linear_cross_entropy(hidden_BSH, weight_VH, labels_BS)


class AttendingBias(nn.Module):
    """A bias for tokens that read neighbours; others get zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, attends_BS: Tensor) -> Tensor:
        """[B, S, H] from [B, S] booleans."""
        bias_H = local(self.bias)
        return attends_BS[..., None].to(bias_H.dtype) * bias_H


class RelativePositions(nn.Module):
    """Transformer-XL's term: scores of a query against the projected sinusoid of its distance to a key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.hidden_size
        self.projection = Linear(self.width, (config.num_attention_heads, config.head_size()), bias=False)

    def forward(
        self, query_BSND: Tensor, query_positions_S: Tensor, key_positions_T: Tensor, reach: tuple[int, int]
    ) -> Tensor:
        """[B, N, S, T], scaled as scores are. `reach`: the least and the largest distance; asking a GPU would wait."""
        distance_ST = query_positions_S[:, None] - key_positions_T
        lowest, highest = reach
        span = torch.arange(lowest, highest + 1, device=distance_ST.device)
        vectors_LND = self.projection(self._sinusoids(span).to(query_BSND.dtype))
        scores_BNSL = torch.einsum("bsnd,lnd->bnsl", query_BSND, vectors_LND) / math.sqrt(query_BSND.shape[-1])
        index = (distance_ST - lowest).expand(*scores_BNSL.shape[:2], -1, -1)
        return scores_BNSL.gather(-1, index)

    def _sinusoids(self, distance_L: Tensor) -> Tensor:
        exponent = torch.arange(0, self.width, 2, device=distance_L.device) / self.width
        angles = distance_L[:, None] / 10000.0**exponent
        return torch.cat((angles.sin(), angles.cos()), -1)[:, : self.width]


class TokenEmbedding(nn.Module):
    """Word vectors, and learned positions where they are configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        learned = config.position_embedding_type == "learned_absolute"
        self.dropout = config.hidden_dropout
        scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.word = Embedding(config.padded_vocab_size(), config.hidden_size, scale)
        self.position = Embedding(config.max_position_embeddings, config.hidden_size) if learned else None

    def forward(self, tokens_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
        """[B, S, H]."""
        hidden_BSH: Tensor = self.word(tokens_BS)
        if self.position is not None:
            hidden_BSH = hidden_BSH + self.position(position_ids_BS)
        return functional.dropout(hidden_BSH, self.dropout, self.training) if self.dropout else hidden_BSH


class Dropout(nn.Module):
    """`kept` says where an element stays; an instance may be given another one."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.kept: Callable[[Tensor], Tensor] = self._drawn

    def _drawn(self, hidden: Tensor) -> Tensor:
        """True where an element stays."""
        return torch.rand_like(hidden, dtype=torch.float32) >= self.chance

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape; in evaluation the same tensor."""
        if not self.training or self.chance == 0.0:
            return hidden
        return hidden * self.kept(hidden) / (1.0 - self.chance) if self.chance < 1.0 else torch.zeros_like(hidden)
