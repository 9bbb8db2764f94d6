"""Bytes that a rank sends, as formulas: the table of docs/parallelism.md. No torch.

A ring is meant: gathering or scattering W bytes over n ranks sends W (n-1)/n from each, a sum that all get twice that.
Sequence parallelism sends what plain tensor parallelism sends: a sum is a scatter and a gather.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig

_LOSS_BYTES = 4
_LOSS_ROWS = 3  # the largest logit; the sum of exponentials and the label's logit


@dataclass(frozen=True)
class Sizes:
    """Whole tensors of one microbatch, in bytes: hidden state, encoded neighbours, and its number of tokens."""

    hidden: float
    encoded: float
    tokens: int


def microbatch_sizes(
    model: ModelConfig, retro: RetroConfig, micro_batch: int, seq_length: int, value_bytes: int
) -> Sizes:
    """The tensors that are exchanged."""
    tokens = micro_batch * seq_length
    chunks = seq_length // retro.retro_chunk_length * micro_batch
    neighbors = chunks * retro.retro_num_neighbors * retro.retrieved_length() if retro.reads_neighbors() else 0
    width = retro.encoder_model(model).hidden_size
    return Sizes(tokens * model.hidden_size * value_bytes, neighbors * width * value_bytes, tokens)


def tensor_bytes(model: ModelConfig, retro: RetroConfig, parallel: ParallelConfig, sizes: Sizes) -> float:
    """What a tensor rank sends for one microbatch, forward and backward, if it holds the whole depth of the model.

    A region costs four passes over what it mixes (in and out, forward and backward). Pipeline stages behind the
    encoder's that read neighbours enter them again: two passes over the encoded neighbours each.
    """
    size = parallel.tensor_model_parallel_size
    ring = (size - 1) / size
    retrieval = len(retro.retrieval_layers(model.num_layers)) if sizes.encoded else 0
    regions = 2 * model.num_layers + retrieval
    hidden = 4 * regions + 2 + 2  # embedding; output
    encoded = 0
    if retrieval:
        hidden += 2  # the first retrieval layer's state, for the encoder
        encoded = 4 * (2 * retro.retro_encoder_layers + 1) + 2 + 2  # regions; embedded neighbours; their way out
    losses = 2 * _LOSS_ROWS * _LOSS_BYTES * sizes.tokens
    return ring * (hidden * sizes.hidden + encoded * sizes.encoded + losses)


def boundary_bytes(parallel: ParallelConfig, sizes: Sizes, *, with_neighbors: bool) -> float:
    """What a stage sends over one border for one microbatch, forward and backward together."""
    parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return 2 * (sizes.hidden + (sizes.encoded if with_neighbors else 0.0)) / parts


def data_bytes(
    parameters: float, replicas: int, sharding: str, microbatches: int, *, value_bytes: int, sum_bytes: int = 4
) -> float:
    """What a data rank sends in one step, without a pipeline (with one, gradients go once a step)."""
    ring = (replicas - 1) / replicas
    gradients, values = ring * parameters * sum_bytes, ring * parameters * value_bytes
    if sharding == "none":
        return 2 * gradients
    if sharding == "optimizer":
        return gradients + values
    if sharding == "gradients":
        return gradients * microbatches + values
    return (gradients + 2 * values) * microbatches
