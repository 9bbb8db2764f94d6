"""A model of ours as a `torch_dist` checkpoint of Megatron core: its names, its layers stacked, its run's arguments.

torch writes the format; tensors are read when it is their turn. Core also asks for the empty extra state of each of
its linear layers.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import StoredModel, open_stored, parameter_shapes
from megatron_retro.convert.core_names import LAYERS, core_name
from megatron_retro.convert.megatron_files import COMMON, LATEST
from megatron_retro.convert.rope_settings import warn_of_rounding
from megatron_retro.errors import ConfigError
from megatron_retro.runtime.strict_json import json_text

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# modules of a layer that have an extra state, in core's own layers or in TransformerEngine's
_WITH_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_STRETCHED = ("linear", "interpolated")
_CROSS_WITH_STATE = tuple(f"cross_attention.attn.{name}" for name in ("linear_q", "linear_kv", "linear_proj"))


def export_megatron(source: Path, destination: Path, *, dtype: torch.dtype, decoder_only: bool, merge: bool) -> Path:
    """Write the folder of a run whose one checkpoint is called `release`."""
    stored = open_stored(source, merge=merge)
    model, retro = stored.settings[ModelConfig], stored.settings[RetroConfig]
    retro = RetroConfig() if decoder_only and not retro.retro_core_checkpoint else retro
    if problems := list(core_problems(model, retro)):
        raise ConfigError(
            f"{stored.path} computes what Megatron core does not", got="; ".join(problems), fix="export it otherwise"
        )
    if model.rope_scaling_type == "linear":
        warn_of_rounding(model, "interpolated", "Megatron core")
    with new_directory(destination) as partial:
        folder = partial / "release"
        folder.mkdir()
        _write_tensors(folder, _Tensors(stored, model, retro, dtype))
        content = {"args": core_arguments(model, retro), "checkpoint_version": 3.0, "iteration": 0}
        torch.save(content, folder / COMMON)
        write_file(folder / "metadata.json", json_text(_BACKEND))
        write_file(partial / LATEST, "release")
    return destination


class _Tensors:
    """Core's tensors by name: of which of ours each is made, and its shape."""

    def __init__(self, stored: StoredModel, model: ModelConfig, retro: RetroConfig, dtype: torch.dtype) -> None:
        self.stored, self.dtype, self.num_layers = stored, dtype, model.num_layers
        self.stacked = not retro.retro_add_retriever  # core stacks layers that are alike
        self.reading = retro.retrieval_layers(model.num_layers)
        self.encoder_layers = retro.retro_encoder_layers if self.reading else 0
        self.parts: dict[str, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for ours, shape in parameter_shapes(model, retro).items():
            name, layer = core_name(ours, self.reading), None
            if self.stacked and name.startswith(LAYERS):
                layer, rest = name.removeprefix(LAYERS).split(".", 1)
                name = f"{LAYERS}{rest}"
            self.parts.setdefault(name, []).append(ours)
            self.shapes[name] = _flat(ours, shape) if layer is None else (model.num_layers, *_flat(ours, shape))

    def load(self, name: str) -> Tensor:
        """One of core's tensors, with its layers in order."""
        parts = [self.stored.load(ours).to(self.dtype).reshape(-1) for ours in self.parts[name]]
        return torch.cat(parts).reshape(self.shapes[name])

    def extra_states(self) -> Iterator[str]:
        """Names of the objects that core asks for beside the tensors."""
        for part in _WITH_STATE if self.stacked else ():
            for layer in range(self.num_layers):
                yield f"{LAYERS}{part}._extra_state/shard_{layer}_{self.num_layers}"
        for layer in range(0 if self.stacked else self.num_layers):
            reads = layer + 1 in self.reading
            yield from _of_layer(f"{LAYERS}{layer}.", reads)
            if reads and layer + 1 == min(self.reading):
                for number in range(self.encoder_layers):
                    prefix = f"{LAYERS}{layer}.cross_attention.encoder.layers.{number}."
                    yield from _of_layer(prefix, number == 0)
        yield "decoder.final_layernorm._extra_state/shard_0_1"


def _of_layer(prefix: str, reads: bool) -> Iterator[str]:
    for part in (*_WITH_STATE, *(_CROSS_WITH_STATE if reads else ())):
        yield f"{prefix}{part}._extra_state/shard_0_1"


def _flat(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix has two dimensions there, all else one."""
    if ours.endswith(".weight") and len(shape) > 1:
        return (torch.Size(shape[:-1]).numel(), shape[-1])
    return (torch.Size(shape).numel(),)


def _write_tensors(folder: Path, tensors: _Tensors) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Planner(DefaultSavePlanner):
        """Plans with shapes alone, and loads what is to be written next."""

        def lookup_object(self, index: Any) -> Any:
            name = index.fqn
            return tensors.load(name) if name in tensors.shapes else super().lookup_object(index)

    class Writer(FileSystemWriter):
        """Leaves the folder's path and a random name out of the index."""

        def storage_meta(self) -> None:
            return None

    state: dict[str, Any] = {
        name: torch.empty(shape, dtype=tensors.dtype, device="meta") for name, shape in tensors.shapes.items()
    }
    state |= {name: [None] for name in tensors.extra_states()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(state, storage_writer=Writer(str(folder)), planner=Planner(flatten_state_dict=False), no_dist=True)


def core_problems(model: ModelConfig, retro: RetroConfig) -> Iterator[str]:
    """What of a model core has no setting for."""
    if retro.reads_neighbors() and not retro.retro_core_checkpoint:
        yield "it reads neighbours otherwise than core's Retro (--convert-decoder-only leaves the decoder)"
    if retro.retro_core_checkpoint and retro.retro_gate_type != "fixed":
        yield f"retro_gate_type {retro.retro_gate_type}"
    if model.position_embedding_type not in ("rope", "learned_absolute", "none"):
        yield f"position_embedding_type {model.position_embedding_type}"
    if model.geglu or model.scale_embedding:
        yield "geglu" if model.geglu else "scale_embedding"
    if model.norm_placement != "before":
        yield f"norm_placement {model.norm_placement}"
    if model.qk_norm_scope != "head":
        yield f"qk_norm_scope {model.qk_norm_scope}"
    if model.sliding_window is not None:
        yield f"sliding_window {model.sliding_window}"
    if model.rotary_base_local is not None:
        yield f"rotary_base_local {model.rotary_base_local}"
    if model.no_rope_freq is not None:
        yield f"no_rope_freq {model.no_rope_freq}"
    if model.rope_scaling_type in ("yarn", "dynamic"):
        yield f"rope_scaling_type {model.rope_scaling_type}"
    bounds = (
        model.rope_scaling_low_freq_factor,
        model.rope_scaling_high_freq_factor,
        model.rope_scaling_original_max_positions,
    )
    if model.rope_scaling_type == "llama3" and bounds != (1.0, 4.0, 8192):
        yield f"llama3 scaling with bounds {bounds} (it has 1, 4 and 8192)"
    if model.gelu_tanh and model.disable_bias_linear and not (model.swiglu or model.squared_relu):
        yield "gelu_tanh without biases (it has that form fused with a bias alone)"


def core_arguments(model: ModelConfig, retro: RetroConfig) -> argparse.Namespace:
    """The arguments of a run of Megatron-LM that trains this model."""
    rope, scaled = model.position_embedding_type == "rope", model.rope_scaling_type
    arguments: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_width(),
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_key_value_heads() != model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads(),
        "kv_channels": model.head_size(),
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": rope,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "rotary_interleaved": model.rotary_interleaved,
        "rotary_seq_len_interpolation_factor": model.rope_scaling_factor if scaled in _STRETCHED else None,
        "use_rope_scaling": scaled == "llama3",
        "rope_scaling_factor": model.rope_scaling_factor if scaled == "llama3" else 8.0,
        "normalization": model.normalization,
        "apply_layernorm_1p": model.apply_layernorm_1p,
        "norm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "swiglu": model.swiglu,
        "squared_relu": model.squared_relu,
        "openai_gelu": False,
        "bias_gelu_fusion": model.gelu_tanh,
        "add_bias_linear": not model.disable_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **_retro_arguments(retro),
    }
    return argparse.Namespace(**arguments)


def _retro_arguments(retro: RetroConfig) -> Mapping[str, Any]:
    if not retro.retro_add_retriever:
        return {}
    return {
        "retro_add_retriever": True,
        "retro_chunk_length": retro.retro_chunk_length,
        "retro_num_neighbors": retro.retro_num_neighbors,
        "retro_num_retrieved_chunks": retro.retro_num_retrieved_chunks,
        "retro_encoder_layers": retro.retro_encoder_layers,
    }
