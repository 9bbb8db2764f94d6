"""A GPT or Retro checkpoint of Megatron core: names and settings, from `torch_dist` or from `mp_rank_XX_YYY`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes
from megatron_retro.convert.core_names import EMBEDDING, LAYERS, OUTPUT, core_name
from megatron_retro.convert.distributed_checkpoint import INDEX, DistributedTensors, layer_names
from megatron_retro.convert.megatron_adam import StoredAdam, distributed_adam
from megatron_retro.convert.megatron_files import MegatronCheckpoint, read_common
from megatron_retro.convert.megatron_merges import Merge, columns, gated_rows, replica, rows
from megatron_retro.convert.megatron_model import MegatronModel
from megatron_retro.convert.megatron_settings import (
    Arguments,
    common_problems,
    decoder_settings,
    require_representable,
)
from megatron_retro.errors import ArtifactError

# what lies beside the model: how its names begin
_BESIDE = {
    "optimizer": ("optimizer.", "chained_"),
    "random states": ("rng_state", "rerun_state_machine"),
    "schedule": ("opt_param_scheduler",),
}
_NOT_OF_THE_MODEL = tuple(begin for begins in _BESIDE.values() for begin in begins)
_READS = re.compile(re.escape(LAYERS) + r"(\d+)\.cross_attention\.attn\.")
_ENCODER_LAYER = re.compile(r"\.cross_attention\.encoder\.layers\.(\d+)\.")
_ROWS = re.compile(r".*linear_(qkv|q|kv)\.(weight|bias)|embedding\.word_embeddings\.weight|output_layer\.weight")
_COLUMNS = re.compile(r".*linear_(proj|fc2)\.weight")
_UP = re.compile(r".*linear_fc1\.(weight|bias)")


@dataclass(frozen=True)
class CoreCheckpoint:
    """Arguments of the run and tensors of its model, by the names of single layers."""

    path: Path
    arguments: Mapping[str, Any]
    names: Collection[str]
    vocabulary: int
    read: Callable[[str], Tensor]
    adam: StoredAdam
    skipped: tuple[str, ...]
    tensor_ranks: int
    fingerprint: Mapping[str, str]


def read_distributed(folder: Path) -> CoreCheckpoint:
    """The checkpoint in a folder of one iteration, `torch_dist`."""
    common = read_common(folder)
    tensors = DistributedTensors(folder)
    shapes = {name: shape for name, shape in tensors.shapes.items() if not name.startswith(_NOT_OF_THE_MODEL)}
    names = layer_names(shapes, LAYERS)
    if EMBEDDING not in names:
        raise ArtifactError(f"{folder} is no model of Megatron core", expected=EMBEDDING)
    stored = (*tensors.shapes, *tensors.others)
    skipped = [kind for kind, begins in _BESIDE.items() if any(name.startswith(begins) for name in stored)]
    return CoreCheckpoint(
        folder,
        vars(common["args"]),
        names,
        shapes[EMBEDDING][0],
        lambda name: tensors.read(*names[name]),
        distributed_adam(tensors, common, LAYERS),
        tuple(skipped),
        1,
        {INDEX: file_record(folder / INDEX).sha256},
    )


def is_core(checkpoint: MegatronCheckpoint) -> bool:
    """Whether core wrote it, or the older code."""
    return EMBEDDING in checkpoint.shards[0]


def read_shards(checkpoint: MegatronCheckpoint) -> CoreCheckpoint:
    """The model of `mp_rank_XX_YYY` folders, tensor ranks merged."""
    shards = [_with_norms_inside(shard) for shard in checkpoint.shards]
    gated = bool(checkpoint.arguments.get("swiglu"))

    def merged(shards: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
        return _merge_of(name, gated)([shard[name] for shard in shards])

    def read(name: str) -> Tensor:
        return merged(shards, name)

    moments = {kind: [_with_norms_inside(shard) for shard in found] for kind, found in checkpoint.moments.items()}
    tensors = {kind: {name: partial(merged, found, name) for name in found[0]} for kind, found in moments.items()}
    repeated = {OUTPUT} if not checkpoint.arguments.get("untie_embeddings_and_output_weights") else set()
    if OUTPUT in repeated.intersection(shards[0]) and not torch.equal(read(OUTPUT), read(EMBEDDING)):
        raise ArtifactError(f"{checkpoint.path}: {OUTPUT} is not the embedding to which its arguments tie it")
    return CoreCheckpoint(
        checkpoint.path,
        checkpoint.arguments,
        [name for name in shards[0] if name not in repeated and not name.endswith("_extra_state")],
        sum(len(shard[EMBEDDING]) for shard in shards),
        read,
        StoredAdam(tensors, checkpoint.content, checkpoint.no_moments),
        checkpoint.skipped,
        len(shards),
        checkpoint.fingerprint(),
    )


def _with_norms_inside(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_name_inside(name): tensor for name, tensor in shard.items()}


def _name_inside(name: str) -> str:
    """Core's local layers keep norms beside the linear layers that follow; `torch_dist` has them inside."""
    if ".pre_mlp_layernorm.norm." in name:
        return name
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def _merge_of(name: str, gated: bool) -> Merge:
    if _UP.fullmatch(name):
        return gated_rows if gated else rows
    if _ROWS.fullmatch(name):
        return rows
    return columns if _COLUMNS.fullmatch(name) else replica


def core_model(checkpoint: CoreCheckpoint, known_neutral: Collection[str] = ()) -> MegatronModel:
    """The model that a checkpoint of core holds."""
    model, retro = core_settings(checkpoint.arguments, checkpoint.names, checkpoint.vocabulary, known_neutral)
    sources = {
        name: core_name(name, retro.retrieval_layers(model.num_layers)) for name in parameter_shapes(model, retro)
    }
    return MegatronModel(
        checkpoint.path,
        model,
        retro,
        sources,
        checkpoint.names,
        lambda name: checkpoint.read(sources[name]),
        checkpoint.arguments,
        checkpoint.adam.renamed(sources),
        checkpoint.skipped,
        checkpoint.tensor_ranks,
        checkpoint.fingerprint,
    )


def core_settings(
    arguments: Mapping[str, Any], names: Collection[str], vocabulary: int, known_neutral: Collection[str] = ()
) -> tuple[ModelConfig, RetroConfig]:
    """Our settings from the run's arguments; the retrieval layers are those with a cross-attention."""
    given = Arguments(arguments)
    reading = sorted({int(found[1]) for name in names if (found := _READS.match(name))})
    require_representable(arguments, _problems(given, bool(reading)), known_neutral)
    model = decoder_settings(given, vocabulary, legacy=False)
    if not reading:
        return model, RetroConfig()
    encoder_layers = {int(found[1]) for name in names if (found := _ENCODER_LAYER.search(name))}
    retro = RetroConfig(
        retro_add_retriever=True,
        retro_layers=tuple(index + 1 for index in reading),
        retro_encoder_layers=len(encoder_layers),
        retro_chunk_length=given("retro_chunk_length", given("retro_gpt_chunk_length", 64)),
        retro_num_neighbors=given("retro_num_neighbors", 2),
        retro_num_retrieved_chunks=given("retro_num_retrieved_chunks", 2),
        retro_neighbor_positions="none",
        retro_core_checkpoint=True,
    )
    return model, retro


def _problems(given: Arguments, reads: bool) -> Iterator[str]:
    yield from common_problems(given)
    if given("openai_gelu", False):
        yield "openai_gelu = True, which core does not follow (expected False)"
    if given("retro_add_retriever", False) and not reads:
        yield "retro_add_retriever = True without a cross-attention in the checkpoint (expected one)"
    if reads:
        for name in ("add_qkv_bias", "group_query_attention", "qk_layernorm"):
            if given(name, False):
                yield f"{name} = True in a Retro of core, which has no such cross-attention (expected False)"
