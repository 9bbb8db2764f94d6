"""The names, cuts and settings of Megatron-LM's "legacy" Retro, in ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.errors import ArtifactError

Merge = Callable[[Sequence[Tensor]], Tensor]
DECODER = "language_model.encoder.layers."
_RETRIEVER = re.compile(re.escape(DECODER) + r"(\d+)\.retriever\.layers\.(\d+)\.")
_READS = re.compile(re.escape(DECODER) + r"(\d+)\.inter_attention\.")
_DERIVED = re.compile(r".*(_extra_state|inv_freq)$")


@dataclass(frozen=True)
class Part:
    """Where one of our tensors lies in Megatron's shards, and how these become it."""

    theirs: str
    merge: Merge


def rows(shards: Sequence[Tensor]) -> Tensor:
    """Column parallel: each rank has some output rows."""
    return torch.cat(list(shards), 0)


def columns(shards: Sequence[Tensor]) -> Tensor:
    """Row parallel: each rank has some input columns."""
    return torch.cat(list(shards), 1)


def replica(shards: Sequence[Tensor]) -> Tensor:
    """The same on every rank."""
    if not all(torch.equal(shards[0], shard) for shard in shards[1:]):
        raise ArtifactError("a tensor that every rank should have alike differs between the shards")
    return shards[0]


def gated_rows(shards: Sequence[Tensor]) -> Tensor:
    """Each rank has [its gate; its up]."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.stack([torch.cat([half[number] for half in halves]) for number in (0, 1)])


def grouped(groups: int) -> Merge:
    """Rows of whole heads, one after the other: [G, rows of a head, ...]."""

    def merge(shards: Sequence[Tensor]) -> Tensor:
        whole = rows(shards)
        return whole.reshape(groups, -1, *whole.shape[1:])

    return merge


def settings_of(arguments: Mapping[str, Any], names: Sequence[str], vocabulary: int) -> tuple[ModelConfig, RetroConfig]:
    """Our settings of the run's arguments; the retrieval layers are those that have a cross-attention."""

    def given(name: str, *default: Any) -> Any:
        if name not in arguments and not default:
            raise ArtifactError(
                f"the checkpoint's arguments lack {name}", fix="it is no training checkpoint of Megatron-LM"
            )
        value = arguments.get(name)
        return default[0] if value is None and default else value

    heads = given("num_attention_heads")
    grouped_queries = bool(given("group_query_attention", False))
    bias = bool(given("add_bias_linear", True))
    model = ModelConfig(
        num_layers=given("num_layers"),
        hidden_size=given("hidden_size"),
        ffn_hidden_size=given("ffn_hidden_size"),
        num_attention_heads=heads,
        group_query_attention=grouped_queries,
        num_query_groups=given("num_query_groups", None) if grouped_queries else None,
        kv_channels=given("kv_channels", None),
        max_position_embeddings=given("max_position_embeddings"),
        position_embedding_type="rope"
        if given("use_rotary_position_embeddings", False)
        else given("position_embedding_type"),
        rotary_percent=float(given("rotary_percent", 1.0)),
        rotary_base=float(given("rotary_base", 10000.0)),
        normalization=given("normalization", "LayerNorm"),
        apply_layernorm_1p=bool(given("apply_layernorm_1p", False)),
        norm_epsilon=float(given("norm_epsilon", given("layernorm_epsilon", 1e-5))),
        swiglu=bool(given("swiglu", False)),
        squared_relu=bool(given("squared_relu", False)),
        gelu_tanh=bias and bool(given("bias_gelu_fusion", True)),
        disable_bias_linear=not bias,
        untie_embeddings_and_output_weights=bool(given("untie_embeddings_and_output_weights", False)),
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=1,
    )
    reading = sorted({int(found[1]) for name in names if (found := _READS.match(name))})
    encoder_layers = {int(found[2]) for name in names if (found := _RETRIEVER.match(name))}
    if not reading:
        return model, RetroConfig()
    retro = RetroConfig(
        retro_add_retriever=True,
        retro_layers=tuple(index + 1 for index in reading),
        retro_encoder_layers=len(encoder_layers),
        retro_chunk_length=given("retro_gpt_chunk_length", given("retro_chunk_length", 64)),
        retro_num_neighbors=given("retro_num_neighbors", 2),
        retro_num_retrieved_chunks=given("retro_num_retrieved_chunks", 2),
        retro_neighbor_positions="none",
        retro_attention_gate=float(given("retro_attention_gate", 1.0)),
        retro_legacy_checkpoint=True,
    )
    return model, retro


def parts_of(model: ModelConfig, retro: RetroConfig) -> dict[str, Part]:
    """Our name -> where it comes from, for every parameter of the model."""
    parts = {"embedding.word.weight": Part("language_model.embedding.word_embeddings.weight", rows)}
    if model.position_embedding_type == "learned_absolute":
        parts["embedding.position.weight"] = Part("language_model.embedding.position_embeddings.weight", replica)
    if model.untie_embeddings_and_output_weights:
        parts["output.weight"] = Part("language_model.output_layer.weight", rows)
    parts |= _norm(model, "final_norm", "language_model.encoder.final_norm")
    retrieval = [number - 1 for number in retro.retrieval_layers(model.num_layers)]
    for index in range(model.num_layers):
        parts |= _layer(model, f"layers.{index}", f"{DECODER}{index}", index in retrieval)
    for index in range(retro.retro_encoder_layers if retrieval else 0):
        theirs = f"{DECODER}{retrieval[0]}.retriever.layers.{index}"
        parts |= _layer(model, f"encoder.layers.{index}", theirs, index == 0)
    return parts


def _norm(model: ModelConfig, ours: str, theirs: str) -> dict[str, Part]:
    kinds = ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias")
    return {f"{ours}.{kind}": Part(f"{theirs}.{kind}", replica) for kind in kinds}


def _layer(model: ModelConfig, ours: str, theirs: str, reads: bool) -> dict[str, Part]:
    """In a layer that cross-attends, the norm after self-attention precedes that, and another one the MLP."""
    groups = model.num_key_value_heads()
    before_mlp = "post_inter_attention_norm" if reads else "post_attention_norm"
    parts = {**_norm(model, f"{ours}.input_norm", f"{theirs}.input_norm")}
    parts |= _norm(model, f"{ours}.mlp_norm", f"{theirs}.{before_mlp}")
    up = gated_rows if model.swiglu else rows
    linears: list[tuple[str, str, Merge, Merge]] = [
        ("attention.query_key_value", "self_attention.query_key_value", grouped(groups), grouped(groups)),
        ("attention.output", "self_attention.dense", columns, replica),
        ("mlp.up", "mlp.dense_h_to_4h", up, up),
        ("mlp.down", "mlp.dense_4h_to_h", columns, replica),
    ]
    for mine, other, weight, bias in linears:
        parts[f"{ours}.{mine}.weight"] = Part(f"{theirs}.{other}.weight", weight)
        if not model.disable_bias_linear:
            parts[f"{ours}.{mine}.bias"] = Part(f"{theirs}.{other}.bias", bias)
    if reads:
        parts |= _norm(model, f"{ours}.cross_norm", f"{theirs}.post_attention_norm")
        cross, other = f"{ours}.cross_attention", f"{theirs}.inter_attention"
        parts[f"{cross}.query.weight"] = Part(f"{other}.query.weight", grouped(model.num_attention_heads))
        parts[f"{cross}.key_value.weight"] = Part(f"{other}.key_value.weight", grouped(groups))
        parts[f"{cross}.output.weight"] = Part(f"{other}.dense.weight", columns)
    return parts


def not_understood(names: Sequence[str], parts: Mapping[str, Part]) -> list[str]:
    """Tensors of the checkpoint that no parameter comes from and that say something."""
    used = {part.theirs for part in parts.values()}
    return sorted(name for name in names if name not in used and not _DERIVED.match(name))
