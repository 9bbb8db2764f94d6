"""Names of Megatron core's tensors, as `torch_dist` has them, for each parameter of ours; rows have the same order."""

from __future__ import annotations

from collections.abc import Sequence

LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
# a part of a parameter's name, ours and core's; most norms lie in the linear layer that follows them
_PARTS = (
    ("attention.query_key_value.", "self_attention.linear_qkv."),
    ("attention.output.", "self_attention.linear_proj."),
    ("attention.query_norm.", "self_attention.q_layernorm."),
    ("attention.key_norm.", "self_attention.k_layernorm."),
    ("cross_attention.query.", "cross_attention.attn.linear_q."),
    ("cross_attention.key_value.", "cross_attention.attn.linear_kv."),
    ("cross_attention.output.", "cross_attention.attn.linear_proj."),
    ("cross_attention.attending.", "cross_attention.attn.linear_proj."),
    ("cross_norm.", "pre_cross_attn_layernorm."),
    ("input_norm.", "self_attention.linear_qkv.layer_norm_"),
    ("mlp_norm.", "mlp.linear_fc1.layer_norm_"),
    ("mlp.up.", "mlp.linear_fc1."),
    ("mlp.down.", "mlp.linear_fc2."),
)
_WHOLE = {
    "embedding.word.weight": EMBEDDING,
    "embedding.position.weight": "embedding.position_embeddings.weight",
    "output.weight": OUTPUT,
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
}


def core_name(ours: str, retrieval_layers: Sequence[int] = ()) -> str:
    """Core's name of one of our parameters; its encoder lies in the first retrieval layer (numbered from 1)."""
    if ours in _WHOLE:
        return _WHOLE[ours]
    place, _, rest = ours.rpartition("layers.")
    number, rest = rest.split(".", 1)
    prefix = f"{LAYERS}{number}."
    if place == "encoder.":
        prefix = f"{LAYERS}{min(retrieval_layers) - 1}.cross_attention.encoder.layers.{number}."
        if number == "0" and rest.startswith("mlp_norm."):
            return f"{prefix}pre_mlp_layernorm.norm.{rest.removeprefix('mlp_norm.')}"
    mine, other = next(pair for pair in _PARTS if rest.startswith(pair[0]))
    return f"{prefix}{other}{rest.removeprefix(mine)}"
