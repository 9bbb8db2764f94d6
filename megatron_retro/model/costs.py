"""Operations of each part of a model: multiply-adds per decoder token. No torch.

One count serves the cut of the pipeline and the utilization that training and plans report. It counts what the paper's
arithmetic counts: a causal kernel does half of the square, nothing is recomputed, and the neighbour encoder is counted
per DECODER token (each carries k*r/m neighbour tokens). What a run really executes, plans take from a trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.model import ModelConfig, RetroConfig

ENCODER, HEAD = "encoder", "head"


@dataclass(frozen=True)
class Work:
    """Multiply-adds per decoder token: products with parameters, and attention's scores."""

    products: float = 0.0
    scores: float = 0.0

    @property
    def forward(self) -> float:
        """Of the forward pass."""
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
        return Work(self.products + other.products, self.scores + other.scores)


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
    def multiply_adds(self) -> float:
        """Of the forward pass, per decoder token."""
        return (self.own + self.before + self.added).forward


@dataclass(frozen=True)
class ModelCosts:
    """Every part in the order of the forward pass; the encoder stands before the first retrieval layer."""

    units: tuple[UnitCost, ...]

    def named(self, name: str) -> UnitCost:
        """`layers.0`, ..., `encoder`, `head`."""
        return next(unit for unit in self.units if unit.name == name)

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of one token's forward pass."""
        return 2 * sum(unit.multiply_adds for unit in self.units)

    def training_flops(self, trained: Trained = EVERYTHING) -> float:
        """Forward and backward of one token, nothing recomputed, without the little that is tuned beside it."""
        return self.forward_flops + 2 * sum(self._backward_multiply_adds(trained))

    def _backward_multiply_adds(self, trained: Trained) -> list[float]:
        """Of each part, per decoder token. A frozen part passes gradients on to what is trained before it.

        In a frozen decoder gradients end at the first cross-attention, where what it reads or the encoder is trained;
        what lies before that has no backward pass.
        """
        found, reached = [], trained.decoder
        for unit in self.units:
            if unit.name == ENCODER:
                read = unit.own.input_gradient if reached else 0.0
                found.append(trained.backward(unit.own + unit.before, True) if trained.encoder else read)
                continue
            begins = not reached and unit.added.forward > 0 and (trained.cross_attention or trained.encoder)
            reached = reached or begins
            passed = unit.own if begins else unit.own + unit.before
            through = trained.backward(passed, trained.decoder) + trained.backward(unit.added, trained.cross_attention)
            found.append(through if reached else 0.0)
        return found


def model_costs(model: ModelConfig, retro: RetroConfig, seq_length: int) -> ModelCosts:
    """Of every part, for sequences of this length; the vocabulary's padding costs nothing."""
    retrieval, units = set(retro.retrieval_layers(model.num_layers)), []
    for layer in range(1, model.num_layers + 1):
        if retrieval and layer == min(retrieval):
            units.append(_encoder_cost(model, retro))
        added = _if_read(retro, _cross_attention(model, retro)) if layer in retrieval else _NOTHING
        units.append(
            UnitCost(f"layers.{layer - 1}", Work(_mlp(model)), _causal_attention(model, layer, seq_length), added)
        )
    return ModelCosts((*units, UnitCost(HEAD, Work((model.vocab_size or 0) * model.hidden_size))))


def neighbor_tokens_per_token(retro: RetroConfig) -> float:
    """Neighbour tokens that go with each decoder token: k * r / m."""
    return retro.retro_num_neighbors * retro.retrieved_length() / retro.retro_chunk_length


def _if_read(retro: RetroConfig, work: Work) -> Work:
    """Behind a shut gate nothing is computed."""
    return work if retro.reads_neighbors() else _NOTHING


def _heads_width(model: ModelConfig) -> int:
    return model.num_attention_heads * model.head_size()


def _query_or_output(model: ModelConfig) -> int:
    """Entries of the query matrix; the output matrix has as many."""
    return model.hidden_size * _heads_width(model)


def _key_value(model: ModelConfig, source_width: int) -> int:
    """Entries of the key/value matrix."""
    return 2 * source_width * model.num_key_value_heads() * model.head_size()


def _self_attention(model: ModelConfig) -> int:
    """Entries of the matrices of a self-attention."""
    return 2 * _query_or_output(model) + _key_value(model, model.hidden_size)


def _mlp(model: ModelConfig) -> int:
    """Entries of the matrices of an MLP."""
    return (3 if model.gated() else 2) * model.hidden_size * model.ffn_width()


def _causal_attention(model: ModelConfig, layer: int, seq_length: int) -> Work:
    window = min(seq_length, model.window(layer) or seq_length)
    keys = window - window**2 / (2 * seq_length)  # that a token sees, on average
    return Work(_self_attention(model), 2 * _heads_width(model) * keys)


def _cross_attention(model: ModelConfig, retro: RetroConfig) -> Work:
    """Queries of every token; keys and values of its neighbours' tokens."""
    source_width = retro.encoder_model(model).hidden_size
    products = 2 * _query_or_output(model) + _key_value(model, source_width) * neighbor_tokens_per_token(retro)
    return Work(products, 2 * _heads_width(model) * retro.retro_num_neighbors * retro.retrieved_length())


def _encoder_cost(model: ModelConfig, retro: RetroConfig) -> UnitCost:
    """Layers over neighbour tokens; the first also reads its chunk's hidden states (projected once per chunk)."""
    encoder, tokens, layers = retro.encoder_model(model), neighbor_tokens_per_token(retro), retro.retro_encoder_layers
    attention, keys = _self_attention(encoder), retro.retrieved_length() / (2 if retro.retro_encoder_causal else 1)
    scores = 2 * _heads_width(encoder) * keys
    products = (layers - 1) * attention + layers * _mlp(encoder) + 2 * _query_or_output(encoder)
    others = (layers - 1) * scores + 2 * _heads_width(encoder) * retro.retro_chunk_length
    rest = Work(tokens * products + _key_value(encoder, model.hidden_size), tokens * others)
    return UnitCost(ENCODER, _if_read(retro, rest), _if_read(retro, Work(tokens * attention, tokens * scores)))
