"""What each part of a model costs: parameters, and multiply-adds per decoder token. No torch.

One count serves the cut of the pipeline, the utilization that training reports, and the plan. Attention counts what a
causal kernel does (half of the square). The neighbour encoder is counted per DECODER token: each carries k*r/m
neighbour tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.model import ModelConfig
from megatron_retro.config.retro import RetroConfig


@dataclass(frozen=True)
class Block:
    """A transformer layer's sizes, of the decoder or of the encoder."""

    width: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    feed_forward: int
    gated: bool
    bias: bool
    query_bias: bool
    norm_vectors: int
    head_norms: bool
    relative: bool

    def relative_parameters(self) -> int:
        """The projection of relative positions of one attention."""
        return self.width * self.num_heads * self.head_size

    def attention_matrices(self, source_width: int | None = None) -> tuple[int, int, int]:
        """Entries of the query, key/value and output matrices; keys and values come from `source_width`."""
        query = self.width * self.num_heads * self.head_size
        key_value = 2 * (source_width or self.width) * self.num_key_value_heads * self.head_size
        return query, key_value, query

    def feed_forward_matrices(self) -> int:
        """Entries of the MLP's matrices."""
        return (3 if self.gated else 2) * self.width * self.feed_forward

    def head_norm_parameters(self) -> int:
        """The norms of queries and of keys."""
        return 2 * self.norm_vectors * self.head_size if self.head_norms else 0

    def norm_parameters(self) -> int:
        """One norm's weight, and its bias if it has one."""
        return self.norm_vectors * self.width

    def self_attention_parameters(self) -> int:
        """Attention with its norm and biases."""
        vectors = (self.num_heads + 2 * self.num_key_value_heads) * self.head_size if self.query_bias else 0
        vectors += self.width if self.bias else 0
        vectors += self.head_norm_parameters()
        vectors += self.relative_parameters() if self.relative else 0
        return sum(self.attention_matrices()) + vectors + self.norm_parameters()

    def feed_forward_parameters(self) -> int:
        """The MLP with its norm and biases."""
        vectors = (2 if self.gated else 1) * self.feed_forward + self.width if self.bias else 0
        return self.feed_forward_matrices() + vectors + self.norm_parameters()

    def cross_attention_parameters(self, source_width: int, relative: bool) -> int:
        """Cross-attention with its norm; it has no biases."""
        positions = self.relative_parameters() if relative else 0
        return sum(self.attention_matrices(source_width)) + positions + self.norm_parameters()


@dataclass(frozen=True)
class UnitCost:
    """One part that a stage holds whole: its parameters and forward multiply-adds per decoder token."""

    name: str
    parameters: int
    multiply_adds: float


@dataclass(frozen=True)
class ModelCosts:
    """Every part in the order of the forward pass; the encoder stands before the first retrieval layer."""

    units: tuple[UnitCost, ...]

    def named(self, name: str) -> UnitCost:
        """`embedding`, `layers.0`, ..., `encoder`, `head`."""
        return next(unit for unit in self.units if unit.name == name)

    @property
    def parameters(self) -> int:
        """All parameters of the model (true or padded vocabulary as given to `model_costs`)."""
        return sum(unit.parameters for unit in self.units)

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of one token's forward pass."""
        return 2 * sum(unit.multiply_adds for unit in self.units)

    @property
    def training_flops(self) -> float:
        """Forward and backward of one token, nothing recomputed, nothing frozen."""
        return 3 * self.forward_flops


def decoder_block(model: ModelConfig) -> Block:
    """The decoder layer's sizes."""
    bias = not model.disable_bias_linear
    return Block(
        width=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads(),
        head_size=model.head_size(),
        feed_forward=model.ffn_width(),
        gated=model.swiglu,
        bias=bias,
        query_bias=bias or model.add_qkv_bias,
        norm_vectors=1 if model.normalization == "RMSNorm" else 2,
        head_norms=model.qk_layernorm,
        relative=model.position_embedding_type == "relative",
    )


def encoder_block(model: ModelConfig, retro: RetroConfig) -> Block:
    """The encoder layer's sizes."""
    return decoder_block(retro.encoder_model(model))


def model_costs(
    model: ModelConfig, retro: RetroConfig, seq_length: int, *, vocabulary: int | None = None
) -> ModelCosts:
    """Costs of every part; `vocabulary` rows of embedding and output (the true vocabulary when not given)."""
    rows = model.vocab_size or 0 if vocabulary is None else vocabulary
    block, matrix = decoder_block(model), rows * model.hidden_size
    retrieval = set(retro.retrieval_layers(model.num_layers))
    positions = model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0
    units = [UnitCost("embedding", matrix + positions * model.hidden_size, 0.0)]
    for layer in range(1, model.num_layers + 1):
        if retrieval and layer == min(retrieval):
            units.append(_encoder_cost(model, retro, rows))
        cost = _decoder_layer_cost(block, seq_length if model.sliding_window is None else model.sliding_window)
        if layer in retrieval:
            cost = _plus(cost, _if_read(retro, _cross_attention_cost(block, encoder_block(model, retro).width, retro)))
        units.append(UnitCost(f"layers.{layer - 1}", *cost))
    own = matrix if model.untie_embeddings_and_output_weights else 0
    units.append(UnitCost("head", own + block.norm_parameters(), matrix))
    return ModelCosts(tuple(units))


def neighbor_tokens_per_token(retro: RetroConfig) -> float:
    """Neighbour tokens that go with each decoder token: k * r / m."""
    return retro.retro_num_neighbors * retro.retrieved_length() / retro.retro_chunk_length


def _if_read(retro: RetroConfig, cost: tuple[int, float]) -> tuple[int, float]:
    """Behind a shut gate parameters are there and do nothing."""
    return cost if retro.reads_neighbors() else (cost[0], 0.0)


def gate_parameters(block: Block, retro: RetroConfig) -> int:
    """Parameters of one gate."""
    return {"fixed": 0, "scalar": 1, "adaptive": block.width + 1}[retro.retro_gate_type]


def decoder_layer_parameters(model: ModelConfig) -> int:
    """One decoder layer without cross-attention."""
    block = decoder_block(model)
    return block.self_attention_parameters() + block.feed_forward_parameters()


def _relative(retro: RetroConfig) -> bool:
    return retro.neighbor_positions() == "relative"


def _plus(first: tuple[int, float], second: tuple[int, float]) -> tuple[int, float]:
    return first[0] + second[0], first[1] + second[1]


def _decoder_layer_cost(block: Block, seq_length: int) -> tuple[int, float]:
    parameters = block.self_attention_parameters() + block.feed_forward_parameters()
    scores = block.num_heads * block.head_size * seq_length  # queries x keys and weights x values, half of the square
    return parameters, float(sum(block.attention_matrices()) + block.feed_forward_matrices() + scores)


def _cross_attention_cost(block: Block, encoder_width: int, retro: RetroConfig) -> tuple[int, float]:
    query, key_value, output = block.attention_matrices(encoder_width)
    keys = retro.retro_num_neighbors * retro.retrieved_length()
    scores = 2 * block.num_heads * block.head_size * keys
    multiply_adds = query + output + key_value * neighbor_tokens_per_token(retro) + scores
    return block.cross_attention_parameters(encoder_width, _relative(retro)) + gate_parameters(
        block, retro
    ), multiply_adds


def _encoder_cost(model: ModelConfig, retro: RetroConfig, rows: int) -> UnitCost:
    """Layers over neighbour tokens; the first also reads its chunk's hidden states (projected once per chunk)."""
    block, tokens = encoder_block(model, retro), neighbor_tokens_per_token(retro)
    inner = block.num_heads * block.head_size
    matrices = sum(block.attention_matrices()) + block.feed_forward_matrices()
    per_neighbor_token = retro.retro_encoder_layers * (matrices + 2 * inner * retro.retrieved_length())
    query, key_value, output = block.attention_matrices(model.hidden_size)
    per_neighbor_token += query + output + 2 * inner * retro.retro_chunk_length
    layer = block.self_attention_parameters() + block.feed_forward_parameters()
    parameters = retro.retro_encoder_layers * layer + block.cross_attention_parameters(
        model.hidden_size, _relative(retro)
    )
    parameters += rows * block.width if retro.retro_encoder_own_embedding else 0
    return UnitCost("encoder", *_if_read(retro, (parameters, tokens * per_neighbor_token + key_value)))
