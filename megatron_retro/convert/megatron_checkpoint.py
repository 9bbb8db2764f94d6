"""A GPT or Retro checkpoint of Megatron-LM's older ("legacy") model code as one of ours: names, cuts and settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.convert.megatron_files import FILE, read_megatron
from megatron_retro.convert.megatron_settings import DECODER, legacy_settings
from megatron_retro.errors import ArtifactError

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
Merge = Callable[[Sequence[Tensor]], Tensor]
_DERIVED = re.compile(r".*(_extra_state|inv_freq)$")


def import_megatron(source: Path, run: Path, say: Callable[[str], None], known_neutral: Collection[str] = ()) -> Path:
    """Write step 0 of `run` and print what was skipped. The vocabulary is the checkpoint's, padding included."""
    checkpoint = read_megatron(source)
    if _EMBEDDING not in checkpoint.shards[0]:
        raise ArtifactError(f"{checkpoint.path} is no model of the older code", expected=_EMBEDDING)
    names = list(checkpoint.shards[0])
    vocabulary = sum(len(shard[_EMBEDDING]) for shard in checkpoint.shards)
    model, retro = legacy_settings(checkpoint.arguments, names, vocabulary, known_neutral)
    parts = tensor_sources(model, retro)
    shapes = parameter_shapes(model, retro)
    problems = [f"{parts[name].theirs} is missing" for name in shapes if parts[name].theirs not in names]
    problems += [f"{name} is not understood" for name in unknown_tensors(names, parts)]
    if problems:
        raise ArtifactError(
            f"{checkpoint.path} is not the model that its arguments describe", got="; ".join(problems[:6])
        )

    def load(name: str) -> Tensor:
        tensor = parts[name].merge([shard[parts[name].theirs] for shard in checkpoint.shards])
        if tuple(tensor.shape) != shapes[name]:
            raise ArtifactError(
                f"{checkpoint.path}: {parts[name].theirs} has another shape than its arguments say",
                got=tuple(tensor.shape),
                expected=shapes[name],
            )
        return tensor.to(torch.float32)

    first = checkpoint.path / "mp_rank_00" / FILE
    settings = Settings([model, retro, TokenizerConfig()])
    written = write_checkpoint(run, settings, shapes, load, {FILE: file_record(first).sha256})
    say(f"{len(checkpoint.shards)} shards merged, {len(shapes)} parameters; skipped: {', '.join(checkpoint.skipped)}")
    say("no tokenizer is in such a checkpoint: give --tokenizer-type and --tokenizer-model when you use it")
    return written


@dataclass(frozen=True)
class TensorSource:
    """The name of one of our tensors in Megatron's shards, and how the shards are merged."""

    theirs: str
    merge: Merge


def rows(shards: Sequence[Tensor]) -> Tensor:
    """Merge a column-parallel weight: each rank has some output rows."""
    return torch.cat(list(shards), 0)


def columns(shards: Sequence[Tensor]) -> Tensor:
    """Merge a row-parallel weight: each rank has some input columns."""
    return torch.cat(list(shards), 1)


def replica(shards: Sequence[Tensor]) -> Tensor:
    """Merge a replicated tensor, which must be the same on every rank."""
    if not all(torch.equal(shards[0], shard) for shard in shards[1:]):
        raise ArtifactError("a tensor that every rank should have alike differs between the shards")
    return shards[0]


def gated_rows(shards: Sequence[Tensor]) -> Tensor:
    """Merge a gated up-projection: each rank has [its gate; its up]."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.stack([torch.cat([half[number] for half in halves]) for number in (0, 1)])


def grouped(groups: int) -> Merge:
    """Merge rows of whole heads into [G, rows of a head, ...]."""

    def merge(shards: Sequence[Tensor]) -> Tensor:
        whole = rows(shards)
        return whole.reshape(groups, -1, *whole.shape[1:])

    return merge


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


def unknown_tensors(names: Sequence[str], parts: Mapping[str, TensorSource]) -> list[str]:
    """Tensors of the checkpoint that no parameter comes from, derived ones left out."""
    used = {part.theirs for part in parts.values()}
    return sorted(name for name in names if name not in used and not _DERIVED.match(name))
