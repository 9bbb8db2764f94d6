"""Hugging Face folders that are damaged, or not understood as a whole, are refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.convert.hugging_face import import_hugging_face, imported_tokenizer
from megatron_retro.data.tokenizers import build_tokenizer, end_tokens
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.testing.corpora import small_sentencepiece
from tests.convert.foreign_decoders import made


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"unheard_of": 3}, "unheard_of = 3 is not understood"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}},
            "original_max_position_embeddings = 32: only 64 is understood in dynamic rope",
        ),
        ({"rope_parameters": {"rope_type": "default", "short_factor": [1.0]}}, "short_factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected silu"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"attention_bias": True}, "only both or none"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4}, "sliding_window: transformers passes it over in this family"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "beside rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope: factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope: low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope: rope_theta = 'big'"),
        ({"rope_parameters": "none"}, "rope_parameters = 'none': expected an object"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a whole number above 0"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads = 1.5"),
    ],
)
def test_what_is_not_understood_is_named(
    transformers: Any, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    made(transformers, "llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError) as raised:
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    assert named in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_tied_model_whose_output_matrix_is_another_is_refused(transformers: Any, tmp_path: Path) -> None:
    """Which of the two transformers uses depends on its version."""
    made(transformers, "llama", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ArtifactError, match="ties its embeddings, and yet its output matrix is another"):
        import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("tokenizer.model",), "SentencePieceTokenizer"),
        (("vocab.json", "merges.txt"), "GPT2BPETokenizer"),
        (("tokenizer.json", "tokenizer.model"), "HuggingFaceTokenizer"),
    ],
)
def test_the_tokenizer_of_a_folder_is_found(files: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert imported_tokenizer(tmp_path).tokenizer_type == kind


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}, "Llama2Tokenizer"),
        ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, "Llama2Tokenizer"),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "SentencePieceTokenizer"),
        ({"added_tokens_decoder": {"2": {"content": "</s>"}}}, "SentencePieceTokenizer"),
        ({"added_tokens_decoder": {"5000": {"content": "<|im_end|>"}}}, "<|im_end|>"),
        ({"eos_token": {"content": "<|im_end|>"}}, "<|im_end|>, which ends a text"),
    ],
)
def test_a_sentencepiece_model_begins_and_ends_as_its_folder_says(
    tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    """Or it is refused, where the folder has tokens that the model has not; ends besides are those of answers."""
    small_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    if not kind.endswith("Tokenizer"):
        with pytest.raises(ArtifactError) as caught:
            imported_tokenizer(tmp_path)
        assert kind in str(caught.value) and "fast tokenizer" in str(caught.value)
        return
    config = imported_tokenizer(tmp_path)
    assert config.tokenizer_type == kind
    assert end_tokens(build_tokenizer(config)) == {2, 7}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 5000, "<s>": 1}))
    with pytest.raises(ArtifactError, match=r"\[PAD\]"):
        imported_tokenizer(tmp_path)


def test_damaged_and_foreign_folders_are_refused(transformers: Any, tmp_path: Path) -> None:
    made(transformers, "llama", tmp_path)
    shard = min(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="no intact safetensors"):
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    shard.unlink()
    with pytest.raises(ArtifactError, match="lacks shards"):
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    shard.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, named in (
        ({"num_hidden_layers": 2}, "not understood"),
        ({"num_hidden_layers": 4}, "lacks tensors"),
        ({"intermediate_size": 20}, "another shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ArtifactError, match=named):
            import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "sub/one.safetensors", "", 3, None])
def test_a_weight_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: Any) -> None:
    from megatron_retro.convert.safetensors_folder import INDEX, SafetensorsFolder

    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ArtifactError, match="does not name files beside it"):
        SafetensorsFolder(folder)
