"""A GPT or Retro checkpoint of Megatron-LM's older ("legacy") model code as one of ours: names, cuts and settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.megatron_adam import StoredAdam
from megatron_retro.convert.megatron_files import MegatronCheckpoint
from megatron_retro.convert.megatron_merges import Merge, columns, gated_rows, grouped, replica, rows
from megatron_retro.convert.megatron_model import MegatronModel
from megatron_retro.convert.megatron_settings import DECODER, legacy_settings
from megatron_retro.errors import ArtifactError

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_REPEATED = re.compile(r"word_embeddings_for_head\.")
_DERIVED = re.compile(r".*(_extra_state|inv_freq)$")


def legacy_model(checkpoint: MegatronCheckpoint, known_neutral: Collection[str] = ()) -> MegatronModel:
    """The model that a checkpoint of the older code holds."""
    shards = [_modern(shard) for shard in checkpoint.shards]
    if _EMBEDDING not in shards[0]:
        raise ArtifactError(f"{checkpoint.path} is no model of the older code", expected=_EMBEDDING)
    names = list(shards[0])
    vocabulary = sum(len(shard[_EMBEDDING]) for shard in shards)
    model, retro = legacy_settings(checkpoint.arguments, names, vocabulary, known_neutral)
    parts = tensor_sources(model, retro)
    return MegatronModel(
        checkpoint.path,
        model,
        retro,
        {name: part.theirs for name, part in parts.items()},
        [name for name in names if not _DERIVED.match(name)],
        lambda name: parts[name].merge([shard[parts[name].theirs] for shard in shards]),
        checkpoint.arguments,
        _adam(checkpoint, parts),
        checkpoint.skipped,
        len(shards),
        checkpoint.fingerprint(),
    )


def _adam(checkpoint: MegatronCheckpoint, parts: Mapping[str, TensorSource]) -> StoredAdam:
    """Moments are merged as their weights are."""
    if checkpoint.no_moments:
        return StoredAdam(problem=checkpoint.no_moments)
    moments = {kind: [_modern(shard) for shard in shards] for kind, shards in checkpoint.moments.items()}

    def read(kind: str, part: TensorSource) -> Tensor:
        return part.merge([shard[part.theirs] for shard in moments[kind]])

    tensors = {
        kind: {part.theirs: partial(read, kind, part) for part in parts.values() if part.theirs in shards[0]}
        for kind, shards in moments.items()
    }
    return StoredAdam(tensors, checkpoint.content).renamed({name: part.theirs for name, part in parts.items()})


def _modern(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older files say layernorm; the last stage of a pipeline repeats the embedding."""
    return {name.replace("layernorm", "norm"): tensor for name, tensor in shard.items() if not _REPEATED.match(name)}


@dataclass(frozen=True)
class TensorSource:
    """The name of one of our tensors in Megatron's shards, and how the shards are merged."""

    theirs: str
    merge: Merge


def tensor_sources(model: ModelConfig, retro: RetroConfig) -> dict[str, TensorSource]:
    """The source of every parameter, by our name."""
    parts = {"embedding.word.weight": TensorSource("language_model.embedding.word_embeddings.weight", rows)}
    if model.position_embedding_type == "learned_absolute":
        parts["embedding.position.weight"] = TensorSource(
            "language_model.embedding.position_embeddings.weight", replica
        )
    if model.untie_embeddings_and_output_weights:
        parts["output.weight"] = TensorSource("language_model.output_layer.weight", rows)
    parts |= _norm(model, "final_norm", "language_model.encoder.final_norm")
    retrieval = [number - 1 for number in retro.retrieval_layers(model.num_layers)]
    for index in range(model.num_layers):
        parts |= _layer(model, f"layers.{index}", f"{DECODER}{index}", index in retrieval)
    for index in range(retro.retro_encoder_layers if retrieval else 0):
        theirs = f"{DECODER}{retrieval[0]}.retriever.layers.{index}"
        parts |= _layer(model, f"encoder.layers.{index}", theirs, index == 0)
    return parts


def _norm(model: ModelConfig, ours: str, theirs: str) -> dict[str, TensorSource]:
    kinds = ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias")
    return {f"{ours}.{kind}": TensorSource(f"{theirs}.{kind}", replica) for kind in kinds}


def _layer(model: ModelConfig, ours: str, theirs: str, reads: bool) -> dict[str, TensorSource]:
    """The sources of one layer. With a cross-attention, that has the norm after self-attention, the MLP another one."""
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
        parts[f"{ours}.{mine}.weight"] = TensorSource(f"{theirs}.{other}.weight", weight)
        if not model.disable_bias_linear:
            parts[f"{ours}.{mine}.bias"] = TensorSource(f"{theirs}.{other}.bias", bias)
    if reads:
        parts |= _norm(model, f"{ours}.cross_norm", f"{theirs}.post_attention_norm")
        cross, other = f"{ours}.cross_attention", f"{theirs}.inter_attention"
        parts[f"{cross}.query.weight"] = TensorSource(f"{other}.query.weight", grouped(model.num_attention_heads))
        parts[f"{cross}.key_value.weight"] = TensorSource(f"{other}.key_value.weight", grouped(groups))
        parts[f"{cross}.output.weight"] = TensorSource(f"{other}.dense.weight", columns)
    return parts
