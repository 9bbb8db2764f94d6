"""Each method starts as the base, trains alone, and (where it can be) merges exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.training import PeftConfig
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.peft import attach as attaching
from megatron_retro.peft.attach import added_parameters, connect, initialize, is_added, trainable_table
from megatron_retro.peft.merging import merge
from megatron_retro.peft.prompts import virtual_token_ids

PARTS = ("decoder", "encoder", "cross-attention")
EVERY_TARGET = ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down", "query", "key_value", "output")
METHODS = {
    "lora": PeftConfig(peft_method="lora", peft_parts=PARTS, lora_rank=4, lora_targets=EVERY_TARGET),
    "series adapter": PeftConfig(peft_method="adapter", peft_parts=PARTS, adapter_size=8),
    "parallel adapter": PeftConfig(peft_method="adapter", peft_parts=PARTS, adapter_size=8, adapter_parallel=True),
    "ia3": PeftConfig(peft_method="ia3", peft_parts=PARTS),
    "p-tuning": PeftConfig(peft_method="p-tuning", num_virtual_tokens=5, prompt_encoder_hidden_size=16),
}
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, group_query_attention=True, num_query_groups=2, vocab_size=61,
    make_vocab_size_divisible_by=8, swiglu=True, untie_embeddings_and_output_weights=True,
)  # fmt: skip
RETRO = RetroConfig(retro_add_retriever=True, retro_chunk_length=8, retro_layers=(2,))


def filled_model(retro: RetroConfig = RETRO, model: ModelConfig = MODEL) -> Retro:
    built = Retro(model, retro)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + ("norm.weight" in name))
    return built.eval()


def attach(model: Retro, config: PeftConfig) -> None:
    attaching.attach(model, config)
    connect(model)


def inputs() -> tuple[Tensor, Neighbors]:
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, 61, (2, 24), generator=generator)
    neighbors = torch.randint(0, 61, (2, 3, 2, 16), generator=generator)
    return tokens, Neighbors(neighbors, torch.ones_like(neighbors, dtype=torch.bool))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "p-tuning"])
@pytest.mark.parametrize("kind", ["gpt", "retro"])
def test_a_fresh_method_changes_no_bit(method: str, kind: str) -> None:
    model = filled_model(RETRO if kind == "retro" else RetroConfig())
    tokens, neighbors = inputs()
    given = neighbors if kind == "retro" else None
    before = model(tokens, given)
    attach(model, METHODS[method])
    initialize(model, seed=1)
    assert torch.equal(model(tokens, given), before)


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_what_was_added_and_nothing_else(method: str) -> None:
    model = filled_model()
    attach(model, METHODS[method])
    initialize(model, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens, neighbors = inputs()
    if method == "p-tuning":
        tokens[:, :5] = torch.tensor(virtual_token_ids(5))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(tokens, neighbors, labels_BS=tokens.clamp(min=0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_added(name)
        assert torch.equal(parameter, before[name]) != is_added(name), name


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_equals_unmerged(method: str, bias: bool) -> None:
    model = filled_model(model=ModelConfig(**{**vars(MODEL), "disable_bias_linear": not bias}))
    attach(model, METHODS[method])
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in added_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tokens, neighbors = inputs()
    before = model.double()(tokens, neighbors)
    model.float()
    merge(model, METHODS[method])
    assert not added_parameters(model)
    assert sorted(dict(model.named_parameters())) == sorted(dict(filled_model().named_parameters())) or bias is False
    torch.testing.assert_close(model(tokens, neighbors), before.float(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_says_so() -> None:
    model = filled_model()
    attach(model, METHODS["series adapter"])
    with pytest.raises(ConfigError, match="cannot be merged exactly"):
        merge(model, METHODS["series adapter"])


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_to_less_than_half(method: str) -> None:
    model = filled_model()
    config = METHODS[method]
    if method == "p-tuning":
        config = PeftConfig(peft_method="p-tuning", num_virtual_tokens=8, prompt_encoder_hidden_size=64)
    attach(model, config)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 61, (1, 16), generator=generator)
    labels = tokens.roll(-1, 1)
    if method == "p-tuning":
        tokens[:, :8] = torch.tensor(virtual_token_ids(8))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = last = 0.0
    for _ in range(200):
        loss = model(tokens, labels_BS=labels)[:, 8:-1].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        first = first or last
        if last < first / 2:
            break
    assert last < first / 2, f"{first:.3f} -> {last:.3f}"


def test_virtual_tokens_stand_for_no_word_and_act() -> None:
    model = filled_model(RetroConfig())
    attach(model, METHODS["p-tuning"])
    initialize(model, seed=1)
    tokens = inputs()[0][:1]
    prompted = torch.cat((torch.tensor([virtual_token_ids(5)]), tokens), 1)
    before = model(prompted)
    assert torch.equal(model(tokens), filled_model(RetroConfig())(tokens))
    with torch.no_grad():
        model.get_parameter("embedding.prompt.down.bias").add_(1.0)
    assert not torch.allclose(model(prompted)[:, 5:], before[:, 5:])


def test_nothing_to_attach_to_is_named() -> None:
    with pytest.raises(ConfigError, match="finds nothing to attach to"):
        attach(filled_model(RetroConfig()), PeftConfig(peft_method="lora", peft_parts=("encoder",)))


def test_table_counts_what_trains() -> None:
    model = filled_model(RetroConfig())
    attach(model, PeftConfig(peft_method="lora", lora_rank=4))
    table = trainable_table(model)
    assert "layers.*.attention.query_key_value.lora.down.weight" in table
    assert str(2 * (4 * 32 + 4 * 2 * 4 * 8)) in table.splitlines()[-1]
