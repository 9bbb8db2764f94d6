"""A name of the hub stands wherever a folder of a model may, through an endpoint of the hub's own protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_retro.checkpoint.loading import describe_checkpoint
from tests.convert.local_hub import COMMIT, LocalHub, serving, told
from tests.data.byte_level import save_byte_level


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A hub that holds one model, `team/model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **size)).save_pretrained(folder)
    save_byte_level(folder, ["</s>"])
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    with serving(LocalHub()) as found:
        found.hold("team/model", folder)
        yield found


def test_a_model_comes_in_by_name_and_again_without_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    for name, offline in (("first", "0"), ("second", "1")):
        words = ["convert", "team/model", str(tmp_path / name)]
        run = told(words, hub, tmp_path / "home", HF_HUB_OFFLINE=offline)
        assert run.returncode == 0, run.stderr
        assert (tmp_path / name / "tokenizer/tokenizer.json").is_file()
        origin = describe_checkpoint(tmp_path / name).manifest.inputs["hugging_face"]
        assert origin == f"team/model@{COMMIT}"
    assert not list((tmp_path / "home").rglob("pytorch_model.bin"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some text"}\n')
    tokens = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "team/model", "--append-eod"]
    words = ["preprocess", "--input", str(text), "--output-prefix", str(tmp_path / "corpus"), *tokens]
    run = told(words, hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr


def test_a_name_that_is_nowhere_is_one_message(hub: LocalHub, tmp_path: Path) -> None:
    run = told(["convert", "team/other", str(tmp_path / "run")], hub, tmp_path / "home")
    assert run.returncode == 2
    assert "team/other is no folder here" in run.stderr and "Traceback" not in run.stderr
