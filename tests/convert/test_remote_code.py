"""A whole Retro is loaded by transformers and computes what ours does, with neighbours and without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.assembly.loading import load_model
from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro


@pytest.mark.parametrize(
    ("model", "retro"),
    [
        ({"untie_embeddings_and_output_weights": True, "swiglu": True}, {}),
        ({"group_query_attention": True, "num_query_groups": 2}, {"retro_gate_type": "adaptive"}),
    ],
    ids=["untied", "adaptive gate, tied"],
)
def test_transformers_computes_what_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], retro: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    import transformers

    ours = random_model(tiny_model(**model), tiny_retro(**retro))
    shapes = parameter_shapes(ours.model, ours.retro)
    values = ours.state_dict()
    settings = Settings([ours.model, ours.retro, TokenizerConfig()])
    write_checkpoint(tmp_path / "run", settings, shapes, lambda name: values[name][: (*shapes[name], 1)[0]], {})
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "theirs"), "--convert-to", "remote-code"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", trust_remote_code=True).eval()
    tokens, neighbors = random_tokens(2, 16), random_neighbors(2, 4)
    with torch.no_grad():
        plain, read = ours(tokens), ours(tokens, neighbors)
        assert torch.equal(theirs(tokens).logits, plain)
        found = theirs(tokens, neighbor_tokens=neighbors.tokens_BCKR, neighbor_mask=neighbors.mask_BCKR)
        assert torch.equal(found.logits, read) and not torch.equal(read, plain)
    written = theirs.generate(
        tokens[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    expected = tokens[:1, :5]
    for _ in range(6):
        with torch.no_grad():
            expected = torch.cat((expected, ours(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(written, expected)
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, plain)
    words = ["convert", str(tmp_path / "again"), str(tmp_path / "back"), "--tokenizer-type", "ByteTokenizer"]
    assert main(words) == 0
    back = load_model(tmp_path / "back", device="cpu").module
    with torch.no_grad():
        assert torch.equal(back(tokens, neighbors), read)


@pytest.fixture
def theirs() -> Any:
    """A Retro under transformers' interface, without a folder."""
    from megatron_retro.convert.modeling_megatron_retro import MegatronRetroConfig, MegatronRetroForCausalLM

    def made(**changes: Any) -> Any:
        ours = random_model(tiny_model(untie_embeddings_and_output_weights=True), tiny_retro(**changes))
        model = dataclasses.replace(ours.model, make_vocab_size_divisible_by=1)
        config = MegatronRetroConfig(dataclasses.asdict(model), dataclasses.asdict(ours.retro), use_cache=False)
        made = MegatronRetroForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in made.retro.named_parameters():
                parameter.copy_(ours.get_parameter(name)[: len(parameter)])
        return made

    return made


def test_rows_that_are_padded_on_the_left_are_the_unpadded_ones(theirs: Any) -> None:
    """Their logits, with the mask alone and with positions too, and what is written; with neighbours it is refused."""
    model, tokens = theirs(), random_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone, whole = model(tokens[:1, 5:]).logits[0], model(tokens[1:]).logits[0]
        for more in ({}, {"position_ids": positions}):
            found = model(tokens, attention_mask=mask, **more).logits
            torch.testing.assert_close(found[0, 5:], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], whole, atol=1e-5, rtol=1e-5)
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    written = model.generate(tokens, attention_mask=mask, **asked)
    single = model.generate(tokens[:1, 5:], attention_mask=mask[:1, 5:], **asked)
    assert torch.equal(written[0, 5:], single[0])
    neighbors = random_neighbors(2, 3)
    with pytest.raises(ValueError, match="padded on the left"):
        model(tokens, neighbors.tokens_BCKR, neighbors.mask_BCKR, attention_mask=mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_give_the_same_gradients(theirs: Any, reentrant: bool) -> None:
    model, tokens, neighbors = theirs().train(), random_tokens(2, 16), random_neighbors(2, 4)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(tokens, neighbors.tokens_BCKR, neighbors.mask_BCKR, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    entered = []
    model.retro.layers["0"].mlp.register_forward_pre_hook(lambda *_: entered.append(1))
    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert len(entered) == 3
    torch.testing.assert_close(found, expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_trainer_that_accumulates_takes_the_gradient_of_the_whole_batch(theirs: Any, tmp_path: Path) -> None:
    """Rows with unequal numbers of labels: a step of 4 rows and one of 1 x 4 move the weights alike."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    tokens = random_tokens(4, 12)
    rows = [
        {"input_ids": row, "labels": torch.where(torch.arange(12) < cut, -100, row)}
        for row, cut in zip(tokens, (0, 2, 6, 10), strict=True)
    ]
    model = theirs()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def moved(batch: int) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        asked = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            learning_rate=1.0,
            max_grad_norm=0.0,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, asked, train_dataset=rows).train()
        return {name: value - start[name] for name, value in model.state_dict().items()}

    whole = moved(4)
    assert any(bool(change.any()) for change in whole.values())
    torch.testing.assert_close(moved(1), whole, atol=1e-5, rtol=1e-4)


def test_tables_of_tokens_are_set_and_resized(theirs: Any, tmp_path: Path) -> None:
    model, tokens = theirs(retro_encoder_own_embedding=True), random_tokens(2, 16)
    given = (tokens, random_neighbors(2, 4).tokens_BCKR)
    with torch.no_grad():
        expected = model(*given).logits
        vocabulary = expected.shape[-1]
        assert model.resize_token_embeddings(vocabulary + 3).weight.shape[0] == vocabulary + 3
        longer = model(*given).logits
    assert torch.equal(longer[..., :vocabulary], expected)
    torch.testing.assert_close(longer[..., vocabulary], expected.mean(-1), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(*given).logits, longer)
        again.resize_token_embeddings(vocabulary)
        assert torch.equal(again(*given).logits, expected)
    other = torch.nn.Embedding.from_pretrained(again.get_input_embeddings().weight.detach() * 2)
    again.set_input_embeddings(other)
    again.set_output_embeddings(other)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight is other.weight
    with pytest.raises(ValueError, match="resize_token_embeddings changes"):
        again.set_input_embeddings(torch.nn.Embedding(3, other.weight.shape[1]))
    with pytest.raises(ValueError, match="has no bias"):
        again.set_output_embeddings(torch.nn.Linear(*other.weight.shape))


def test_peft_tunes_it_by_parameters(theirs: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = theirs()
    tokens, neighbors = random_tokens(2, 16), random_neighbors(2, 4)
    read = {"neighbor_tokens": neighbors.tokens_BCKR, "neighbor_mask": neighbors.mask_BCKR}
    before = model(tokens, **read).logits
    places = [f"{place}.weight" for place in ("attention.query_key_value", "cross_attention.key_value", "mlp.down")]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=places)
    tuned = peft.get_peft_model(model, config)
    assert torch.equal(tuned(input_ids=tokens, **read).logits, before)
    tuned(input_ids=tokens, **read).logits.sum().backward()
    moved = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert all("lora_" in name for name in moved)
    assert all(any(part in name for name in moved) for part in ("encoder", "cross_attention.key_value", "mlp.down"))
