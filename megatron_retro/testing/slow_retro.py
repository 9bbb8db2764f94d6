"""The paper's definition, one token at a time, in float64: what the model is compared with.

Written from the definition (chunks, attending positions, one joint softmax), with Python loops and numpy, and sharing
no code with `model` or `ops`; slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_retro.config.model import ModelConfig, RetroConfig

Array = Any  # float64 arrays


class SlowRetro:
    """One sequence at a time. `weights` are the model's, by name."""

    def __init__(self, weights: Mapping[str, Any], model: ModelConfig, retro: RetroConfig) -> None:
        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self.model, self.retro = model, retro

    def logits(self, tokens: Sequence[int], neighbors: Any = None, mask: Any = None) -> Array:
        """[S, V]. `neighbors[u][j]` are the tokens of neighbour j of chunk u, `mask` says which exist."""
        table = self.weights["embedding.word.weight"]
        scale = math.sqrt(self.model.hidden_size) if self.model.scale_embedding else 1.0
        hidden = [table[token] * scale for token in tokens]
        if self.model.position_embedding_type == "learned_absolute":
            hidden = [vector + self.weights["embedding.position.weight"][p] for p, vector in enumerate(hidden)]
        retrieval_layers = [number - 1 for number in self.retro.retrieval_layers(self.model.num_layers)]
        length = self.retro.retro_chunk_length
        encoded: list[Array] | None = None
        for index in range(self.model.num_layers):
            name = f"layers.{index}"
            normed = self._normed(f"{name}.input_norm", hidden)
            attended = self._self_attention(f"{name}.attention", normed, self.model)
            hidden = self._added(hidden, self._normed(f"{name}.post_attention_norm", attended))
            if index in retrieval_layers and neighbors is not None:
                normed = [self.norm(f"{name}.cross_norm", vector) for vector in hidden]
                if encoded is None:
                    chunks = [normed[u * length : (u + 1) * length] for u in range(len(tokens) // length)]
                    encoded = [self._encode(neighbors[u], mask[u], chunk) for u, chunk in enumerate(chunks)]
                depth = self.retro.encoder_depths(self.model.num_layers)[index + 1]
                states = [[neighbor[depth] for neighbor in chunk] for chunk in encoded]
                hidden = self._added(hidden, self._chunked(f"{name}.cross_attention", normed, states, mask))
            hidden = self._after_mlp(name, hidden)
        output = self.weights.get("output.weight", table)[: self.model.vocab_size]
        return np.stack([output @ self.norm("final_norm", vector) for vector in hidden])

    @staticmethod
    def _added(first: list[Array], second: list[Array]) -> list[Array]:
        return [a + b for a, b in zip(first, second, strict=True)]

    def _normed(self, name: str, vectors: list[Array]) -> list[Array]:
        """Each of them, or as they are where the norm stands elsewhere."""
        before = not name.split(".")[-1].startswith("post_")
        there = self.model.norm_placement in ("both", "before" if before else "after")
        return [self.norm(name, vector) for vector in vectors] if there else vectors

    def _after_mlp(self, name: str, hidden: list[Array]) -> list[Array]:
        given = [self._mlp(f"{name}.mlp", vector) for vector in self._normed(f"{name}.mlp_norm", hidden)]
        return self._added(hidden, self._normed(f"{name}.post_mlp_norm", given))

    def _norm_of_heads(self, name: str, heads: list[Array]) -> list[Array]:
        if self.model.qk_norm_scope == "head":
            return [self.norm(name, head) for head in heads]
        mean_square = float(np.mean(np.concatenate(heads) ** 2))
        weight = self.weights[f"{name}.heads"] + (1.0 if self.model.apply_layernorm_1p else 0.0)
        return [
            head / math.sqrt(mean_square + self.model.norm_epsilon) * own
            for head, own in zip(heads, weight, strict=True)
        ]

    def norm(self, name: str, vector: Array) -> Array:
        """The configured norm of one vector."""
        weight = self.weights[f"{name}.weight"] + (1.0 if self.model.apply_layernorm_1p else 0.0)
        if self.model.normalization == "RMSNorm":
            return vector / math.sqrt(float(np.mean(vector**2)) + self.model.norm_epsilon) * weight
        centered = vector - vector.mean()
        scale = math.sqrt(float(np.mean(centered**2)) + self.model.norm_epsilon)
        return centered / scale * weight + self.weights[f"{name}.bias"]

    def _mlp(self, name: str, vector: Array) -> Array:
        up = self.weights[f"{name}.up.weight"] @ vector + self._bias(f"{name}.up.bias")
        if self.model.swiglu:
            inner = up[0] / (1 + np.exp(-up[0])) * up[1]
        elif self.model.squared_relu:
            inner = np.maximum(up, 0) ** 2
        elif self.model.geglu:
            inner = self._gelu(up[0]) * up[1]
        else:
            inner = self._gelu(up)
        return self.weights[f"{name}.down.weight"] @ inner + self._bias(f"{name}.down.bias")

    def _gelu(self, up: Array) -> Array:
        if self.model.gelu_tanh:
            return 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in up])

    def _bias(self, name: str) -> Any:
        return self.weights.get(name, 0.0)

    def _rotated(self, name: str, vector: Array, position: int) -> Array:
        """One head rotated by its position, as the layer of a part has it."""
        size = len(vector)
        rotated = int(size * self.model.rotary_percent) // 2 * 2
        result = vector.copy()
        for pair in range(rotated // 2):
            angle = position * self._base(name) ** (-2 * pair / rotated)
            first, second = (2 * pair, 2 * pair + 1) if self.model.rotary_interleaved else (pair, pair + rotated // 2)
            result[first] = vector[first] * math.cos(angle) - vector[second] * math.sin(angle)
            result[second] = vector[second] * math.cos(angle) + vector[first] * math.sin(angle)
        return result

    def _rotates(self, name: str) -> bool:
        """Whether the layer of a part, `layers.3.attention` say, has rotary positions."""
        return self.model.no_rope_freq is None or _number(name) % self.model.no_rope_freq != 0

    def _base(self, name: str) -> float:
        full, local = self.model.full_attention_layers or (), self.model.rotary_base_local
        return self.model.rotary_base if local is None or _number(name) in full else local

    def _relative_score(self, name: str, query: Array, head: int, distance: int) -> float:
        projection = self.weights[f"{name}.relative.projection.weight"][head]
        width = projection.shape[1]
        rates = [10000.0 ** (-2 * i / width) for i in range((width + 1) // 2)]
        wave = np.array([math.sin(distance * r) for r in rates] + [math.cos(distance * r) for r in rates])[:width]
        return float(query @ (projection @ wave)) / math.sqrt(len(query))

    def _self_attention(
        self, name: str, normed: list[Array], config: ModelConfig, exists: Sequence[bool] | None = None
    ) -> list[Array]:
        """Causal in the decoder; over all existing tokens when `exists` is given (the encoder)."""
        causal = exists is None
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads(), config.head_size()
        shared = heads // groups
        rotary = self.model.position_embedding_type == "rope" if causal else self.retro.rotates_neighbors()
        rotary = rotary and self._rotates(name)
        relative = config.position_embedding_type == "relative"
        queries, keys, values = [], [], []
        for position, vector in enumerate(normed):
            projected = self.weights[f"{name}.query_key_value.weight"] @ vector + self._bias(
                f"{name}.query_key_value.bias"
            )
            parts = projected.reshape(groups, shared + 2, size)
            query = [parts[head // shared, head % shared] for head in range(heads)]
            key = [parts[group, shared] for group in range(groups)]
            if config.qk_layernorm:
                query = self._norm_of_heads(f"{name}.query_norm", query)
                key = self._norm_of_heads(f"{name}.key_norm", key)
            if rotary:
                query = [self._rotated(name, part, position) for part in query]
                key = [self._rotated(name, part, position) for part in key]
            queries.append(query)
            keys.append(key)
            values.append([parts[group, shared + 1] for group in range(groups)])
        results = []
        for position in range(len(normed)):
            seen = [other for other in range(len(normed)) if self._sees(name, position, other, exists)]
            joined = []
            for head in range(heads):
                query_head = queries[position][head]
                scores = [
                    float(query_head @ keys[other][head // shared]) / math.sqrt(size)
                    + (self._relative_score(name, query_head, head, position - other) if relative else 0.0)
                    for other in seen
                ]
                joined.append(self._weighted(scores, [values[other][head // shared] for other in seen], size))
            output = self.weights[f"{name}.output.weight"] @ np.concatenate(joined)
            results.append(output + self._bias(f"{name}.output.bias"))
        return results

    def _sees(self, name: str, position: int, other: int, exists: Sequence[bool] | None) -> bool:
        if exists is not None:
            return bool(exists[other]) and (other <= position or not self.retro.retro_encoder_causal)
        window = self.model.sliding_window
        if _number(name) in (self.model.full_attention_layers or ()):
            window = None
        return other <= position and (window is None or position - other < window)

    @staticmethod
    def _weighted(scores: Sequence[float], values: Sequence[Array], size: int) -> Array:
        if not scores:
            return np.zeros(size)
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        return np.sum([weight * value for weight, value in zip(weights, values, strict=True)], axis=0)

    def _cross(
        self,
        name: str,
        query: Array,
        query_position: int,
        source: list[Array],
        positions: list[int],
        config: ModelConfig,
    ) -> Array:
        """One query vector over source vectors that stand at the given positions."""
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads(), config.head_size()
        style, rotary = self.retro.neighbor_positions(), self.retro.rotates_neighbors() and self._rotates(name)
        joined = []
        for head in range(heads):
            group = head // (heads // groups)
            query_head = self.weights[f"{name}.query.weight"][head] @ query
            both = self.weights[f"{name}.key_value.weight"][group]
            plain_query = query_head
            if rotary:
                query_head = self._rotated(name, query_head, query_position)
            scores, values = [], []
            for vector, position in zip(source, positions, strict=True):
                key = both[:size] @ vector
                if rotary:
                    key = self._rotated(name, key, position)
                score = float(query_head @ key) / math.sqrt(size)
                if style == "relative":
                    score += self._relative_score(name, plain_query, head, query_position - position)
                scores.append(score)
                values.append(both[size:] @ vector)
            joined.append(self._head_gate(name, head) * self._weighted(scores, values, size))
        return self.weights[f"{name}.output.weight"] @ np.concatenate(joined)

    def _encode(self, neighbors: Any, mask: Any, chunk: list[Array]) -> Any:
        """[K][depth][R] encoded vectors of one chunk's neighbours."""
        config = self.retro.encoder_model(self.model)
        table = self.weights.get("encoder.embedding.word.weight", self.weights["embedding.word.weight"])
        encoded, scale = [], math.sqrt(config.hidden_size) if self.model.scale_embedding else 1.0
        for tokens, exists in zip(neighbors, mask, strict=True):
            hidden = [table[int(token) if there else 0] * scale for token, there in zip(tokens, exists, strict=True)]
            states = [hidden]
            for index in range(self.retro.retro_encoder_layers):
                name = f"encoder.layers.{index}"
                normed = self._normed(f"{name}.input_norm", hidden)
                attended = self._self_attention(f"{name}.attention", normed, config, list(exists))
                hidden = self._added(hidden, self._normed(f"{name}.post_attention_norm", attended))
                if index == 0:
                    read = [
                        self._cross(
                            f"{name}.cross_attention",
                            self.norm(f"{name}.cross_norm", vector),
                            position,
                            chunk,
                            [self.retro.chunk_start() + place for place in range(len(chunk))],
                            config,
                        )
                        for position, vector in enumerate(hidden)
                    ]
                    hidden = self._added(hidden, read)
                hidden = self._after_mlp(name, hidden)
                states.append(hidden)
            if self.retro.retro_encoder_final_norm:
                states = [[self.norm("encoder.final_norm", vector) for vector in hidden] for hidden in states]
            encoded.append(states)
        return encoded

    def _chunked(self, name: str, normed: list[Array], encoded: list[Any], mask: Any) -> list[Array]:
        """Position p sees the neighbours of the last chunk u with p >= (u+1)*m - 1."""
        length = self.retro.retro_chunk_length
        results = []
        for p, vector in enumerate(normed):
            complete = [u for u in range(len(encoded)) if p >= (u + 1) * length - 1]
            if not complete or complete[-1] * length + 2 * length - 2 < p:
                results.append(np.zeros_like(vector))
                continue
            u = complete[-1]
            source, positions = [], []
            for neighbor, exists in zip(encoded[u], mask[u], strict=True):
                source += [part for part, there in zip(neighbor, exists, strict=True) if there]
                positions += [position for position, there in enumerate(exists) if there]
            found = self._cross(name, vector, self.retro.chunk_start() + p - u * length, source, positions, self.model)
            results.append(found * self._gate(name, normed[(u + 1) * length - 1]))
        return results

    def _head_gate(self, name: str, head: int) -> float:
        gates = self.weights.get(f"{name}.gate.heads")
        return 1.0 if gates is None else math.tanh(gates[head].item())

    def _gate(self, name: str, state: Array) -> float:
        """The factor on one chunk's cross-attention, given the state at the chunk's last token."""
        kind = self.retro.retro_gate_type
        if kind == "scalar":
            return math.tanh(self.weights[f"{name}.gate.value"].item())
        if kind == "adaptive":
            score = float(state @ self.weights[f"{name}.gate.weight"]) + self.weights[f"{name}.gate.bias"].item()
            return 1 / (1 + math.exp(-score))
        return self.retro.retro_attention_gate if kind == "fixed" else 1.0


def _number(name: str) -> int:
    """Of the layer of a part, from 1: 4 of `layers.3.attention`."""
    return int(name.split("layers.")[1].split(".")[0]) + 1
