"""What each part of a model costs: parameters, and multiply-adds per decoder token. No torch.

One count serves the cut of the pipeline, the utilization that training reports, and the plan. Attention counts what a
causal kernel does (half of the square). The neighbour encoder is counted per DECODER token: each carries k*r/m
neighbour tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.model import ModelConfig, RetroConfig

ENCODER = "encoder"


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
class Work:
    """Parameters, and multiply-adds per decoder token: products with the parameters, and attention's scores."""

    parameters: int = 0
    products: float = 0.0
    scores: float = 0.0

    @property
    def forward(self) -> float:
        """Multiply-adds of the forward pass."""
        return self.products + self.scores

    @property
    def backward(self) -> float:
        """For the gradients of everything."""
        return 2 * self.forward

    @property
    def input_gradient(self) -> float:
        """For the gradient that goes on to what lies before, where the parameters are frozen."""
        return self.products + 2 * self.scores

    def __add__(self, other: Work) -> Work:
        return Work(self.parameters + other.parameters, self.products + other.products, self.scores + other.scores)


_NOTHING = Work()


@dataclass(frozen=True)
class Trained:
    """Where a run changes something: the weights themselves, or, where it tunes beside a model, what stands there."""

    decoder: bool = True
    cross_attention: bool = True
    encoder: bool = True
    weights: bool = True

    def backward(self, work: Work, here: bool) -> float:
        """Of a part that gradients pass through: with its weights' if these are trained `here`."""
        return work.backward if here and self.weights else work.input_gradient


EVERYTHING = Trained()
ADDED = Trained(decoder=False)  # what retro-fitting adds to a frozen decoder


@dataclass(frozen=True)
class UnitCost:
    """One part that a stage holds whole. `before` is what comes before its (first) cross-attention; in a decoder layer
    that is `added`."""

    name: str
    own: Work = _NOTHING
    before: Work = _NOTHING
    added: Work = _NOTHING

    @property
    def parameters(self) -> int:
        """Its parameters."""
        return (self.own + self.before + self.added).parameters

    @property
    def multiply_adds(self) -> float:
        """Of the forward pass, per decoder token."""
        return (self.own + self.before + self.added).forward


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

    def training_flops(self, trained: Trained = EVERYTHING) -> float:
        """Forward and backward of one token, nothing recomputed, without the little that is tuned beside it."""
        return self.forward_flops + 2 * sum(self.backward_multiply_adds(trained).values())

    def backward_multiply_adds(self, trained: Trained = EVERYTHING) -> dict[str, float]:
        """Of each part, per decoder token. A frozen part passes gradients on to what is trained before it.

        In a frozen decoder gradients end at the first cross-attention, where what it reads or the encoder is trained;
        what lies before that has no backward pass.
        """
        found, reached = {}, trained.decoder
        for unit in self.units:
            if unit.name == ENCODER:
                read = unit.own.input_gradient if reached else 0.0
                found[unit.name] = trained.backward(unit.own + unit.before, True) if trained.encoder else read
                continue
            begins = not reached and unit.added.parameters > 0 and (trained.cross_attention or trained.encoder)
            reached = reached or begins
            passed = unit.own if begins else unit.own + unit.before
            through = trained.backward(passed, trained.decoder) + trained.backward(unit.added, trained.cross_attention)
            found[unit.name] = through if reached else 0.0
        return found


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
    units = [UnitCost("embedding", Work(matrix + positions * model.hidden_size))]
    seen = seq_length if model.sliding_window is None else model.sliding_window
    for layer in range(1, model.num_layers + 1):
        if retrieval and layer == min(retrieval):
            units.append(_encoder_cost(model, retro, rows))
        added = _NOTHING
        if layer in retrieval:
            added = _if_read(retro, _cross_attention_work(block, encoder_block(model, retro).width, retro))
        units.append(UnitCost(f"layers.{layer - 1}", _feed_forward_work(block), _attention_work(block, seen), added))
    own = matrix if model.untie_embeddings_and_output_weights else 0
    units.append(UnitCost("head", Work(own + block.norm_parameters(), matrix)))
    return ModelCosts(tuple(units))


def neighbor_tokens_per_token(retro: RetroConfig) -> float:
    """Neighbour tokens that go with each decoder token: k * r / m."""
    return retro.retro_num_neighbors * retro.retrieved_length() / retro.retro_chunk_length


def _if_read(retro: RetroConfig, work: Work) -> Work:
    """Behind a shut gate parameters are there and do nothing."""
    return work if retro.reads_neighbors() else Work(work.parameters)


def gate_parameters(block: Block, retro: RetroConfig) -> int:
    """Parameters of one gate."""
    return {"fixed": 0, "scalar": 1, "heads": block.num_heads, "adaptive": block.width + 1}[retro.retro_gate_type]


def decoder_layer_parameters(model: ModelConfig) -> int:
    """One decoder layer without cross-attention."""
    block = decoder_block(model)
    return block.self_attention_parameters() + block.feed_forward_parameters()


def _relative(retro: RetroConfig) -> bool:
    return retro.neighbor_positions() == "relative"


def _attention_work(block: Block, seq_length: int) -> Work:
    scores = block.num_heads * block.head_size * seq_length  # queries x keys and weights x values, half of the square
    return Work(block.self_attention_parameters(), sum(block.attention_matrices()), scores)


def _feed_forward_work(block: Block) -> Work:
    return Work(block.feed_forward_parameters(), block.feed_forward_matrices())


def _cross_attention_work(block: Block, encoder_width: int, retro: RetroConfig) -> Work:
    query, key_value, output = block.attention_matrices(encoder_width)
    keys = retro.retro_num_neighbors * retro.retrieved_length()
    parameters = block.cross_attention_parameters(encoder_width, _relative(retro)) + gate_parameters(block, retro)
    products = query + output + key_value * neighbor_tokens_per_token(retro)
    return Work(parameters, products, 2 * block.num_heads * block.head_size * keys)


def _encoder_cost(model: ModelConfig, retro: RetroConfig, rows: int) -> UnitCost:
    """Layers over neighbour tokens; the first also reads its chunk's hidden states (projected once per chunk)."""
    block, tokens = encoder_block(model, retro), neighbor_tokens_per_token(retro)
    inner, layers = block.num_heads * block.head_size, retro.retro_encoder_layers
    query, key_value, output = block.attention_matrices(model.hidden_size)
    attention = sum(block.attention_matrices())
    scores = (1 if retro.retro_encoder_causal else 2) * inner * retro.retrieved_length()
    products = (layers - 1) * attention + layers * block.feed_forward_matrices() + query + output
    others = (layers - 1) * scores + 2 * inner * retro.retro_chunk_length
    parameters = (layers - 1) * block.self_attention_parameters() + layers * block.feed_forward_parameters()
    parameters += block.cross_attention_parameters(model.hidden_size, _relative(retro))
    parameters += rows * block.width if retro.retro_encoder_own_embedding else 0
    parameters += block.norm_parameters() if retro.retro_encoder_final_norm else 0
    return UnitCost(
        ENCODER,
        _if_read(retro, Work(parameters, tokens * products + key_value, tokens * others)),
        _if_read(retro, Work(block.self_attention_parameters(), tokens * attention, tokens * scores)),
    )
