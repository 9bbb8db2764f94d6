"""Lets Megatron core read a `torch_dist` checkpoint and compute: the tests run it beside a megatron-core, in a process.

    python core_loads.py FOLDER ...

Each folder is a run with `release/` and a `given.pt` of tokens and neighbours. Core's model is built from the run's
arguments alone, as Megatron-LM builds it (`core_transformer_config_from_args`); its logits in float64 go to
`computed.pt`, with the keys that core asked for in vain and those that it did not ask for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.testing.core_process import core_without_a_gpu


def settings_of(arguments: argparse.Namespace, fields: set[str]) -> dict[str, Any]:
    """Settings of core by Megatron-LM's rules: arguments of the same name, and a few that have another one."""
    settings = {name: value for name, value in vars(arguments).items() if name in fields}
    settings |= {
        "layernorm_epsilon": arguments.norm_epsilon,
        "layernorm_zero_centered_gamma": arguments.apply_layernorm_1p,
        "bias_activation_fusion": arguments.bias_gelu_fusion,
        "num_query_groups": arguments.num_query_groups if arguments.group_query_attention else None,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if arguments.swiglu:
        settings |= {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True}
        settings["bias_activation_fusion"] = False  # a product of a GPU
    if arguments.squared_relu:
        from megatron.core.activations import squared_relu

        settings["activation_func"] = squared_relu
    return settings


def build(arguments: argparse.Namespace) -> Any:
    """The model of a run's arguments."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    for backend in ("FLASH", "FUSED", "UNFUSED"):  # core writes them, and is surprised to find them
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    keywords = {
        "vocab_size": arguments.padded_vocab_size,
        "max_sequence_length": arguments.max_position_embeddings,
        "share_embeddings_and_output_weights": not arguments.untie_embeddings_and_output_weights,
        "position_embedding_type": arguments.position_embedding_type,
        "rotary_percent": arguments.rotary_percent,
        "rotary_base": arguments.rotary_base,
        "seq_len_interpolation_factor": arguments.rotary_seq_len_interpolation_factor,
        "rope_scaling": arguments.use_rope_scaling,
        "rope_scaling_factor": arguments.rope_scaling_factor,
    }
    kind = RetroConfig if getattr(arguments, "retro_add_retriever", False) else TransformerConfig
    settings = settings_of(arguments, {field.name for field in dataclasses.fields(kind)})
    if kind is RetroConfig:
        settings |= {"retro_encoder_num_layers": arguments.retro_encoder_layers, "retro_split_preprocessing": "98,2,0"}
        settings |= {"retro_encoder_hidden_dropout": 0.0, "retro_encoder_attention_dropout": 0.0}
        config = RetroConfig(**settings)
        return RetroModel(config, get_retro_decoder_block_spec(config, False), **keywords)
    gpt = TransformerConfig(**settings)
    spec = get_gpt_layer_local_spec(normalization=gpt.normalization, qk_layernorm=bool(gpt.qk_layernorm))
    return GPTModel(gpt, spec, **keywords)


def loaded(model: Any, folder: Path) -> dict[str, Any]:
    """Read every tensor that core asks for; what is absent, and what nobody asked for."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # what is not read shows
    # core calls "missing" what it was not asked for
    states, unasked, absent = dist_checkpointing.load(
        model.sharded_state_dict(), str(folder), strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(states, strict=False)
    return {"absent": sorted(absent), "unasked": sorted(unasked)}


@torch.no_grad()
def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """In float64."""
    tokens, more = given["tokens"], {}
    length = tokens.shape[1]
    if "neighbors" in given:
        flat = given["neighbors"].flatten(0, 1)
        more = {"context_input_ids": flat, "context_position_ids": torch.arange(flat.shape[1]).expand_as(flat)}
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    found: Tensor = model.double().eval()(tokens, torch.arange(length)[None], mask, **more)
    return found


def main(folders: list[Path]) -> None:
    """Every folder in turn."""
    core_without_a_gpu()
    for folder in folders:
        arguments = torch.load(folder / "release" / "common.pt", weights_only=False)["args"]
        model = build(arguments)
        found = loaded(model, folder / "release")
        found["logits"] = logits(model, torch.load(folder / "given.pt"))
        torch.save(found, folder / "computed.pt")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
