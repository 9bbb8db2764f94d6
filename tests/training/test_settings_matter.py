"""A setting that promises to change what is computed does, and one that promises not to does not, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.testing.processes import exit_code_of
from megatron_retro.testing.tiny_corpus import CHUNK, TinyCorpus, stored_tensors
from megatron_retro.training.program import pretrain

BASE: dict[str, Any] = {"seq_length": 3 * CHUNK, "train_iters": 2, "eval_iters": 0}  # documents are 8 chunks long
ADAPTIVE = {"retro_gate_type": "adaptive"}
DECAYS = {"train_iters": 3, "lr_decay_style": "cosine"}
DECAYS_AT_LAST = {"train_iters": 3, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}
MATTERS: tuple[dict[str, Any], ...] = (
    {"sliding_window": 8},
    {"sliding_window": 8, "full_attention_layers": [2]},
    {"sliding_window": 8, "rotary_base_local": 100.0},
    {"normalization": "RMSNorm"},
    {"apply_layernorm_1p": True},
    {"norm_epsilon": 1e-2},
    {"norm_placement": "after"},
    {"qk_layernorm": True},
    {"swiglu": True},
    {"squared_relu": True},
    {"gelu_tanh": True},
    {"disable_bias_linear": True},
    {"untie_embeddings_and_output_weights": True},
    {"hidden_dropout": 0.1},
    {"attention_dropout": 0.1},
    {"init_method_std": 0.05},
    {"rotary_percent": 0.5},
    {"rotary_base": 100.0},
    {"rotary_interleaved": True},
    {"no_rope_freq": 2},
    {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    {"rope_scaling_type": "yarn", "rope_scaling_factor": 8.0, "rope_scaling_original_max_positions": 64},
    {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_scaling_original_max_positions": 32},
    {"position_embedding_type": "learned_absolute"},
    {"position_embedding_type": "relative"},
    {"position_embedding_type": "none"},
    {"group_query_attention": True, "num_query_groups": 2},
    {"kv_channels": 16},
    {"ffn_hidden_size": 64},
    {"retro_num_neighbors": 1},
    {"retro_num_retrieved_chunks": 1},
    {"retro_layers": [2]},
    {"retro_encoder_layers": 1},
    {"retro_encoder_hidden_size": 16, "retro_encoder_own_embedding": True},
    {"retro_encoder_num_attention_heads": 2},
    {"retro_encoder_kv_channels": 16},
    {"retro_encoder_ffn_hidden_size": 64},
    {"retro_encoder_own_embedding": True},
    {"retro_encoder_hidden_dropout": 0.1},
    {"retro_encoder_attention_dropout": 0.1},
    {"retro_neighbor_positions": "none"},
    {"retro_neighbor_positions": "relative"},
    {"retro_neighbor_positions": "continued"},
    {"retro_encoder_causal": True},
    {"retro_encoder_final_norm": True},
    {"retro_encoder_reads": "same-depth"},
    {"retro_gate_type": "scalar"},
    {"retro_gate_type": "heads"},
    {"retro_gate_type": "adaptive"},
    {"retro_attention_gate": 0.5},
    {"retro_no_retrieval_probability": 0.5},
    {"retro_random_retrieval_probability": 0.5},
    {"retro_zero_init_output": True},
    {"retro_legacy_checkpoint": True},
    {"retro_core_checkpoint": True},
    {"reset_position_ids": True},
    {"reset_attention_mask": True},
    {"eod_mask_loss": True},
    {"database_keep_fraction": 0.3},
    {"database_keep_fraction": 0.3, "database_keep_by": "chunk"},
    {"database_corpus_fractions": [0.3]},
    {"neighbor_random_share": 0.5},
    {"neighbor_absent_share": 0.5},
    {"split": "50,50,0"},
    {"seed": 7},
    {"freeze_decoder": True},
    {"freeze_encoder": True},
    {"lr_warmup_samples": 8},
    {"lr_warmup_iters": 2},
    {"weight_decay": 1.0},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.5},
    {"adam_eps": 1e-2},
    {"clip_grad": 0.01},
    {"lr_scale_decoder": 0.5},
    {"lr_scale_encoder": 0.5},
    {"lr_scale_cross_attention": 0.5},
    {"bf16": True},
    {"fp16": True},
    {"mock_data": True},
    {"rampup_batch_size": [2, 2, 4], "train_iters": None, "train_samples": 8},
)
MATTERS_BESIDE: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"qk_layernorm": True, "normalization": "RMSNorm"}, {"qk_norm_scope": "projection"}),
    ({"disable_bias_linear": True}, {"add_qkv_bias": True}),
    ({"database_keep_fraction": 0.3}, {"database_keep_by": "chunk"}),
    (ADAPTIVE, {"retro_gate_target_rate": 0.1}),
    (ADAPTIVE, {"retro_gate_budget_weight": 1.0}),
    (ADAPTIVE, {"retro_gate_budget_warmup": 1}),
    (ADAPTIVE, {"lr_scale_gate": 0.5}),
    ({"train_iters": 3}, {"lr_decay_style": "cosine"}),
    ({"train_iters": 3}, {"lr_decay_style": "linear"}),
    ({"train_iters": 3}, {"lr_decay_style": "inverse-square-root"}),
    ({"train_iters": 3}, {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 8}),
    (DECAYS_AT_LAST, {"lr_wsd_decay_iters": 3}),
    (DECAYS_AT_LAST, {"lr_wsd_decay_style": "minus_sqrt"}),
    (DECAYS, {"min_lr": 5e-3}),
    (DECAYS, {"lr_decay_samples": 8}),
    (DECAYS, {"lr_decay_iters": 2}),
)
CHANGES_NOTHING: tuple[dict[str, Any], ...] = (
    {"num_workers": 2},
    {"deterministic_mode": True},
    {"recompute_granularity": "full"},
    {"data_parallel_sharding": "full"},
    {"make_vocab_size_divisible_by": 512},
    {"async_save": True, "save_interval": 1},
    {"profile": True, "profile_step_start": 1, "profile_step_end": 2},
    {"log_throughput": True},
    {"check_replicas": True},
    {"retrieval_health": False, "eval_iters": 1},
    {"eval_interval": 1, "eval_iters": 1},
    {"max_data_epochs": 3.0},
)


@pytest.fixture(scope="module")
def results(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What runs left behind, by their settings: each is run once."""
    return {}


def result(
    corpus: TinyCorpus, folder: Path, results: dict[str, dict[str, torch.Tensor]], changes: dict[str, Any]
) -> dict[str, torch.Tensor]:
    key = repr(sorted(changes.items()))
    if key not in results:
        settings = corpus.settings(save=str(folder / str(len(results))), **{**BASE, **changes})
        assert exit_code_of(lambda: pretrain(settings)) == 0
        tensors = stored_tensors(folder / str(len(results)))
        results[key] = {name: tensor for name, tensor in tensors.items() if not name.startswith("random")}
    return results[key]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("base", "change"),
    [*(({}, change) for change in MATTERS), *MATTERS_BESIDE],
    ids=lambda changes: " ".join(changes) or "default",
)
def test_it_changes_the_weights(
    corpus: TinyCorpus,
    tmp_path: Path,
    results: dict[str, dict[str, torch.Tensor]],
    base: dict[str, Any],
    change: dict[str, Any],
) -> None:
    assert not same(result(corpus, tmp_path, results, base), result(corpus, tmp_path, results, base | change))


@pytest.mark.parametrize("change", CHANGES_NOTHING, ids=lambda changes: " ".join(changes))
def test_it_changes_no_bit(
    corpus: TinyCorpus, tmp_path: Path, results: dict[str, dict[str, torch.Tensor]], change: dict[str, Any]
) -> None:
    assert same(result(corpus, tmp_path, results, {}), result(corpus, tmp_path, results, change))
