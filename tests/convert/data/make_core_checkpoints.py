"""Writes core_checkpoints.tar.xz: small models as megatron-core 0.15.3 saves them, and what they compute.

    pip install --no-deps megatron-core==0.15.3 && python make_core_checkpoints.py OUTPUT_FOLDER

Each model is written by one process (`torch_dist`), then read by core itself in processes of a cut and written by these
again: as `torch_dist`, and as `mp_rank_XX_YYY`. It needs no GPU: the places that ask for one are given something else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

VOCABULARY, LENGTH, CHUNK, NEIGHBORS = 16, 12, 4, 2
SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
LLAMA = {
    "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False, "num_query_groups": 2, "bias_activation_fusion": False, "qk_layernorm": True,
    "ffn_hidden_size": 12,
}  # fmt: skip
LLAMA_RUN = {
    "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "group_query_attention": True,
    "num_query_groups": 2, "qk_layernorm": True, "ffn_hidden_size": 12, "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True, "rotary_base": 500,
}  # fmt: skip
QWEN = {**LLAMA, "qk_layernorm": False, "add_qkv_bias": True}
QWEN_RUN = {**LLAMA_RUN, "qk_layernorm": False, "add_qkv_bias": True, "bf16": True, "vocab_size": 13}
GPT = {"bias_activation_fusion": True, "ffn_hidden_size": 16}
GPT_RUN = {"ffn_hidden_size": 16, "position_embedding_type": "learned_absolute", "bias_gelu_fusion": True}
RETRO = {
    "num_layers": 9, "retro_chunk_length": CHUNK, "retro_num_neighbors": NEIGHBORS, "retro_num_retrieved_chunks": 2,
    "retro_encoder_hidden_dropout": 0.0, "retro_encoder_attention_dropout": 0.0, "retro_split_preprocessing": "98,2,0",
}  # fmt: skip
RETRO_RUN = {
    "num_layers": 9, "retro_add_retriever": True, "retro_chunk_length": CHUNK, "retro_num_neighbors": NEIGHBORS,
    "retro_num_retrieved_chunks": 2, "retro_encoder_layers": 2,
}  # fmt: skip
ROPE = {"position_embedding_type": "rope", "rotary_base": 500, "share_embeddings_and_output_weights": False}
LEARNED = {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True}
GATED_RETRO = {name: value for name, value in LLAMA.items() if name not in ("num_query_groups", "qk_layernorm")}
GATED_RUN = {**LLAMA_RUN, "group_query_attention": False, "num_query_groups": None, "qk_layernorm": False}
# of each model: settings of core, arguments of the run, keywords of the model, cuts (tensor, pipeline)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "llama": (LLAMA, LLAMA_RUN, ROPE, ((2, 2),)),
    "gpt": (GPT, GPT_RUN, LEARNED, ((2, 2), (2, 1), (1, 2))),
    "qwen": (QWEN, QWEN_RUN, ROPE, ((2, 1),)),
    "retro": ({**GPT, **RETRO}, {**GPT_RUN, **RETRO_RUN}, LEARNED, ((2, 1),)),
    "retro_rope": ({**GATED_RETRO, **RETRO}, {**GATED_RUN, **RETRO_RUN}, ROPE, ((2, 1),)),
}


def build(name: str, tensor: int, pipeline: int, stage: int) -> tuple[Any, argparse.Namespace]:
    """This rank's part of a model, and the arguments of its run."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    changes, run, keywords, _ = MODELS[name]
    cut = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    settings = {**SHAPE, **changes, **cut, "use_cpu_initialization": True, "pipeline_dtype": torch.float32}
    ends = {"pre_process": stage == 0, "post_process": stage == pipeline - 1}
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH}
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # core writes them, and is surprised to find them
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    if "retro_chunk_length" in changes:
        config: Any = RetroConfig(**settings)
        model: Any = RetroModel(config, get_retro_decoder_block_spec(config, False), **sizes, **ends, **keywords)
    else:
        config = TransformerConfig(**settings)
        spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=bool(config.qk_layernorm))
        model = GPTModel(config, spec, **sizes, **ends, **keywords)
    if run.get("bf16"):
        model = model.bfloat16()
    arguments = argparse.Namespace(**{**SHAPE, **run, **cut}, max_position_embeddings=LENGTH)
    arguments.padded_vocab_size = VOCABULARY
    return model.eval(), arguments


def whole(name: str, output: Path) -> None:
    """One model with random weights, its checkpoint of iteration 5 and its logits."""
    from megatron.core import dist_checkpointing

    model, arguments = build(name, 1, 1, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = iteration_folder(output / name)
    content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 5, **model.sharded_state_dict()}
    dist_checkpointing.save(content, str(folder))
    torch.save(expected(model.double(), name.startswith("retro"), generator), output / name / "expected.pt")


@torch.no_grad()
def expected(model: Any, reads: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tokens, neighbours where there are any, and logits; of a Retro also for a text with a short first chunk."""
    found = {}
    for suffix, length in (("", LENGTH), ("_short", LENGTH - 3)):
        tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)
        mask = torch.ones(1, 1, length, length).triu(1).bool()
        more: dict[str, Any] = {}
        if reads:
            shape = (-(-length // CHUNK), NEIGHBORS, 2 * CHUNK)
            neighbors = torch.randint(0, VOCABULARY, shape, generator=generator)
            found[f"neighbors{suffix}"] = neighbors
            positions = torch.arange(2 * CHUNK).expand(shape[0] * NEIGHBORS, -1)
            more = {"context_input_ids": neighbors.flatten(0, 1), "context_position_ids": positions}
        found[f"tokens{suffix}"] = tokens
        found[f"logits{suffix}"] = model(tokens, torch.arange(length)[None], mask, **more)
    return found


def cut(name: str, tensor: int, pipeline: int, output: Path) -> None:
    """The same model, read by the ranks of a cut, and written by them in both formats."""
    from megatron.core import dist_checkpointing, parallel_state

    stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    model, arguments = build(name, tensor, pipeline, stage)
    source = output / name / "iter_0000005"
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(source)), strict=False)
    kept = {"args": arguments, "checkpoint_version": 3.0, "iteration": 5}
    folder = iteration_folder(output / f"{name}_{tensor}_{pipeline}")
    torch.distributed.barrier()
    dist_checkpointing.save({**kept, **model.sharded_state_dict()}, str(folder))
    place = iteration_folder(output / f"{name}_{tensor}_{pipeline}_torch")
    place /= f"mp_rank_{rank:02}_{stage:03}" if pipeline > 1 else f"mp_rank_{rank:02}"
    place.mkdir()
    states = {"optimizer": {"step": 5}, "rng_state": [None]}
    torch.save({**kept, "model": model.state_dict_for_save_checkpoint(), **states}, place / "model_optim_rng.pt")


def iteration_folder(run: Path, iteration: int = 5) -> Path:
    """The folder of an iteration of a run, the latest."""
    folder = run / f"iter_{iteration:07}"
    folder.mkdir(parents=True, exist_ok=True)
    (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def work(rank: int, names: Sequence[str], tensor: int, pipeline: int, output: Path) -> None:
    """One process of a cut (1, 1: the whole models)."""
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]  # core asks without a GPU too
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]  # core asks without a GPU too
    size = tensor * pipeline
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT="29547")
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state, utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from packaging.version import Version

    utils._te_version = Version("1.2")  # its Retro asks for the version of what is not there
    CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # type: ignore[method-assign]  # nothing is dropped
    parallel_state.initialize_model_parallel(tensor, pipeline)
    for name in names:
        if size == 1:
            whole(name, output)
        else:
            cut(name, tensor, pipeline, output)
    torch.distributed.destroy_process_group()


def main(output: Path) -> None:
    """All models, whole and cut, packed."""
    start_processes(work, (list(MODELS), 1, 1, output), nprocs=1)
    for tensor, pipeline in sorted({each for *_, cuts in MODELS.values() for each in cuts}):
        names = [name for name, (*_, cuts) in MODELS.items() if (tensor, pipeline) in cuts]
        start_processes(work, (names, tensor, pipeline, output), nprocs=tensor * pipeline)
    with tarfile.open(output / "core_checkpoints.tar.xz", "w:xz") as archive:
        for folder in sorted(path for path in output.iterdir() if path.is_dir()):
            archive.add(folder, folder.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
