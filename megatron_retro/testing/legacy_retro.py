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
    """`weights`: Megatron's names, one shard, of a GPT or a Retro; `arguments`: those of its run, complete."""

    def __init__(self, weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.arguments = arguments
        self.heads = int(arguments["num_attention_heads"])
        grouped = arguments.get("group_query_attention", False)
        self.groups = int(arguments["num_query_groups"]) if grouped else self.heads
        self.epsilon = float(arguments["norm_epsilon"])
        self.num_layers = int(arguments["num_layers"])
        self.chunk = int(arguments["retro_gpt_chunk_length"])

    def logits(self, tokens: Tensor, neighbors: Tensor | None) -> Tensor:
        """[n, V] of one sequence; neighbours [l, k, r], all of them attended to."""
        table = self.weights["language_model.embedding.word_embeddings.weight"]
        positions = self.weights.get("language_model.embedding.position_embeddings.weight")
        hidden = table[tokens] if positions is None else table[tokens] + positions[: len(tokens)]
        encoded: Tensor | None = None
        for index in range(self.num_layers):
            name = f"{LAYER}.{index}"
            hidden = hidden + self.self_attention(
                f"{name}.self_attention", self.norm(f"{name}.input_norm", hidden), causal=True
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
        return hidden @ self.weights.get("language_model.output_layer.weight", table).T

    def linear(self, name: str, hidden: Tensor) -> Tensor:
        """With its bias, where it has one."""
        product = hidden @ self.weights[f"{name}.weight"].T
        return product + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else product

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        """RMSNorm, LayerNorm, or LayerNorm with 1 + w."""
        weight = self.weights[f"{name}.weight"]
        if self.arguments["normalization"] == "RMSNorm":
            return hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon) * weight
        centered = hidden - hidden.mean(-1, keepdim=True)
        scaled = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + self.epsilon)
        weight = 1 + weight if self.arguments["apply_layernorm_1p"] else weight
        return scaled * weight + self.weights[f"{name}.bias"]

    def mlp(self, name: str, hidden: Tensor) -> Tensor:
        """Up, the nonlinearity, down; [gate; up] where it is gated."""
        return self.linear(f"{name}.dense_4h_to_h", self.activated(self.linear(f"{name}.dense_h_to_4h", hidden)))

    def activated(self, hidden: Tensor) -> Tensor:
        """SiLU of the gate, squared ReLU, or GELU: by tanh in its fused form and in OpenAI's, else by erf."""
        if self.arguments["swiglu"]:
            gate, up = hidden.chunk(2, -1)
            return gate * torch.sigmoid(gate) * up
        if self.arguments["squared_relu"]:
            return hidden.clamp(min=0).square()
        by_tanh = self.arguments["openai_gelu"] or (
            self.arguments["bias_gelu_fusion"] and self.arguments["add_bias_linear"]
        )
        if by_tanh:
            constant = 0.7978845608028654 if self.arguments["openai_gelu"] else 0.79788456
            return 0.5 * hidden * (1 + torch.tanh(constant * hidden * (1 + 0.044715 * hidden.square())))
        return 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))

    def self_attention(self, name: str, hidden: Tensor, *, causal: bool) -> Tensor:
        """Rows of the fused matrix are per group: its queries, its key, its value. Only the decoder has positions."""
        mixed = self.linear(f"{name}.query_key_value", hidden).view(len(hidden), self.groups, -1)
        size, together = mixed.shape[-1], self.heads // self.groups
        size //= together + 2
        query, key, value = torch.split(mixed, [together * size, size, size], -1)
        query = query.reshape(len(hidden), self.heads, size)
        if causal and self.arguments["position_embedding_type"] == "rope":
            query, key = self.rotated(query), self.rotated(key)
        key, value = (part.repeat_interleave(together, 1) for part in (key, value))
        return self.linear(f"{name}.dense", self.attend(query, key, value, causal=causal))

    def rotated(self, heads: Tensor) -> Tensor:
        """Rotary positions on the first part of each head.

        The older code has frequencies, angles and their cosines in float32, whatever the model is in.
        """
        size = int(heads.shape[-1] * self.arguments["rotary_percent"])
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        places = torch.arange(len(heads), dtype=torch.float32)
        places *= 1 / (self.arguments["rotary_seq_len_interpolation_factor"] or 1)
        angles = torch.outer(places, frequencies)
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
        hidden = hidden + self.self_attention(f"{name}.self_attention", normed, causal=False)
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
