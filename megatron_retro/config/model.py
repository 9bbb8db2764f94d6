"""The shape of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
POSITIONS = ("rope", "learned_absolute", "relative", "none")


@dataclass(frozen=True)
class ModelConfig:
    """Decoder: layers, widths, variants"""

    num_layers: int = option(2, "decoder layers", minimum=1)
    hidden_size: int = option(64, "width of the residual stream", minimum=1)
    ffn_hidden_size: int | None = option(None, "width of the MLP; 4h, or int(8h/3/64)*64 when gated", minimum=1)
    num_attention_heads: int = option(4, "query heads", minimum=1)
    group_query_attention: bool = option(False, "share keys and values between groups of heads")
    num_query_groups: int | None = option(None, "key/value heads under --group-query-attention", minimum=1)
    kv_channels: int | None = option(None, "size of one head; hidden size / heads when not set", minimum=1)
    max_position_embeddings: int = option(4096, "longest sequence of learned positions", minimum=1)
    position_embedding_type: str = option("rope", "positions of the decoder", choices=POSITIONS)
    rotary_percent: float = option(1.0, "share of a head that rotary turns", minimum=0.0, maximum=1.0)
    rotary_base: float = option(10000.0, "base of the rotary frequencies", minimum=1.0)
    rotary_interleaved: bool = option(False, "turn neighbouring pairs instead of halves")
    rope_scaling_type: str = option(
        "none", "rescaling of rotary frequencies", choices=("none", "linear", "llama3"), ours=True
    )
    rope_scaling_factor: float = option(1.0, "by how much frequencies are stretched", minimum=1.0)
    rope_scaling_low_freq_factor: float = option(1.0, "llama3 scaling: low-frequency bound", ours=True)
    rope_scaling_high_freq_factor: float = option(4.0, "llama3 scaling: high-frequency bound", ours=True)
    rope_scaling_original_max_positions: int = option(8192, "llama3 scaling: original context", ours=True)
    sliding_window: int | None = option(None, "each token sees at most this many last tokens", minimum=1, ours=True)
    normalization: str = option("LayerNorm", "kind of norm", choices=NORMALIZATIONS)
    apply_layernorm_1p: bool = option(False, "store the norm's weight as 1 + w")
    norm_epsilon: float = option(1e-5, "added to the variance")
    qk_layernorm: bool = option(False, "norm of queries and keys per head")
    swiglu: bool = option(False, "gated MLP with SiLU")
    squared_relu: bool = option(False, "squared ReLU in the MLP")
    disable_bias_linear: bool = option(False, "no bias in linear layers")
    add_qkv_bias: bool = option(False, "bias of queries, keys and values even under --disable-bias-linear")
    untie_embeddings_and_output_weights: bool = option(False, "an output matrix of its own")
    gelu_tanh: bool = option(False, "the tanh form of GELU (GPT-2's)", ours=True)
    vocab_size: int | None = option(None, "true vocabulary; the tokenizer's when not set", minimum=1)
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary to a multiple of this", minimum=1)
    hidden_dropout: float = option(0.0, "dropout before each residual add", minimum=0.0, maximum=1.0)
    attention_dropout: float = option(0.0, "dropout of attention weights", minimum=0.0, maximum=1.0)
    init_method_std: float = option(0.02, "standard deviation of initial weights", minimum=0.0)

    def ffn_width(self) -> int:
        """Width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, int(self.hidden_size * 8 / 3 / 64) * 64)
        return 4 * self.hidden_size

    def learned_positions(self) -> int | None:
        """How long a text can be; None where positions do not end."""
        return self.max_position_embeddings if self.position_embedding_type == "learned_absolute" else None

    def head_size(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        if self.group_query_attention and self.num_query_groups is not None:
            return self.num_query_groups
        return self.num_attention_heads

    def padded_vocab_size(self, divisor: int = 1) -> int:
        """The vocabulary padded for a cut in `divisor` parts."""
        multiple = self.make_vocab_size_divisible_by * divisor
        return -(-(self.vocab_size or 0) // multiple) * multiple
