"""From token ids to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig
from megatron_retro.model.leaves import Embedding


class TokenEmbedding(nn.Module):
    """Word vectors, and learned positions where they are configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        learned = config.position_embedding_type == "learned_absolute"
        self.dropout = config.hidden_dropout
        self.word = Embedding(config.padded_vocab_size(), config.hidden_size)
        self.position = Embedding(config.max_position_embeddings, config.hidden_size) if learned else None

    def forward(self, tokens_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
        """[B, S, H]."""
        hidden_BSH: Tensor = self.word(tokens_BS)
        if self.position is not None:
            hidden_BSH = hidden_BSH + self.position(position_ids_BS)
        return functional.dropout(hidden_BSH, self.dropout, self.training) if self.dropout else hidden_BSH
