"""The face for Python: the same numbers as what it stands on, nothing heavy at import, every verb as a function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_retro as mr
from megatron_retro.errors import ConfigError, MegatronRetroError
from tests.data.byte_level import save_byte_level

PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8"


@pytest.fixture(scope="module")
def model(room: Path) -> mr.Model:
    return mr.load(room / "retro", index=room / "project", device="cpu", dtype="fp32")


def test_nothing_heavy_at_import() -> None:
    code = "import sys, megatron_retro; print([name for name in ('torch', 'numpy', 'faiss') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_answers_are_greedy_and_say_what_was_read(model: mr.Model) -> None:
    answer = model.generate(PROMPT, max_new_tokens=20)
    assert answer.finish_reason in ("length", "stop") and len(answer.tokens) == len(answer.logprobs) > 0
    assert answer.chunks and answer.chunks[0].neighbors[0].text
    assert model.generate(PROMPT, max_new_tokens=20, retrieval="none").chunks == ()


def test_a_score_is_the_sum_of_log_probabilities(model: mr.Model) -> None:
    context, continuation = (model.tokenizer.encode(text) for text in (PROMPT, " w9"))
    logprobs = model.module(torch.tensor([[*context, *continuation]])).log_softmax(-1)[0, len(context) - 1 : -1]
    expected = sum(float(row[token]) for row, token in zip(logprobs, continuation, strict=True))
    assert model.score(PROMPT, " w9", retrieval="none").logprob == pytest.approx(expected, abs=1e-4)


def test_neighbors_count_in_a_score(model: mr.Model) -> None:
    real, none = (model.score(PROMPT, " w9 w10", retrieval=kind).logprob for kind in ("live", "none"))
    assert real != none
    assert model.score(PROMPT, " w9 w10", passages=["w9 w10 w11"]).logprob != real


def test_encoded_neighbors_have_the_models_shape(model: mr.Model) -> None:
    encoded = model.encode_neighbors(PROMPT)
    assert encoded is not None and encoded.isfinite().all()
    chunks, (count, length) = len(PROMPT) // 16, model.generator.forward.neighbor_shape
    assert encoded.shape[:3] == (chunks, count, length)
    assert model.encode_neighbors("short") is None and model.encode_neighbors(PROMPT, retrieval="none") is None


def test_an_index_gives_the_text_of_what_it_finds(room: Path) -> None:
    index, corpus = mr.Index.open(room / "project"), mr.Corpus(room / "corpus")
    decode = index.live.tokenizer.decode
    ids, distances = index.live.search([index.live.tokenizer.encode(PROMPT)[-16:]], 3)
    for passage, number, distance in zip(index.search(PROMPT, 3), ids[0], distances[0], strict=True):
        tokens = corpus.document(passage.document).tolist()
        start = 16 * (passage.id - int(index.live.database.chunks_before[passage.document]))
        assert (passage.id, passage.distance) == (number, distance)
        assert passage.text == decode(tokens[start : start + 16])
        assert decode(tokens).startswith(passage.continuation, len(decode(tokens[: start + 16])))


def test_a_hugging_face_folder_opens_as_it_is(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        theirs = LlamaForCausalLM(LlamaConfig(**size, vocab_size=257)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    save_byte_level(tmp_path / "llama", ["</s>"])
    tokens = torch.arange(1, 12)[None]
    model = mr.load(tmp_path / "llama", device="cpu", dtype="fp32")
    assert torch.allclose(model.module(tokens), theirs(tokens).logits, atol=1e-5)
    assert model.generate("once", max_new_tokens=2).chunks == ()


def test_verbs_are_functions_and_raise(room: Path, tmp_path: Path) -> None:
    assert mr.run("inspect", str(room / "corpus")) == 0
    with pytest.raises(MegatronRetroError, match="no flag of this command"):
        mr.run("pretrain", num_layer=3)
    with pytest.raises(ConfigError, match="at least 1"):
        mr.run("pretrain", num_layers=0, save=str(tmp_path / "run"))
