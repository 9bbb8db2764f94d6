"""Generation on tensor and pipeline ranks: every rank runs the same engine on the same requests, with its own layers.

A pipeline is a chain of point-to-point messages here: each step's tokens are known everywhere, hidden states (and newly
encoded neighbours) go down the chain, the last stage's logits come back to all, so all ranks choose the same tokens.
Only the first rank knows the requests: see `driver.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.inference.forward import stack
from megatron_retro.inference.neighbor_sources import Found
from megatron_retro.model.cache import Cache
from megatron_retro.model.context import SequenceContext
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh
from megatron_retro.parallel.stages import Stage
from megatron_retro.peft.prompts import configured_virtual_tokens


class StagedForward:
    """This rank's stage as a forward; every rank calls the same methods with the same arguments."""

    def __init__(self, stage: Stage, settings: Settings, mesh: ParallelMesh) -> None:
        model, retro = settings[ModelConfig], settings[RetroConfig]
        self.stage, self.mesh, self.device = stage, mesh, mesh.device
        self.chunk_length = retro.retro_chunk_length
        self.vocab_size = model.vocab_size or 0
        self.reads_neighbors = retro.reads_neighbors()
        self.neighbor_shape = (max(1, retro.retro_num_neighbors), retro.retrieved_length())
        self.virtual_tokens = configured_virtual_tokens(settings[PeftConfig])
        self.learned_positions = model.learned_positions()
        self._hidden_size, self._encoder_size = model.hidden_size, retro.encoder_model(model).hidden_size
        self._dtype = next(parameter.dtype for parameter in stage.parameters())
        self._group = mesh.group(PIPELINE)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Room for this stage's states."""
        return self.stage.model.new_cache(batch_size, max_length)

    @torch.inference_mode()
    def fill(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> None:
        """Put tokens into the cache."""
        self._run(torch.tensor(tokens_BS, device=self.device), stack(found, self.neighbor_shape, self.device), cache)

    @torch.inference_mode()
    def all_logits(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> Tensor:
        """[B, S, V] on every rank."""
        return self._logits(torch.tensor(tokens_BS, device=self.device), found, cache)

    @torch.inference_mode()
    def next_logits(self, tokens_B: Sequence[int], found: Sequence[Found | None], cache: Cache) -> Tensor:
        """[B, V] on every rank."""
        rows = [[] if one is None else [one] for one in found]
        return self._logits(torch.tensor(tokens_B, device=self.device)[:, None], rows, cache)[:, -1]

    def _logits(self, tokens_BS: Tensor, found: Sequence[Sequence[Found]], cache: Cache) -> Tensor:
        hidden_BSH = self._run(tokens_BS, stack(found, self.neighbor_shape, self.device), cache)
        if self.stage.part.last:
            logits_BSV = self.stage.model.head(hidden_BSH).float().contiguous()
        else:
            logits_BSV = torch.empty(*tokens_BS.shape, self.vocab_size, device=self.device)
        if self.stage.part.num_stages > 1:
            dist.broadcast(logits_BSV, dist.get_global_rank(self._group, self.stage.part.num_stages - 1), self._group)
        return logits_BSV

    def _run(self, tokens_BS: Tensor, neighbors: Neighbors | None, cache: Cache) -> Tensor:
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
        return (*context.retrieval.neighbors.tokens_BCKR.shape, self._encoder_size)

    def _receive(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self.device)
        dist.recv(tensor, dist.get_global_rank(self._group, self.stage.part.index - 1), self._group)
        return tensor

    def _send(self, tensor: Tensor) -> None:
        dist.send(tensor.contiguous(), dist.get_global_rank(self._group, self.stage.part.index + 1), self._group)
