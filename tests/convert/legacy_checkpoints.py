"""Small checkpoints as Megatron-LM's older code writes them, whole and cut over tensor, pipeline and virtual ranks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEADS, HIDDEN, FFN, VOCABULARY, CHUNK, POSITIONS = 4, 32, 24, 48, 4, 64
ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "group_query_attention": False,
    "num_query_groups": None,
    "kv_channels": HIDDEN // HEADS,
    "max_position_embeddings": POSITIONS,
    "use_rotary_position_embeddings": True,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": None,
    "normalization": "LayerNorm",
    "apply_layernorm_1p": True,
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "squared_relu": False,
    "openai_gelu": False,
    "bias_gelu_fusion": False,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "retro_gpt_chunk_length": CHUNK,
    "retro_num_neighbors": 2,
    "retro_num_retrieved_chunks": 2,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
}
LAYER = "language_model.encoder.layers"
_WORDS = "language_model.embedding.word_embeddings.weight"


def whole_tensors(reading: tuple[int, ...] = (1, 3), **changes: Any) -> dict[str, Tensor]:
    """A GPT, or a Retro that reads in the given layers (numbered from 0), as Megatron names it, before the cut."""
    arguments = {**ARGUMENTS, **changes}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = random(HIDDEN)
        if arguments["normalization"] == "LayerNorm":
            tensors[f"{name}.bias"] = random(HIDDEN)

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = random(rows, columns)
        if arguments["add_bias_linear"]:
            tensors[f"{name}.bias"] = random(rows)

    def block(name: str, reads: bool) -> None:
        norm(f"{name}.input_norm")
        norm(f"{name}.post_attention_norm")
        groups = arguments["num_query_groups"] or HEADS
        linear(f"{name}.self_attention.query_key_value", HIDDEN + 2 * groups * HIDDEN // HEADS, HIDDEN)
        linear(f"{name}.self_attention.dense", HIDDEN, HIDDEN)
        if reads:
            norm(f"{name}.post_inter_attention_norm")
            tensors[f"{name}.inter_attention.query.weight"] = random(HIDDEN, HIDDEN)
            tensors[f"{name}.inter_attention.key_value.weight"] = random(2 * HIDDEN, HIDDEN)
            tensors[f"{name}.inter_attention.dense.weight"] = random(HIDDEN, HIDDEN)
        linear(f"{name}.mlp.dense_h_to_4h", 2 * FFN if arguments["swiglu"] else FFN, HIDDEN)
        linear(f"{name}.mlp.dense_4h_to_h", HIDDEN, FFN)

    tensors[_WORDS] = random(VOCABULARY, HIDDEN)
    if arguments["untie_embeddings_and_output_weights"]:
        tensors["language_model.output_layer.weight"] = random(VOCABULARY, HIDDEN)
    if arguments["position_embedding_type"] == "learned_absolute":
        tensors["language_model.embedding.position_embeddings.weight"] = random(POSITIONS, HIDDEN)
    for index in range(arguments["num_layers"]):
        block(f"{LAYER}.{index}", index in reading)
    for index in range(2 if reading else 0):
        block(f"{LAYER}.{reading[0]}.retriever.layers.{index}", index == 0)
    norm("language_model.encoder.final_norm")
    return tensors


def cut(name: str, tensor: Tensor, ranks: int, *, gated: bool) -> list[Tensor]:
    """How Megatron's column and row parallel layers share a tensor."""
    if "dense_h_to_4h" in name and gated:
        gate, up = tensor.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return list(tensor.chunk(ranks, 1))
    if "norm" in name or "position_embeddings" in name or name.endswith(("dense.bias", "dense_4h_to_h.bias")):
        return [tensor] * ranks
    return list(tensor.chunk(ranks))


def nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """As the older code saves: dictionaries down to `encoder`, flat names below."""
    model: dict[str, Any] = {"encoder": {}}
    for name, tensor in flat.items():
        rest = name.removeprefix("language_model.")
        if rest.startswith("encoder."):
            model["encoder"][rest.removeprefix("encoder.")] = tensor.clone()
        else:
            *parents, last = rest.split(".")
            place = model
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = tensor.clone()
    return {"language_model": model}


def part(flat: Mapping[str, Tensor], layers: range, *, first: bool, last: bool) -> dict[str, Any]:
    """What one stage holds, its layers numbered from 0; the last one repeats tied embeddings."""
    held: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        if match := re.match(re.escape(f"{LAYER}.") + r"(\d+)\.(.*)", name):
            if int(match[1]) in layers:
                held[f"{LAYER}.{int(match[1]) - layers.start}.{match[2]}"] = tensor
        elif first if ".embedding." in name else last:
            held[name] = tensor
    model = nested(held)
    if last and not first and "language_model.output_layer.weight" not in flat:
        model["word_embeddings_for_head"] = {"weight": flat[_WORDS].clone()}
    return model


def lists(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of Adam after 10 steps: parameters without decay are a group, the others another one."""
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = [{"wd_mult": decay, "params": []} for decay in (1.0, 0.0)]
    leaves = [tensor for tree in parts for tensor in in_order(tree)]
    for group in groups:
        for tensor in leaves:
            if (tensor.ndim > 1) == bool(group["wd_mult"]):
                group["params"].append(len(state))
                state[len(state)] = {"step": 10, "exp_avg": tensor * 2, "exp_avg_sq": tensor * tensor}
    return {"optimizer": {"state": state, "param_groups": groups}, "grad_scaler": {"scale": torch.tensor([512.0])}}


def in_order(tree: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of nested dictionaries."""
    for value in tree.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from in_order(value)


def written(
    folder: Path,
    ranks: int = 2,
    stages: int = 1,
    chunks: int = 1,
    tensors: Mapping[str, Tensor] | None = None,
    trained: bool = False,
    **changes: Any,
) -> Path:
    """A run's folder. With several chunks the stages hold layers in turn, `model0` of each before `model1`.

    One that was trained has moments: twice each weight, and its square.
    """
    cuts = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    arguments = {**ARGUMENTS, **cuts, **changes}
    tensors, gated = tensors or whole_tensors(), bool(arguments["swiglu"])
    shards = {name: cut(name, tensor, ranks, gated=gated) for name, tensor in tensors.items()}
    each = len({name.split(".")[3] for name in tensors if name.startswith(LAYER)}) // (stages * chunks)
    for rank in range(ranks):
        flat = {name: parts[rank] for name, parts in shards.items()}
        for stage in range(stages):
            content = {
                "args": argparse.Namespace(**arguments),
                "checkpoint_version": 3.0,
                "iteration": 10,
                "optimizer": {"state": {0: torch.ones(3)}},
                "rng_state": [{"np_rng_state": np.random.RandomState(1).get_state()}],
            }
            for chunk in range(chunks):
                place = chunk * stages + stage
                layers = range(place * each, (place + 1) * each)
                held = part(flat, layers, first=place == 0, last=place == stages * chunks - 1)
                content[f"model{chunk}" if chunks > 1 else "model"] = held
            if trained:
                content["optimizer"] = lists([content[key] for key in content if key.startswith("model")])
            name = f"mp_rank_{rank:02}" if stages == 1 else f"mp_rank_{rank:02}_{stage:03}"
            (folder / "iter_0000010" / name).mkdir(parents=True)
            torch.save(content, folder / "iter_0000010" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    return folder
