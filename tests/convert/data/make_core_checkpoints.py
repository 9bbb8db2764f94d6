"""Writes core_gpt.tar.xz: two small GPTs as megatron-core 0.15.3 saves them (`torch_dist`), and what they compute.

    pip install --no-deps megatron-core==0.15.3 && python make_core_checkpoints.py OUTPUT_FOLDER

It needs no GPU: the three places that ask for one are given something else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
VOCABULARY, LENGTH = 16, 12
LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "bias_activation_fusion": False,
    "qk_layernorm": True,
    "ffn_hidden_size": 12,
}
GPT = {"bias_activation_fusion": True, "ffn_hidden_size": 16}


def write_model(folder: Path, changes: dict[str, Any], arguments: dict[str, Any], **model_settings: Any) -> None:
    """One model with random weights, its checkpoint of iteration 5 and its logits."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**{**SHAPE, **changes}, use_cpu_initialization=True)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=bool(config.qk_layernorm))
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, **model_settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    iteration = folder / "iter_0000005"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    run = argparse.Namespace(**{**SHAPE, **arguments}, max_position_embeddings=LENGTH)
    content = {"args": run, "checkpoint_version": 3.0, "iteration": 5, **model.sharded_state_dict()}
    dist_checkpointing.save(content, str(iteration))
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    with torch.no_grad():
        logits = model.double()(tokens, torch.arange(LENGTH)[None], mask)
    torch.save({"tokens": tokens, "logits": logits}, folder / "expected.pt")


def main(output: Path) -> None:
    """Both models, packed."""
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29547")
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # type: ignore[method-assign]
    parallel_state.initialize_model_parallel(1, 1)
    llama = {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "group_query_attention": True,
        "num_query_groups": 2, "qk_layernorm": True, "ffn_hidden_size": 12, "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True, "rotary_base": 500,
    }  # fmt: skip
    write_model(
        output / "llama", LLAMA, llama, position_embedding_type="rope", rotary_base=500,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    gpt = {"ffn_hidden_size": 16, "position_embedding_type": "learned_absolute", "bias_gelu_fusion": True}
    write_model(
        output / "gpt", GPT, gpt, position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True
    )
    with tarfile.open(output / "core_gpt.tar.xz", "w:xz") as archive:
        for name in ("llama", "gpt"):
            archive.add(output / name, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
