"""The two Retro models of the package index, and core's GPT, as training steps on a CPU (see `peer_packages.py`)."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_retro.testing.core_process import core_without_a_gpu

Step = Callable[[], float]


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward and backward; gives the loss."""

    def step() -> float:
        value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)
        return value.item()

    return step


def retro_pytorch(sizes: dict[str, int], tokens: Tensor, neighbors: Tensor) -> tuple[nn.Module, Step]:
    """`retro-pytorch`: rotary positions, RMSNorm, GELU."""
    sys.modules.setdefault("autofaiss", _stub("autofaiss", build_index=None))
    from retro_pytorch import RETRO

    model = RETRO(
        num_tokens=sizes["vocabulary"],
        max_seq_len=sizes["length"],
        enc_dim=sizes["width"],
        enc_depth=2,
        enc_cross_attn_layers=(1,),
        dec_dim=sizes["width"],
        dec_depth=sizes["layers"],
        dec_cross_attn_layers=(sizes["retrieval_layer"],),
        heads=sizes["heads"],
        dim_head=sizes["width"] // sizes["heads"],
        chunk_size=sizes["chunk"],
        pad_id=sizes["vocabulary"],
    )
    return model, training_step(model, lambda: model(tokens, retrieved=neighbors, return_loss=True))


def _stub(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    return module


def megatron_core(
    sizes: dict[str, int], tokens: Tensor, neighbors: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Step]:
    """megatron-core 0.15.3's Retro on one CPU process: learned positions, LayerNorm, GELU, local layers."""
    core_without_a_gpu()
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec

    config = RetroConfig(
        **_core_settings(sizes, dtype),
        retro_chunk_length=sizes["chunk"],
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        retro_num_neighbors=sizes["neighbors"],
        retro_num_retrieved_chunks=sizes["retrieved"] // sizes["chunk"],
        retro_split_preprocessing="98,2,0",
    )
    model = RetroModel(config, get_retro_decoder_block_spec(config, False), **_core_model(sizes)).to(dtype)
    flat = neighbors.flatten(0, 2)  # [k * chunks, r], neighbours of a chunk together
    arguments = {
        **_core_inputs(sizes["length"], tokens),
        "context_input_ids": flat,
        "context_position_ids": torch.arange(flat.shape[1])[None].expand(len(flat), -1),
        "context_mask": torch.zeros(len(flat), 1, 1, 1).bool(),
    }
    return model, training_step(model, lambda: model(**arguments).mean())


def megatron_core_gpt(
    sizes: dict[str, int], tokens: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Step]:
    """The same sizes without retrieval."""
    core_without_a_gpu()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**_core_settings(sizes, dtype))
    model = GPTModel(config, get_gpt_layer_local_spec(), **_core_model(sizes)).to(dtype)
    arguments = _core_inputs(sizes["length"], tokens)
    return model, training_step(model, lambda: model(**arguments).mean())


def _core_settings(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # core writes them, and is surprised to find them
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    return {
        "num_layers": sizes["layers"],
        "hidden_size": sizes["width"],
        "num_attention_heads": sizes["heads"],
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
    }


def _core_model(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": sizes["vocabulary"],
        "max_sequence_length": sizes["length"],
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
    }


def _core_inputs(length: int, tokens: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(length)[None],
        "attention_mask": torch.ones(1, 1, length, length).triu(1).bool(),
        "labels": tokens[:, 1:],
    }
