"""The shape of the model: the decoder, and what makes it a Retro. Their rules are in `model_rules`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_retro.config.fields import option

GLOBAL, LOCAL = "global", "local"  # rotary frequencies
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
NORM_PLACEMENTS = ("before", "after", "both")
QK_NORM_SCOPES = ("head", "projection")
POSITIONS = ("rope", "learned_absolute", "relative", "none")
GATES = ("fixed", "scalar", "heads", "adaptive")
ENCODER_READS = ("last", "same-depth")
NEIGHBOR_POSITIONS = ("rotary", "continued", "relative", "none")
RETRO_INITS = ("noise", "decoder")


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
    max_position_embeddings: int = option(4096, "longest sequence of learned positions, and of dynamic rope", minimum=1)
    position_embedding_type: str = option("rope", "positions of the decoder", choices=POSITIONS)
    rotary_percent: float = option(1.0, "share of a head that rotary positions rotate", minimum=0.0, maximum=1.0)
    rotary_base: float = option(10000.0, "base of the rotary frequencies", minimum=1.0)
    rotary_base_local: float | None = option(
        None,
        "another base, not rescaled, in layers with a sliding window and in the encoder's layers of the same number",
        minimum=1.0,
        ours=True,
    )
    rotary_interleaved: bool = option(False, "turn neighbouring pairs instead of halves")
    no_rope_freq: int | None = option(
        None, "every N-th layer, of the encoder too, is without rotary positions", minimum=2
    )
    rope_scaling_type: str = option(
        "none",
        "rescaling of rotary frequencies; interpolated: of positions, as Megatron-LM rounds; dynamic: beyond "
        "max_position_embeddings only, where no text may reach",
        choices=("none", "linear", "interpolated", "llama3", "yarn", "dynamic"), ours=True,
    )  # fmt: skip
    rope_scaling_factor: float = option(1.0, "by how much frequencies are stretched", minimum=1.0)
    rope_scaling_low_freq_factor: float = option(1.0, "llama3 scaling: low-frequency bound", ours=True)
    rope_scaling_high_freq_factor: float = option(4.0, "llama3 scaling: high-frequency bound", ours=True)
    rope_scaling_original_max_positions: int = option(
        8192, "llama3 and yarn scaling: original context", minimum=1, ours=True
    )
    sliding_window: int | None = option(None, "each token sees at most this many last tokens", minimum=1, ours=True)
    full_attention_layers: tuple[int, ...] | None = option(
        None, "decoder layers, from 1, that see everything in spite of --sliding-window", minimum=1, ours=True
    )
    normalization: str = option("LayerNorm", "kind of norm", choices=NORMALIZATIONS)
    apply_layernorm_1p: bool = option(False, "store the norm's weight as 1 + w")
    norm_placement: str = option(
        "before",
        "where a layer's norms stand: before attention and MLP, after them (their sum with the stream is not normed), "
        "or both",
        choices=NORM_PLACEMENTS,
        ours=True,
    )
    norm_epsilon: float = option(1e-5, "added to the variance")
    qk_layernorm: bool = option(False, "norm of queries and keys")
    qk_norm_scope: str = option(
        "head",
        "what one norm of queries or keys covers: a head, or all heads of the projection",
        choices=QK_NORM_SCOPES,
        ours=True,
    )
    swiglu: bool = option(False, "gated MLP with SiLU")
    geglu: bool = option(False, "gated MLP with GELU, in the form that --gelu-tanh says", ours=True)
    squared_relu: bool = option(False, "squared ReLU in the MLP")
    disable_bias_linear: bool = option(False, "no bias in linear layers")
    add_qkv_bias: bool = option(False, "bias of queries, keys and values even under --disable-bias-linear")
    untie_embeddings_and_output_weights: bool = option(False, "an output matrix of its own")
    gelu_tanh: bool = option(False, "the tanh form of GELU (GPT-2's)", ours=True)
    scale_embedding: bool = option(False, "multiply word vectors by the square root of the width", ours=True)
    vocab_size: int | None = option(None, "true vocabulary; the tokenizer's when not set", minimum=1)
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary to a multiple of this", minimum=1)
    hidden_dropout: float = option(0.0, "dropout before each residual add", minimum=0.0, maximum=1.0)
    attention_dropout: float = option(0.0, "dropout of attention weights", minimum=0.0, maximum=1.0)
    init_method_std: float = option(0.02, "standard deviation of initial weights", minimum=0.0)

    def norms_before(self) -> bool:
        """Whether attention and MLP read the normed stream."""
        return self.norm_placement != "after"

    def norms_after(self) -> bool:
        """Whether what attention and MLP give is normed before it is added."""
        return self.norm_placement != "before"

    def gated(self) -> bool:
        """Whether the MLP has two matrices up, of which one opens the other."""
        return self.swiglu or self.geglu

    def ffn_width(self) -> int:
        """Width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.gated():
            return max(64, int(self.hidden_size * 8 / 3 / 64) * 64)
        return 4 * self.hidden_size

    def window(self, layer: int) -> int | None:
        """How many last tokens this layer, from 1, sees; None where it sees all."""
        return None if layer in (self.full_attention_layers or ()) else self.sliding_window

    def windows(self) -> set[int | None]:
        """Those of all layers."""
        return {self.window(layer) for layer in range(1, self.num_layers + 1)}

    def rotation(self, layer: int) -> str | None:
        """Which rotary frequencies this layer, from 1, has, of the decoder or of the encoder; None without."""
        if self.no_rope_freq is not None and layer % self.no_rope_freq == 0:
            return None
        local = self.rotary_base_local is not None and layer not in (self.full_attention_layers or ())
        return LOCAL if local else GLOBAL

    def position_limit(self) -> int | None:
        """How long a text can be; None where positions do not end. Dynamic rope is another function from there on."""
        dynamic = self.position_embedding_type == "rope" and self.rope_scaling_type == "dynamic"
        ends = dynamic or self.position_embedding_type == "learned_absolute"
        return self.max_position_embeddings if ends else None

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
    retro_encoder_causal: bool = option(
        False, "a neighbour's token sees those before it, as in the decoder, not all", ours=True
    )
    retro_encoder_final_norm: bool = option(False, "a norm of what the encoder gives", ours=True)
    retro_encoder_reads: str = option(
        "last",
        "which state of the encoder a retrieval layer reads: that of its last layer, or the one as deep as itself",
        choices=ENCODER_READS,
        ours=True,
    )
    retro_encoder_own_embedding: bool = option(False, "a token embedding of the encoder's own", ours=True)
    retro_encoder_hidden_dropout: float = option(0.0, "dropout in the encoder", minimum=0.0, maximum=1.0)
    retro_encoder_attention_dropout: float = option(0.0, "attention dropout in the encoder", minimum=0.0, maximum=1.0)
    retro_neighbor_positions: str = option("rotary", "positions of neighbours", choices=NEIGHBOR_POSITIONS, ours=True)
    retro_gate_type: str = option("fixed", "what scales the cross-attention output", choices=GATES, ours=True)
    retro_attention_gate: float = option(1.0, "value of the fixed gate: 1 reads neighbours, 0 is the GPT", minimum=0.0)
    retro_gate_target_rate: float = option(0.5, "adaptive gate: share of chunks that should read", ours=True)
    retro_gate_budget_weight: float = option(0.001, "adaptive gate: weight of the target-rate loss", ours=True)
    retro_gate_budget_warmup: int = option(1000, "adaptive gate: steps until that weight is reached", ours=True)
    retro_init: str = option(
        "noise", "retrofit: where the weights of what it adds come from", choices=RETRO_INITS, ours=True
    )
    retro_init_output_scale: float = option(
        1.0, "retrofit from the decoder: factor on the copied cross-attention outputs", minimum=0.0, ours=True
    )
    retro_open_heads: tuple[str, ...] | None = option(
        None, "retrofit from the decoder: heads (LAYER.HEAD, from 1) whose gates start open", ours=True
    )
    retro_zero_init_output: bool = option(False, "start cross-attention at zero, so that step 0 is the GPT", ours=True)
    retro_legacy_checkpoint: bool = option(
        False, "compute as the published Megatron-LM Retro checkpoints were trained to", ours=True
    )
    retro_core_checkpoint: bool = option(
        False, "compute as Retro checkpoints of Megatron core were trained to", ours=True
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

    def computes_as_megatron(self) -> bool:
        """Nothing of a neighbour is masked, and the short chunk of a text is its first: so in both of its codes."""
        return self.retro_legacy_checkpoint or self.retro_core_checkpoint

    def neighbor_positions(self) -> str:
        """Positions of neighbour tokens inside attention; Megatron's checkpoints were trained without."""
        return "none" if self.computes_as_megatron() else self.retro_neighbor_positions

    def biased_cross_attention(self, model: ModelConfig) -> bool:
        """Megatron core's cross-attention has the biases of all its linear layers."""
        return self.retro_core_checkpoint and not model.disable_bias_linear

    def learned_neighbor_positions(self, model: ModelConfig) -> bool:
        """Neighbours get the decoder's learned positions, from 0 on, in Megatron core."""
        return self.retro_core_checkpoint and model.position_embedding_type == "learned_absolute"

    def rotates_neighbors(self) -> bool:
        """Whether the heads that read neighbours, and the encoder's, are rotated by position."""
        return self.neighbor_positions() in ("rotary", "continued")

    def chunk_start(self) -> int:
        """Position of a chunk's first token where its neighbours' tokens stand at 0 .. r-1."""
        return self.retrieved_length() if self.neighbor_positions() == "continued" else 0

    def encoder_depths(self, num_layers: int) -> dict[int, int]:
        """How many of the encoder's layers lie below what each retrieval layer (from 1) reads."""
        deepest = self.retro_encoder_layers
        layers = self.retrieval_layers(num_layers)
        return {layer: deepest if self.retro_encoder_reads == "last" else min(layer - 1, deepest) for layer in layers}

    def encoded_width(self, model: ModelConfig) -> int:
        """Numbers that a neighbour's token has after the encoder: one state beside the other for every depth read."""
        return len(set(self.encoder_depths(model.num_layers).values())) * self.encoder_model(model).hidden_size

    def open_gates(self) -> dict[int, list[int]]:
        """Heads (from 0) of each layer (from 1) whose gates do not start shut."""
        found: dict[int, list[int]] = {}
        for layer, _, head in (name.partition(".") for name in self.retro_open_heads or ()):
            found.setdefault(int(layer), []).append(int(head) - 1)
        return found

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
