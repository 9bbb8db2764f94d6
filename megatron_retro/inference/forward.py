"""Logits from tokens, neighbours and a cache: the only place where generation calls the model, whole or in stages.

On tensor and pipeline ranks every rank runs the same engine on the same requests, with its own layers. Each step's
tokens are known everywhere; hidden states (and newly encoded neighbours) are sent from stage to stage, and the last
stage broadcasts the logits, so all ranks choose the same tokens. Only the first rank knows the requests: see
`driver.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.inference.neighbor_sources import ChunkReading, RetrievedNeighbors
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.cache import Cache
from megatron_retro.model.context import SequenceContext
from megatron_retro.model.reading import read_neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh
from megatron_retro.parallel.stages import Stage
from megatron_retro.peft.prompts import configured_virtual_tokens, virtual_tokens_of

TokenRows = Sequence[Sequence[int]]
FoundRows = Sequence[Sequence[RetrievedNeighbors]]


class Forward(ABC):
    """A model that is fed with a cache, however it is cut. `virtual_tokens` (of P-tuning) stand before every text."""

    chunk_length: int
    vocab_size: int
    reads_neighbors: bool
    neighbor_shape: tuple[int, int]
    virtual_tokens: tuple[int, ...]
    position_limit: int | None
    can_show_reading = False
    device: torch.device

    def __init__(self, model: ModelConfig, retro: RetroConfig, virtual_tokens: tuple[int, ...]) -> None:
        self.chunk_length = retro.retro_chunk_length
        self.vocab_size = model.vocab_size or 0
        self.reads_neighbors = retro.reads_neighbors()
        self.neighbor_shape = (max(1, retro.retro_num_neighbors), retro.retrieved_length())
        self.virtual_tokens = virtual_tokens
        self.position_limit = model.position_limit()

    @torch.inference_mode()
    def prefill(self, tokens_BS: TokenRows, found: FoundRows, cache: Cache) -> None:
        """Put tokens into the cache. `found` holds, by row, neighbours of the chunks that these tokens complete."""
        self._hidden(torch.tensor(tokens_BS, device=self.device), self._stacked(found), cache)

    @torch.inference_mode()
    def all_logits(self, tokens_BS: TokenRows, found: FoundRows, cache: Cache) -> Tensor:
        """As `prefill`, with the logits [B, S, V] after each of these tokens, on every rank."""
        return self._logits(torch.tensor(tokens_BS, device=self.device), self._stacked(found), cache)

    @torch.inference_mode()
    def next_logits(self, tokens_B: Sequence[int], found: Sequence[RetrievedNeighbors | None], cache: Cache) -> Tensor:
        """[B, V] after one more token of each row, on every rank; `found` for rows whose token completes a chunk."""
        neighbors = self._stacked([[] if one is None else [one] for one in found])
        return self._logits(torch.tensor(tokens_B, device=self.device)[:, None], neighbors, cache)[:, -1]

    @abstractmethod
    def text_logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None) -> Tensor:
        """The logits of all tokens of whole texts, without a cache that outlives the call; on every rank."""

    def reading(self, tokens_S: Sequence[int], found: Mapping[int, RetrievedNeighbors]) -> list[ChunkReading]:
        """Of each chunk in `found`: what its neighbours get, and are worth, when the text is read again."""
        raise NotImplementedError

    def _stacked(self, found: FoundRows) -> Neighbors[Tensor] | None:
        return stack_neighbors(found, self.neighbor_shape, self.device)

    @abstractmethod
    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """A cache with room for sequences of `max_length` tokens."""

    @abstractmethod
    def _hidden(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        """The hidden states after this rank's layers; the cache then holds the tokens."""

    @abstractmethod
    def _logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        """The logits of all tokens, on every rank."""


class LocalForward(Forward):
    """A whole model in this process."""

    can_show_reading = True

    def __init__(self, model: Retro) -> None:
        super().__init__(model.model, model.retro, virtual_tokens_of(model.embedding))
        self.model = model.eval()
        self.device = next(model.parameters()).device

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """A cache of all layers."""
        return self.model.new_cache(batch_size, max_length)

    def text_logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None) -> Tensor:
        logits_BSV: Tensor = self.model(tokens_BS, neighbors)
        return logits_BSV

    def reading(self, tokens_S: Sequence[int], found: Mapping[int, RetrievedNeighbors]) -> list[ChunkReading]:
        empty = [np.zeros(one.mask_KR.shape, np.float32) for one in found.values()]
        unread = [ChunkReading(attention_KR, attention_KR[:, 0]) for attention_KR in empty]
        count = (len(tokens_S) - 1) // self.chunk_length
        if not found or not count:
            return unread
        any_one = next(iter(found.values()))
        absent = replace(any_one, mask_KR=np.zeros_like(any_one.mask_KR))
        neighbors = self._stacked([[found.get(chunk, absent) for chunk in range(count)]])
        assert neighbors is not None
        reading = read_neighbors(self.model, torch.tensor(tokens_S, device=self.device), neighbors)
        attention_CKR, worth_CK = (part.float().cpu().numpy() for part in (reading.attention_CKR, reading.worth_CK))
        # a text may end at the token that would have read its last neighbours first
        return [
            ChunkReading(attention_CKR[chunk], worth_CK[chunk]) if chunk < count else none
            for chunk, none in zip(found, unread, strict=True)
        ]

    def _hidden(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        model = self.model
        batch_size, length = tokens_BS.shape
        context = model.prepare(batch_size, length, tokens_BS.device, neighbors=neighbors, cache=cache)
        hidden_BSH, _ = model.run_layers(model.embed(tokens_BS, context), None, context, cache)
        if context.cache_slice is not None:
            cache.commit(context.cache_slice)
        return hidden_BSH

    def _logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        return self.model.head(self._hidden(tokens_BS, neighbors, cache))


class StagedForward(Forward):
    """This rank's stage of a cut model; every rank calls the same methods with the same arguments."""

    def __init__(self, stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
        model, retro = settings[ModelConfig], settings[RetroConfig]
        super().__init__(model, retro, configured_virtual_tokens(settings[PeftConfig]))
        self.stage, self.mesh, self.device = stage, mesh, mesh.device
        self._hidden_size, self._encoded_width = model.hidden_size, retro.encoded_width(model)
        self._dtype = next(parameter.dtype for parameter in stage.parameters())
        self._group = mesh.group(PIPELINE)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """A cache of this stage's layers."""
        return self.stage.model.new_cache(batch_size, max_length)

    def text_logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None) -> Tensor:
        return self._logits(tokens_BS, neighbors, self.new_cache(*tokens_BS.shape))

    def _logits(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        hidden_BSH = self._hidden(tokens_BS, neighbors, cache)
        if self.stage.part.last:
            logits_BSV = self.stage.model.head(hidden_BSH).float().contiguous()
        else:
            logits_BSV = torch.empty(*tokens_BS.shape, self.vocab_size, device=self.device)
        if self.stage.part.num_stages > 1:
            dist.broadcast(logits_BSV, dist.get_global_rank(self._group, self.stage.part.num_stages - 1), self._group)
        return logits_BSV

    def _hidden(self, tokens_BS: Tensor, neighbors: Neighbors[Tensor] | None, cache: Cache) -> Tensor:
        model, part = self.stage.model, self.stage.part
        batch_size, length = tokens_BS.shape
        context = model.prepare(batch_size, length, tokens_BS.device, neighbors=neighbors, cache=cache)
        if part.first:
            hidden_BSH = model.embed(tokens_BS, context)
        else:
            hidden_BSH = self._receive((batch_size, length, self._hidden_size))
        encoded_shape = self._encoded_shape(context)
        encoded = self._receive(encoded_shape) if part.receives_neighbors and encoded_shape is not None else None
        hidden_BSH, encoded = model.run_layers(hidden_BSH, encoded, context, cache)
        if not part.last:
            self._send(hidden_BSH)
            if part.sends_neighbors and encoded is not None:
                self._send(encoded)
        if context.cache_slice is not None:
            cache.commit(context.cache_slice)
        return hidden_BSH

    def _encoded_shape(self, context: SequenceContext) -> tuple[int, ...] | None:
        """Shape of what the encoder's stage sends on; None when this step completes no chunk with neighbours."""
        if context.retrieval is None or context.retrieval.neighbors is None:
            return None
        return (*context.retrieval.neighbors.tokens_BCKR.shape, self._encoded_width)

    def _receive(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self.device)
        dist.recv(tensor, dist.get_global_rank(self._group, self.stage.part.index - 1), self._group)
        return tensor

    def _send(self, tensor: Tensor) -> None:
        dist.send(tensor.contiguous(), dist.get_global_rank(self._group, self.stage.part.index + 1), self._group)


def stack_neighbors(
    rows: FoundRows, shape: tuple[int, int], device: torch.device, at_least: int = 0
) -> Neighbors[Tensor] | None:
    """[B, C, K, R] of the rows' neighbours, padded with absent ones to `at_least` chunks; None where there are none."""
    most = max(map(len, rows), default=0)
    if most == 0:
        return None
    most = max(most, at_least)
    tokens = np.zeros((len(rows), most, *shape), np.int64)
    mask = np.zeros(tokens.shape, np.bool_)
    for row, chunks in enumerate(rows):
        for place, found in enumerate(chunks):
            tokens[row, place], mask[row, place] = found.tokens_KR, found.mask_KR
    return Neighbors(torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device))
