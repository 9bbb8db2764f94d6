"""Sixty configurations of Megatron core: each comes in and computes the same, or is refused; none differs in silence.

Core builds each model that it can, writes it as `torch_dist` and computes logits in float64; `convert` reads the files.
A configuration that core builds on a GPU alone is a checkpoint with that argument. It needs megatron-core 0.15.3 (see
`benchmarks/peers/peer_packages.py`); without it nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import read_parameter
from megatron_retro.convert.megatron_import import import_megatron
from megatron_retro.errors import MegatronRetroError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main
from megatron_retro.testing.core_process import core_without_a_gpu

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import peer_packages

VOCABULARY, LENGTH, CHUNK = 16, 12, 4
EQUAL = 1e-9
Settings = dict[str, Any]
_SHAPE: Settings = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24, "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
_SAME = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "add_bias_linear")
_SAME += ("add_qkv_bias", "qk_layernorm", "normalization", "rotary_interleaved", "num_query_groups")
_GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False}
_ROPE = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
_RETRO = {
    "num_layers": 6, "retro_chunk_length": CHUNK, "retro_num_neighbors": 2, "retro_num_retrieved_chunks": 2,
    "retro_split_preprocessing": "98,2,0",
}  # fmt: skip
# what core computes with: settings of its model (config), keywords of its model (keywords), and arguments (run)
BUILT: dict[str, tuple[Settings, Settings, Settings]] = {
    "GPT": ({}, {}, {}),
    "GPT, fused GELU": ({"bias_activation_fusion": True}, {}, {"bias_gelu_fusion": True}),
    "no biases": ({"add_bias_linear": False}, {}, {}),
    "biases of queries, keys and values": ({"add_bias_linear": False, "add_qkv_bias": True}, {}, {}),
    "gated": (_GATED, {}, {"swiglu": True}),
    "gated with biases": ({**_GATED, "add_bias_linear": True}, {}, {"swiglu": True}),
    "squared ReLU": ({"activation_func": "squared_relu"}, {}, {"squared_relu": True}),
    "RMSNorm": ({"normalization": "RMSNorm"}, {}, {}),
    "RMSNorm, gated, rotary": ({**_GATED, "normalization": "RMSNorm"}, _ROPE, {"swiglu": True}),
    "epsilon": ({"layernorm_epsilon": 1e-3}, {}, {"norm_epsilon": 1e-3}),
    "norms of queries and keys": ({"qk_layernorm": True}, {}, {}),
    "two groups": ({"num_query_groups": 2}, {}, {"group_query_attention": True}),
    "one group": ({"num_query_groups": 1}, _ROPE, {"group_query_attention": True}),
    "wide heads": ({"kv_channels": 8}, {}, {}),
    "one layer": ({"num_layers": 1}, {}, {}),
    "five layers": ({"num_layers": 5}, _ROPE, {}),
    "no positions": ({}, {"position_embedding_type": "none"}, {}),
    "rotary": ({}, _ROPE, {}),
    "rotary, tied": ({}, {**_ROPE, "share_embeddings_and_output_weights": True}, {}),
    "half rotary": ({"kv_channels": 8}, {**_ROPE, "rotary_percent": 0.5}, {}),
    "rotary base": ({}, {**_ROPE, "rotary_base": 500}, {}),
    "rotary in pairs": ({"rotary_interleaved": True}, _ROPE, {}),
    "stretched": ({}, {**_ROPE, "seq_len_interpolation_factor": 4.0}, {}),
    "stretched by 3": ({}, {**_ROPE, "seq_len_interpolation_factor": 3.0}, {}),
    "rescaled": ({"kv_channels": 16}, {**_ROPE, "rope_scaling": True, "rope_scaling_factor": 8.0}, {}),
    "rescaled by 4": ({"kv_channels": 16}, {**_ROPE, "rope_scaling": True, "rope_scaling_factor": 4.0}, {}),
    "untied": ({}, {"share_embeddings_and_output_weights": False}, {}),
    "scaled by layers": ({"apply_query_key_layer_scaling": True}, {}, {"apply_query_key_layer_scaling": True}),
    "softmax in float32": ({"attention_softmax_in_fp32": False}, {}, {"attention_softmax_in_fp32": False}),
    "Retro": (_RETRO, {}, {"retro_add_retriever": True}),
    "Retro, rotary": (_RETRO, _ROPE, {"retro_add_retriever": True}),
    "Retro, no biases": ({**_RETRO, "add_bias_linear": False}, {}, {"retro_add_retriever": True}),
    "Retro, gated": ({**_RETRO, **_GATED}, _ROPE, {"retro_add_retriever": True, "swiglu": True}),
    "Retro, no positions": (_RETRO, {"position_embedding_type": "none"}, {"retro_add_retriever": True}),
    "Retro, one neighbour": ({**_RETRO, "retro_num_neighbors": 1}, {}, {"retro_add_retriever": True}),
    "Retro, one encoder layer": ({**_RETRO, "retro_encoder_num_layers": 1}, {}, {"retro_add_retriever": True}),
    "Retro, no continuation": ({**_RETRO, "retro_num_retrieved_chunks": 1}, {}, {"retro_add_retriever": True}),
    "Retro, nine layers": ({**_RETRO, "num_layers": 9}, {}, {"retro_add_retriever": True}),
}
# arguments of a run whose model core builds otherwise, or not on a CPU
CLAIMED: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": True,
    "openai_gelu": True,
    "quick_geglu": True,
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "softmax_type": "learnable",
    "window_size": (4, 0),
    "window_attn_skip_freq": 2,
    "no_rope_freq": 2,
    "multi_latent_attention": True,
    "qk_l2_norm": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
    "num_experts": 4,
    "mtp_num_layers": 1,
    "heterogeneous_layers_config_path": "blocks.json",
    "hybrid_override_pattern": "M*M*",
    "is_hybrid_model": True,
    "use_kitchen": True,
    "spec": ["my", "layers"],
    "position_embedding_type": "yarn",
    "an_argument_of_tomorrow": 1,
}


def main_core() -> Any:
    """Core as one process without a GPU."""
    core_without_a_gpu()
    from megatron.core import dist_checkpointing

    return dist_checkpointing


def core_model(config: Settings, keywords: Settings) -> Any:
    """A model of core with random weights."""
    import os

    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.retro import RetroConfig as CoreRetroConfig
    from megatron.core.models.retro import RetroModel, get_retro_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    for backend in ("FLASH", "FUSED", "UNFUSED"):  # core writes them, and is surprised to find them
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    settings = {**_SHAPE, "bias_activation_fusion": False, **config, "use_cpu_initialization": True}
    if settings.get("activation_func") == "squared_relu":
        settings["activation_func"] = squared_relu
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH, **keywords}
    if "retro_chunk_length" in settings:
        retro = CoreRetroConfig(**settings)
        model: Any = RetroModel(retro, get_retro_decoder_block_spec(retro, False), **sizes)
    else:
        gpt = TransformerConfig(**settings)
        spec = get_gpt_layer_local_spec(normalization=gpt.normalization, qk_layernorm=bool(gpt.qk_layernorm))
        model = GPTModel(gpt, spec, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def run_arguments(config: Settings, keywords: Settings, run: Settings) -> argparse.Namespace:
    """What Megatron-LM would keep of a run that trains this model."""
    found: Settings = {**_SHAPE, **{name: config[name] for name in _SAME if name in config}}
    found |= {name: value for name, value in config.items() if name.startswith("retro_") and "split" not in name}
    found |= {"bias_gelu_fusion": False, "max_position_embeddings": LENGTH}
    found["position_embedding_type"] = keywords.get("position_embedding_type", "learned_absolute")
    tied = keywords.get("share_embeddings_and_output_weights", False)
    found["untie_embeddings_and_output_weights"] = not tied
    for theirs, ours in (("rotary_percent", "rotary_percent"), ("rotary_base", "rotary_base")):
        if theirs in keywords:
            found[ours] = keywords[theirs]
    found["rotary_seq_len_interpolation_factor"] = keywords.get("seq_len_interpolation_factor")
    found["use_rope_scaling"] = keywords.get("rope_scaling", False)
    found["rope_scaling_factor"] = keywords.get("rope_scaling_factor", 8.0)
    return argparse.Namespace(**{**found, **run})


@torch.no_grad()
def difference(model: Any, run: Path) -> float:
    """The largest difference of logits in float64, for tokens of whole chunks and with a short one."""
    checkpoint = open_checkpoint(run)
    settings = stored_settings(checkpoint)
    ours = Retro(settings[ModelConfig], settings[RetroConfig]).double().eval()
    for name, parameter in ours.named_parameters():
        parameter.copy_(read_parameter(checkpoint, name))
    retro, generator, worst = settings[RetroConfig], torch.Generator().manual_seed(1), 0.0
    for length in (LENGTH, LENGTH - 3):
        tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)
        more: Settings = {}
        neighbors: Neighbors[Tensor] | None = None
        if retro.retro_add_retriever:
            shape = (-(-length // CHUNK), retro.retro_num_neighbors, retro.retrieved_length())
            found = torch.randint(0, VOCABULARY, shape, generator=generator)
            positions = torch.arange(shape[-1]).expand(shape[0] * shape[1], -1)
            more = {"context_input_ids": found.flatten(0, 1), "context_position_ids": positions}
            neighbors = Neighbors(found[None], torch.ones(1, *shape, dtype=torch.bool))
        mask = torch.ones(1, 1, length, length).triu(1).bool()
        expected = model.double()(tokens, torch.arange(length)[None], mask, **more)
        worst = max(worst, float((ours(tokens, neighbors) - expected).abs().max()))
    return worst


def outcomes(count: int) -> Iterator[tuple[str, str, float]]:
    """Each configuration: its name, whether it is equal, refused or silently different, and by how much."""
    checkpointing = main_core()
    rows = [(name, *row) for name, row in BUILT.items()]
    rows += [(f"{name}={value!r}", {}, {}, {name: value}) for name, value in CLAIMED.items()]
    for name, config, keywords, run in rows[:count]:
        keywords = {"share_embeddings_and_output_weights": True, **keywords}
        with tempfile.TemporaryDirectory() as room:
            folder = Path(room) / "theirs"
            folder.mkdir()
            model = core_model(config, keywords)
            content = {"args": run_arguments(config, keywords, run), "checkpoint_version": 3.0, "iteration": 1}
            checkpointing.save({**content, **model.sharded_state_dict()}, str(folder))
            try:
                import_megatron(folder, Path(room) / "ours", TokenizerConfig(), lambda text: None)
            except MegatronRetroError:
                yield name, "refused", 0.0
                continue
            worst = difference(model, Path(room) / "ours")
            yield name, "equal" if worst <= EQUAL and name in BUILT else "silently different", worst


def run(quick: bool) -> Iterator[Figure]:
    """How many of them come in, are refused, and differ."""
    if reason := peer_packages.missing("megatron-core"):
        say(reason)
        return
    counts: Counter[str] = Counter()
    largest = 0.0
    for name, outcome, worst in outcomes(10 if quick else 60):
        counts[outcome] += 1
        largest = max(largest, worst)
        if outcome == "silently different" or (outcome == "refused" and name in BUILT):
            print(f"{name}: {outcome}, {worst:.1e}", flush=True)
    yield Figure("configurations tried", sum(counts.values()), "")
    yield Figure("come in with equal logits", counts["equal"], "")
    yield Figure("are refused by name", counts["refused"], "")
    yield Figure("differ in silence", counts["silently different"], "", 0, LOWER)
    yield Figure("largest difference of logits, float64", largest, "", EQUAL, LOWER)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
