"""A whole Retro is loaded by transformers and computes what ours does, with neighbours and without."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match="padded on the left"):
        theirs(tokens, attention_mask=torch.tensor([[0] + [1] * 15] * 2))
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, plain)
    assert theirs.get_input_embeddings().weight is theirs.retro.embedding.word.weight
    words = ["convert", str(tmp_path / "again"), str(tmp_path / "back"), "--tokenizer-type", "ByteTokenizer"]
    assert main(words) == 0
    back = load_model(tmp_path / "back", device="cpu").module
    with torch.no_grad():
        assert torch.equal(back(tokens, neighbors), read)
