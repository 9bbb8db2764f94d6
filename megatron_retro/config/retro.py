"""What makes the decoder a Retro: neighbours, their encoder, chunked cross-attention, the gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_retro.config.fields import option
from megatron_retro.config.model import ModelConfig

GATES = ("fixed", "scalar", "adaptive")
NEIGHBOR_POSITIONS = ("rotary", "relative", "none")


@dataclass(frozen=True)
class RetroConfig:
    """Retrieval in the model: neighbours, encoder, chunked cross-attention, gate"""

    retro_add_retriever: bool = option(False, "add the neighbour encoder and chunked cross-attention")
    retro_chunk_length: int = option(
        64, "tokens of a chunk (m)", minimum=1, ours=True, megatron_name="retro_gpt_chunk_length"
    )
    retro_num_neighbors: int = option(2, "neighbours per chunk (k)", minimum=0)
    retro_num_retrieved_chunks: int = option(2, "chunks per neighbour, itself included (r = this x m)", minimum=1)
    retro_layers: tuple[int, ...] | None = option(
        None, "decoder layers with cross-attention, from 1; default 6 (or 9 above 15 layers), then every 3rd", ours=True
    )
    retro_encoder_layers: int = option(2, "layers of the neighbour encoder", minimum=1)
    retro_encoder_hidden_size: int | None = option(None, "width of the encoder; the decoder's when not set", ours=True)
    retro_encoder_num_attention_heads: int | None = option(None, "heads of the encoder", ours=True)
    retro_encoder_kv_channels: int | None = option(None, "size of one head of the encoder", ours=True)
    retro_encoder_ffn_hidden_size: int | None = option(None, "MLP width of the encoder", ours=True)
    retro_encoder_own_embedding: bool = option(False, "a token embedding of the encoder's own", ours=True)
    retro_encoder_hidden_dropout: float = option(0.0, "dropout in the encoder", minimum=0.0, maximum=1.0)
    retro_encoder_attention_dropout: float = option(0.0, "attention dropout in the encoder", minimum=0.0, maximum=1.0)
    retro_neighbor_positions: str = option("rotary", "positions of neighbours", choices=NEIGHBOR_POSITIONS, ours=True)
    retro_gate_type: str = option("fixed", "what scales the cross-attention output", choices=GATES, ours=True)
    retro_attention_gate: float = option(1.0, "value of the fixed gate: 1 reads neighbours, 0 is the GPT", minimum=0.0)
    retro_gate_target_rate: float = option(0.5, "adaptive gate: share of chunks that should read", ours=True)
    retro_gate_budget_weight: float = option(0.001, "adaptive gate: weight of the target-rate loss", ours=True)
    retro_gate_budget_warmup: int = option(1000, "adaptive gate: steps until that weight is reached", ours=True)
    retro_no_retrieval_probability: float = option(
        0.0, "training: share of samples without neighbours", minimum=0.0, maximum=1.0, ours=True
    )
    retro_random_retrieval_probability: float = option(
        0.0, "training: share of samples with another sample's neighbours", minimum=0.0, maximum=1.0, ours=True
    )
    retro_zero_init_output: bool = option(False, "start cross-attention at zero, so that step 0 is the GPT", ours=True)
    retro_legacy_checkpoint: bool = option(
        False, "compute as the published Megatron-LM Retro checkpoints were trained to", ours=True
    )

    def retrieved_length(self) -> int:
        """Tokens of a neighbour with its continuation (r)."""
        return self.retro_chunk_length * self.retro_num_retrieved_chunks

    def retrieval_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers (from 1) that hold a cross-attention."""
        if not self.retro_add_retriever:
            return ()
        if self.retro_layers is not None:
            return self.retro_layers
        first = 6 if num_layers <= 15 else 9
        return tuple(range(first, num_layers + 1, 3)) or (num_layers,)

    def reads_neighbors(self) -> bool:
        """False for a plain GPT, and when the fixed gate is shut: then nothing is encoded or attended to."""
        shut = self.retro_gate_type == "fixed" and self.retro_attention_gate == 0
        return self.retro_add_retriever and not shut

    def neighbor_positions(self) -> str:
        """Positions of neighbour tokens; the published checkpoints were trained without."""
        return "none" if self.retro_legacy_checkpoint else self.retro_neighbor_positions

    def encoder_model(self, model: ModelConfig) -> ModelConfig:
        """The neighbour encoder's shape: the decoder's where nothing else is set."""
        width = self.retro_encoder_hidden_size or model.hidden_size
        heads = self.retro_encoder_num_attention_heads or model.num_attention_heads
        same = width == model.hidden_size and heads == model.num_attention_heads
        ffn_width = model.ffn_hidden_size if width == model.hidden_size else None
        return replace(
            model,
            num_layers=self.retro_encoder_layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=model.num_query_groups if same else None,
            kv_channels=self.retro_encoder_kv_channels or (model.kv_channels if same else None),
            ffn_hidden_size=self.retro_encoder_ffn_hidden_size or ffn_width,
            position_embedding_type="relative" if self.neighbor_positions() == "relative" else "none",
            sliding_window=None,
            hidden_dropout=self.retro_encoder_hidden_dropout,
            attention_dropout=self.retro_encoder_attention_dropout,
        )
