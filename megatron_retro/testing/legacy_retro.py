"""The function that the published Retro checkpoints were trained to compute, in float64, from Megatron's own names.

Separate from `model` and `convert` on purpose: it reads whole (unsharded) tensors as Megatron names them and follows
the older model code: no masks, no positions for neighbours, the raw hidden state as residual, a short FIRST chunk that
is filled up with zeros, and queries shifted so that the last token of every chunk begins the next group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LAYER = "language_model.encoder.layers"


class LegacyRetro:
    """`weights`: Megatron's names, one shard. LayerNorm-1p, SwiGLU, rotary on half a head: the published family."""

    def __init__(self, weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.heads = int(arguments["num_attention_heads"])
        self.epsilon = float(arguments["norm_epsilon"])
        self.rotary_percent = float(arguments["rotary_percent"])
        self.num_layers = int(arguments["num_layers"])
        self.chunk = int(arguments["retro_gpt_chunk_length"])

    def logits(self, tokens: Tensor, neighbors: Tensor | None) -> Tensor:
        """[n, V] of one sequence; neighbours [l, k, r], all of them attended to."""
        table = self.weights["language_model.embedding.word_embeddings.weight"]
        hidden = table[tokens]
        encoded: Tensor | None = None
        for index in range(self.num_layers):
            name = f"{LAYER}.{index}"
            hidden = hidden + self.self_attention(
                f"{name}.self_attention", self.norm(f"{name}.input_norm", hidden), causal=True, rotary=True
            )
            normed = self.norm(f"{name}.post_attention_norm", hidden)
            if f"{name}.inter_attention.query.weight" in self.weights and neighbors is not None:
                if encoded is None:
                    encoded = self.encode(f"{name}.retriever.layers", table[neighbors], self.chunks(normed))
                hidden = hidden + self.chunked(f"{name}.inter_attention", normed, encoded)
                normed = self.norm(f"{name}.post_inter_attention_norm", hidden)
            elif f"{name}.post_inter_attention_norm.weight" in self.weights:
                normed = self.norm(f"{name}.post_inter_attention_norm", hidden)
            hidden = hidden + self.mlp(f"{name}.mlp", normed)
        hidden = self.norm("language_model.encoder.final_norm", hidden)
        return hidden @ self.weights["language_model.output_layer.weight"].T

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        """LayerNorm with 1 + w."""
        centered = hidden - hidden.mean(-1, keepdim=True)
        scaled = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + self.epsilon)
        return scaled * (1 + self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def mlp(self, name: str, hidden: Tensor) -> Tensor:
        """[gate; up], SiLU, down."""
        gate, up = (hidden @ self.weights[f"{name}.dense_h_to_4h.weight"].T).chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up) @ self.weights[f"{name}.dense_4h_to_h.weight"].T

    def self_attention(self, name: str, hidden: Tensor, *, causal: bool, rotary: bool) -> Tensor:
        """Rows of the fused matrix are per head q, k, v."""
        mixed = hidden @ self.weights[f"{name}.query_key_value.weight"].T
        query, key, value = mixed.view(len(hidden), self.heads, -1).chunk(3, -1)
        if rotary:
            query, key = self.rotated(query), self.rotated(key)
        context = self.attend(query, key, value, causal=causal)
        return context @ self.weights[f"{name}.dense.weight"].T

    def rotated(self, heads: Tensor) -> Tensor:
        """Rotary positions on the first part of each head."""
        size = int(heads.shape[-1] * self.rotary_percent)
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(len(heads), dtype=torch.float64), frequencies)
        angles = torch.cat((angles, angles), -1)[:, None]
        part, rest = heads[..., :size], heads[..., size:]
        half = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
        return torch.cat((part * angles.cos() + half * angles.sin(), rest), -1)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """[s, heads, d] each; softmax over all keys, or over those not after the query."""
        scores = torch.einsum("snd,tnd->nst", query, key) / math.sqrt(query.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return torch.einsum("nst,tnd->snd", scores.softmax(-1), value).flatten(1)

    def cross(self, name: str, queries: Tensor, source: Tensor) -> Tensor:
        """Key/value rows are per head k, v."""
        query = (queries @ self.weights[f"{name}.query.weight"].T).view(len(queries), self.heads, -1)
        mixed = source @ self.weights[f"{name}.key_value.weight"].T
        key, value = mixed.view(len(source), self.heads, -1).chunk(2, -1)
        return self.attend(query, key, value, causal=False) @ self.weights[f"{name}.dense.weight"].T

    def chunks(self, normed: Tensor) -> list[Tensor]:
        """m states per chunk; if n is no multiple of m the first chunk is short, zeros at its end."""
        short = len(normed) % self.chunk
        if not short:
            return list(torch.split(normed, self.chunk))
        first = torch.cat((normed[:short], normed.new_zeros(self.chunk - short, normed.shape[1])))
        rest = torch.split(normed[short:], self.chunk) if len(normed) > short else ()
        return [first, *rest]

    def encode(self, name: str, embedded: Tensor, chunks: list[Tensor]) -> Tensor:
        """[l, k * r, h]."""
        encoded = []
        for neighbors, chunk in zip(embedded, chunks, strict=True):
            hidden_states = []
            for hidden in neighbors:
                layer = 0
                while f"{name}.{layer}.input_norm.weight" in self.weights:
                    hidden = self.encoder_layer(f"{name}.{layer}", hidden, chunk)
                    layer += 1
                hidden_states.append(hidden)
            encoded.append(torch.cat(hidden_states))
        return torch.stack(encoded)

    def encoder_layer(self, name: str, hidden: Tensor, chunk: Tensor) -> Tensor:
        """Bidirectional, without positions; the first layer reads the chunk."""
        normed = self.norm(f"{name}.input_norm", hidden)
        hidden = hidden + self.self_attention(f"{name}.self_attention", normed, causal=False, rotary=False)
        normed = self.norm(f"{name}.post_attention_norm", hidden)
        if f"{name}.inter_attention.query.weight" in self.weights:
            hidden = hidden + self.cross(f"{name}.inter_attention", normed, chunk)
            normed = self.norm(f"{name}.post_inter_attention_norm", hidden)
        return hidden + self.mlp(f"{name}.mlp", normed)

    def chunked(self, name: str, normed: Tensor, encoded: Tensor) -> Tensor:
        """Queries begin (n - 1) mod m tokens in, in groups of m, the last group filled up; group u reads chunk u."""
        skipped = (len(normed) - 1) % self.chunk
        queries = torch.cat((normed[skipped:], normed.new_zeros(self.chunk - 1, normed.shape[1])))
        groups = [self.cross(name, group, encoded[u]) for u, group in enumerate(torch.split(queries, self.chunk))]
        found = torch.cat(groups)[: len(normed) - skipped]
        return torch.cat((normed.new_zeros(skipped, normed.shape[1]), found))
