"""The two Retro models of the package index as training steps on a CPU, for comparison.

Neither is a dependency. Install them apart, and name the folder in MEGATRON_RETRO_PEERS:

    pip install --no-deps --target PEERS retro-pytorch==0.3.9 einops megatron-core==0.11.0
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], float]


def peers_folder() -> str | None:
    """Where the peers are, put on the path; None without them."""
    folder = os.environ.get("MEGATRON_RETRO_PEERS")
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    return folder


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


def megatron_core(sizes: dict[str, int], tokens: Tensor, neighbors: Tensor) -> tuple[nn.Module, Step]:
    """megatron-core 0.11's Retro on one CPU process: learned positions, LayerNorm, GELU, local layers."""
    import megatron.core.utils as core_utils
    from packaging.version import Version

    core_utils._te_version = Version("1.2")
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    from megatron.core import parallel_state
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from megatron.core.tensor_parallel import random

    class NoTracker:
        def fork(self, *_: Any) -> Any:
            return contextlib.nullcontext()

    tracker = NoTracker()
    for module in [random, *(m for name, m in sys.modules.items() if name.startswith("megatron.core"))]:
        if hasattr(module, "get_cuda_rng_tracker"):
            module.get_cuda_rng_tracker = lambda: tracker
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    config = RetroConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["width"],
        num_attention_heads=sizes["heads"],
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        retro_chunk_length=sizes["chunk"],
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        retro_num_neighbors=sizes["neighbors"],
        retro_num_retrieved_chunks=sizes["retrieved"] // sizes["chunk"],
        retro_split_preprocessing="98,2,0",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )
    model = RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=sizes["vocabulary"],
        max_sequence_length=sizes["length"],
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    )
    arguments = _megatron_arguments(sizes["length"], tokens, neighbors)
    return model, training_step(model, lambda: model(**arguments).mean())


def _megatron_arguments(length: int, tokens: Tensor, neighbors: Tensor) -> dict[str, Tensor]:
    flat = neighbors.flatten(0, 2)  # [k * chunks, r], neighbours of a chunk together
    return {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(length)[None],
        "attention_mask": torch.ones(1, 1, length, length).triu(1).bool(),
        "labels": tokens[:, 1:],
        "context_input_ids": flat,
        "context_position_ids": torch.arange(flat.shape[1])[None].expand(len(flat), -1),
        "context_mask": torch.zeros(len(flat), 1, 1, 1).bool(),
    }
