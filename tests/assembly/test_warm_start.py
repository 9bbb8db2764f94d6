"""What retro-fitting adds starts as the decoder's own layers, on every layout, and step 0 can be the given model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.assembly.warm_start import OPEN, start_from_decoder
from megatron_retro.checkpoint.loading import open_checkpoint
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.model_rules import model_violations
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, read_parameter, write_checkpoint
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.context import rotary_frequencies
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.ops.attention import AttentionPattern
from megatron_retro.ops.rotary import rotary_table
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.testing.layouts import LIKE_LLAMA, tiny_settings, whole
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.single_process import one_process
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "group_query_attention": True,
    "num_query_groups": 2,
}
WARM: dict[str, Any] = {
    "retro_init": "decoder",
    "retro_encoder_causal": True,
    "retro_encoder_final_norm": True,
    "retro_neighbor_positions": "continued",
}


def saved_gpt(model: ModelConfig, path: Path) -> Retro:
    """A GPT with random_model weights, as a checkpoint."""
    gpt = random_model(model, RetroConfig())
    state, shapes = gpt.state_dict(), parameter_shapes(model, RetroConfig())
    settings = Settings([model, RetroConfig(), TokenizerConfig()])
    write_checkpoint(path, settings, shapes, lambda name: state[name][: shapes[name][0]], {})
    return gpt


def warm_retro(model: ModelConfig, retro: RetroConfig, path: Path) -> Retro:
    """The retro-fitted model before its first step."""
    checkpoint, built = open_checkpoint(path), Retro(model, retro)
    initialize(built, model, retro, seed=1)
    shapes = parameter_shapes(model, RetroConfig())
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name in shapes:
                parameter[: shapes[name][0]].copy_(read_parameter(checkpoint, name))
    start_from_decoder(built, checkpoint, model, retro)
    return built.eval()


@pytest.mark.parametrize(
    "decoder", [LLAMA, {"apply_layernorm_1p": True}, {"position_embedding_type": "learned_absolute"}]
)
def test_behind_a_shut_gate_step_zero_is_the_given_model(decoder: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**decoder)
    gpt = saved_gpt(model, tmp_path / "gpt")
    for shut in ({"retro_gate_type": "scalar"}, {"retro_gate_type": "heads"}, {"retro_zero_init_output": True}):
        built = warm_retro(model, tiny_retro(**WARM, **shut), tmp_path / "gpt")
        tokens, neighbors = random_tokens(2, 14), random_neighbors(2, 3)
        assert torch.equal(built(tokens, neighbors), built(tokens))
        assert torch.allclose(built(tokens, neighbors), gpt(tokens), atol=1e-6)
    opened = warm_retro(model, tiny_retro(**WARM), tmp_path / "gpt")
    assert not torch.allclose(opened(tokens, neighbors), gpt(tokens), atol=1e-3)


@pytest.mark.parametrize(
    ("number", "retriever"),
    [
        (3, {"retro_layers": (3,), "retro_encoder_layers": 2}),
        (3, {"retro_layers": (1, 3, 5), "retro_encoder_layers": 4, "retro_encoder_reads": "same-depth"}),
        (5, {"retro_layers": (1, 3, 5), "retro_encoder_layers": 4, "retro_encoder_reads": "same-depth"}),
    ],
)
def test_a_neighbor_is_read_as_the_decoder_reads_what_stands_before(
    number: int, retriever: dict[str, Any], tmp_path: Path
) -> None:
    """The retrieval layer that reads a state as deep as itself: its self-attention over the neighbour's tokens."""
    model = tiny_model(**LLAMA)
    gpt = saved_gpt(model, tmp_path / "gpt")
    retro = tiny_retro(**WARM, **retriever, retro_num_neighbors=1)
    built = warm_retro(model, retro, tmp_path / "gpt")
    chunk, length = retro.retro_chunk_length, retro.retrieved_length()
    tokens = random_tokens(1, 2 * chunk)
    neighbors = random_neighbors(1, 2, 1, length)
    neighbors = Neighbors(neighbors.tokens_BCKR, torch.ones_like(neighbors.mask_BCKR))
    found: dict[str, Tensor] = {}
    layer = built.layers[str(number - 1)]
    layer.cross_norm.register_forward_hook(lambda _, arguments, result: found.update(state=result[0]))
    layer.cross_attention.register_forward_hook(lambda _, arguments, result: found.update(read=result))
    built(tokens, neighbors)

    context = gpt.prepare(1, length, tokens.device)
    hidden = gpt.embed(neighbors.tokens_BCKR[:, 0, 0], context)
    for below in range(number - 1):
        hidden, _ = gpt.layers[str(below)](hidden, None, context)
    passage = gpt.layers[str(number - 1)].input_norm(hidden)
    queries = found["state"][:, chunk - 1 : 2 * chunk - 1]
    positions = torch.cat((torch.arange(length), length + chunk - 1 + torch.arange(chunk)))
    sees_passage = (torch.arange(length + chunk) < length)[None, None].expand(1, length + chunk, -1)
    frequencies = rotary_frequencies(model)
    assert frequencies is not None
    expected = gpt.layers[str(number - 1)].attention(
        torch.cat((passage, queries), 1),
        AttentionPattern(allowed_BST=sees_passage),
        rotary_table(positions[None], frequencies),
    )
    got = found["read"][:, chunk - 1 : 2 * chunk - 1]
    assert torch.allclose(got, expected[:, length:], atol=1e-5)


def test_heads_that_copy_can_start_open(tmp_path: Path) -> None:
    model = tiny_model(**LLAMA)
    saved_gpt(model, tmp_path / "gpt")
    retro = tiny_retro(**WARM, retro_gate_type="heads", retro_open_heads=("2.4", "5.1", "5.2"))
    built = warm_retro(model, retro, tmp_path / "gpt")
    first, second = (built.layers[index].cross_attention.gate().flatten() for index in ("1", "4"))
    assert torch.allclose(first, torch.tensor([0.0, 0.0, 0.0, OPEN]))
    assert torch.allclose(second, torch.tensor([OPEN, OPEN, 0.0, 0.0]))


def test_a_cut_holds_what_one_process_holds(tmp_path: Path) -> None:
    heads = {"retro_gate_type": "heads", "retro_open_heads": ("2.1",)}
    changes = {**LIKE_LLAMA, **WARM, **heads, "untie_embeddings_and_output_weights": False}
    settings = tiny_settings(**changes)
    saved_gpt(settings[ModelConfig], tmp_path / "gpt")
    alone = one_process(settings, torch.device("cpu")).module
    start_from_decoder(alone, open_checkpoint(tmp_path / "gpt"), settings[ModelConfig], settings[RetroConfig])
    expected = {name: value.detach() for name, value in alone.named_parameters()}
    for layout in (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "data_parallel_sharding": "full"},
    ):
        values = run_ranks(_warm_parameters, 4, settings.replace(**layout), tmp_path / "gpt", timeout=120.0)
        assert set().union(*values) == set(expected)
        for on_rank in values:
            for name, value in on_rank.items():
                rows = len(expected[name]) if expected[name].dim() else None
                assert torch.equal(value[:rows] if rows else value, expected[name]), name


def _warm_parameters(settings: Settings, path: Path) -> dict[str, Tensor]:
    mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
    trainable = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))
    start_from_decoder(trainable.module, open_checkpoint(path), settings[ModelConfig], settings[RetroConfig])
    return {name: whole(value.detach()).clone() for name, value in trainable.module.named_parameters()}


@pytest.mark.parametrize(
    ("decoder", "retriever", "named"),
    [
        ({"qk_layernorm": True}, {}, "retro_init"),
        ({"norm_placement": "after"}, {}, "retro_init"),
        ({}, {"retro_encoder_layers": 7}, "retro_encoder_layers"),
        ({}, {"retro_encoder_hidden_size": 12, "retro_encoder_own_embedding": True}, "retro_encoder_hidden_size"),
        ({}, {"retro_encoder_ffn_hidden_size": 12}, "retro_encoder_ffn_hidden_size"),
        ({}, {"retro_gate_type": "heads", "retro_open_heads": ("2.5",)}, "retro_open_heads"),
        ({}, {"retro_gate_type": "heads", "retro_open_heads": ("3.1",)}, "retro_open_heads"),
        ({}, {"retro_open_heads": ("2.1",)}, "retro_gate_type"),
    ],
)
def test_another_shape_cannot_start_from_the_decoder(
    decoder: dict[str, Any], retriever: dict[str, Any], named: str
) -> None:
    model, retro = tiny_model(**decoder), tiny_retro(retro_init="decoder", **retriever)
    assert named in [violation.field for violation in model_violations(model, retro)]
