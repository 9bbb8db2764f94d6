"""The retrieval-enhanced transformer, as the paper tells it. Without a retriever, or without neighbours, it is a GPT.

    embed -> layers -> norm -> logits

and in each retrieval layer, after self-attention, chunked cross-attention to the encoded neighbours; the first
retrieval layer encodes them, in the light of its own (normed) state. What a pipeline stage runs are the same parts:
`prepare`, `embed`, `run_layers`, `head`; a module that the stage does not have is None or missing from `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.model_rules import model_violations
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.cache import Cache
from megatron_retro.model.context import ContextBuilder, SequenceContext
from megatron_retro.model.encoder import NeighborEncoder
from megatron_retro.model.kept_encodings import DEFAULT_MEGABYTES, MEGABYTE, KeptEncodings
from megatron_retro.model.layers import DecoderLayer
from megatron_retro.model.leaves import Norm, Output, TokenEmbedding
from megatron_retro.ops.attention import Documents


class Retro(nn.Module):
    """A decoder with, if configured, a neighbour encoder and chunked cross-attention in some layers."""

    def __init__(self, model: ModelConfig, retro: RetroConfig | None = None) -> None:
        super().__init__()
        retro = retro or RetroConfig()
        violations = model_violations(model, retro)
        if violations:
            raise ConfigError.from_violations(violations)
        self.model, self.retro = model, retro
        retrieval_layers = [number - 1 for number in retro.retrieval_layers(model.num_layers)]
        encoder_size = retro.encoder_model(model).hidden_size
        self.first_retrieval_layer = min(retrieval_layers, default=None)
        self.contexts = ContextBuilder(model, retro)
        self.embedding: TokenEmbedding | None = TokenEmbedding(model)
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(model, retro, index, encoder_size if index in retrieval_layers else None)
                for index in range(model.num_layers)
            }
        )
        self.encoder = NeighborEncoder(model, retro) if retrieval_layers else None
        self.final_norm: Norm | None = None if retro.retro_core_checkpoint else Norm(model, model.hidden_size)
        self.output: Output | None = Output(model)
        self.kept_encodings: KeptEncodings | None = None

    def keep_part(self, layers: Iterable[int], *, embedding: bool, encoder: bool, head: bool) -> None:
        """Drop what another pipeline stage holds."""
        wanted = {str(index) for index in layers}
        for name in [name for name in self.layers if name not in wanted]:
            del self.layers[name]
        self.embedding = self.embedding if embedding else None
        self.encoder = self.encoder if encoder else None
        self.final_norm = self.final_norm if head else None
        self.output = self.output if head else None

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Room for `batch_size` sequences of up to `max_length` tokens, fed slice by slice."""
        return Cache(batch_size, max_length, self.retro.retro_chunk_length)

    def forward(
        self,
        tokens_BS: Tensor,
        neighbors: Neighbors[Tensor] | None = None,
        *,
        labels_BS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, S, V] logits, or with labels the loss of each token [B, S] in float32.

        `neighbors` has an entry for each complete chunk of the sequence; with a cache, for each chunk that these tokens
        complete, row by row in order. `padding_mask_BS` is True for real tokens: padding may lead or end a row.
        """
        context = self.prepare(
            tokens_BS.shape[0],
            tokens_BS.shape[1],
            tokens_BS.device,
            neighbors=neighbors,
            position_ids_BS=position_ids_BS,
            document_ids_BS=document_ids_BS,
            padding_mask_BS=padding_mask_BS,
            cache=cache,
        )
        hidden_BSH = self.embed(tokens_BS, context)
        hidden_BSH, _ = self.run_layers(hidden_BSH, None, context, cache)
        if cache is not None and context.cache_slice is not None:
            cache.commit(context.cache_slice)
        return self.head(hidden_BSH, labels_BS)

    def prepare(
        self,
        batch_size: int,
        length: int,
        device: torch.device,
        *,
        neighbors: Neighbors[Tensor] | None = None,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        document_bounds_BD: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> SequenceContext:
        """Positions, masks and neighbours of one forward, the same on every stage.

        `document_bounds_BD` says what `document_ids_BS` says, where a kernel can read it.
        """
        if neighbors is not None:
            _require_mask(neighbors)
            if self.retro.computes_as_megatron():
                neighbors = _all_present(neighbors)
        sequence = (length, device, position_ids_BS, padding_mask_BS)
        if cache is not None:
            return self.contexts.cached_sequence(batch_size, *sequence, neighbors, document_ids_BS, cache)
        documents = None
        if document_ids_BS is not None:
            documents = Documents(document_ids_BS, document_bounds_BD)
        return self.contexts.whole_sequence(*sequence, neighbors, documents)

    def embed(self, tokens_BS: Tensor, context: SequenceContext) -> Tensor:
        """[B, S, H]; for the stage that holds the embedding."""
        assert self.embedding is not None
        hidden_BSH: Tensor = self.embedding(tokens_BS, context.position_ids_BS)
        return hidden_BSH

    def run_layers(
        self,
        hidden_BSH: Tensor,
        encoded_neighbors: Tensor | None,
        context: SequenceContext,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """This stage's layers: the hidden state and, from the first retrieval layer on, [B, C, K, R, H]."""
        for name, layer in self.layers.items():
            encodes = context.retrieval is not None and int(name) == self.first_retrieval_layer
            encode = self._encode_in(context, cache) if encodes else None
            hidden_BSH, encoded_neighbors = layer(hidden_BSH, encoded_neighbors, context, encode, cache)
        return hidden_BSH, encoded_neighbors

    def head(self, hidden_BSH: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Logits, or losses; for the stage that holds the output. A tied one holds the embedding too."""
        assert self.output is not None
        tied = None if self.embedding is None else self.embedding.word
        normed_BSH = hidden_BSH if self.final_norm is None else self.final_norm(hidden_BSH)
        result: Tensor = self.output(normed_BSH, labels_BS, tied)
        return result

    def _encode_in(self, context: SequenceContext, cache: Cache | None) -> Callable[[Tensor], Tensor | None]:
        """Encodes the context's neighbours, given the first retrieval layer's normed state of all tokens."""

        def encode(normed_BSH: Tensor) -> Tensor | None:
            retrieval = context.retrieval
            assert retrieval is not None
            if cache is not None and context.cache_slice is not None:
                cache.neighbors.append("decoder_state", normed_BSH, context.cache_slice)
            if retrieval.neighbors is None:
                return None
            if cache is not None and context.cache_slice is not None:
                chunks_BCMH = cache.neighbors.chunks("decoder_state", context.cache_slice)[:, None]
            else:
                chunks_BCMH = self.contexts.chunks(normed_BSH, retrieval.neighbors.num_chunks)
            return self.encode(retrieval.neighbors, chunks_BCMH, retrieval.chunk_mask_XM)

        return encode

    def keep_encodings(self, megabytes: int | None) -> None:
        """Encode a neighbour once where only its own tokens count; `megabytes` None: with a default, where that is so.

        For a whole model that is used and not trained.
        """
        if self.encoder is None or not self.retro.reads_neighbors() or megabytes == 0:
            return
        if self.encoder.reads_chunks():
            if megabytes is None:
                return
            raise ConfigError(
                "encoded neighbours cannot be kept: this encoder reads the chunk that retrieved them",
                got=f"--keep-encoded-mb {megabytes}",
                expected="an encoder that is closed to it (--retro-init decoder with --freeze-encoder)",
                fix="leave --keep-encoded-mb out",
            )
        self.kept_encodings = KeptEncodings((DEFAULT_MEGABYTES if megabytes is None else megabytes) * MEGABYTE)

    def encode(self, neighbors: Neighbors[Tensor], chunks_BCMH: Tensor, chunk_mask_XM: Tensor | None) -> Tensor:
        """[B, C, K, R, H], where sequences are shared with the chunk before each span; for the encoder's stage."""
        if self.kept_encodings is None or torch.is_grad_enabled():
            encoded, share = self._encode(neighbors, chunks_BCMH, chunk_mask_XM), self.contexts.share
            return encoded if share is None else share.behind_chunk_before(encoded)

        def alone(some: Neighbors[Tensor]) -> Tensor:
            return self._encode(some, chunks_BCMH[:1, :1].expand(len(some.tokens_BCKR), -1, -1, -1), None)

        return self.kept_encodings.read(neighbors, alone)

    def _encode(self, neighbors: Neighbors[Tensor], chunks_BCMH: Tensor, chunk_mask_XM: Tensor | None) -> Tensor:
        assert self.encoder is not None
        table = self.encoder.embedding or self.embedding
        assert table is not None
        tokens_XKR, mask_XKR = neighbors.tokens_BCKR.flatten(0, 1), neighbors.mask_BCKR.flatten(0, 1)
        # whatever stands where nothing exists, the table can be asked for token 0
        embedded_XKRH = table.word(tokens_XKR.masked_fill(~mask_XKR, 0).long())
        length = tokens_XKR.shape[-1]
        if self.retro.learned_neighbor_positions(self.model):
            assert self.embedding is not None and self.embedding.position is not None
            embedded_XKRH = embedded_XKRH + self.embedding.position(torch.arange(length, device=embedded_XKRH.device))
        dropout = self.retro.retro_encoder_hidden_dropout
        if dropout:
            embedded_XKRH = functional.dropout(embedded_XKRH, dropout, self.training)
        encoded = self.encoder(embedded_XKRH, mask_XKR, chunks_BCMH.flatten(0, 1), chunk_mask_XM, length)
        return torch.unflatten(encoded, 0, neighbors.tokens_BCKR.shape[:2])


def _require_mask(neighbors: Neighbors[Tensor]) -> None:
    tokens, mask = neighbors.tokens_BCKR, neighbors.mask_BCKR
    if tokens.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"neighbour tokens {tuple(tokens.shape)} need a bool mask of their shape, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def _all_present(neighbors: Neighbors[Tensor]) -> Neighbors[Tensor]:
    """As Megatron's checkpoints were trained: in place of the absent, what stands there."""
    return Neighbors(neighbors.tokens_BCKR.clamp(min=0), torch.ones_like(neighbors.mask_BCKR))


def count_parameters(model: ModelConfig, retro: RetroConfig) -> int:
    """Parameters of the model itself, built without memory; rows that only pad the vocabulary do not count."""
    with torch.device("meta"):
        built = Retro(replace(model, make_vocab_size_divisible_by=1), retro)
    return sum(parameter.numel() for parameter in built.parameters())
