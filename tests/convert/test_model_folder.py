"""A model's folder comes in whole and goes out whole: tokenizer, template and ends outlive where they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.cli.main import main
from megatron_retro.convert.hugging_face import CONFIG
from megatron_retro.data.instructions.conversations import Turn
from megatron_retro.data.instructions.templates import INSTRUCT_RETRO
from megatron_retro.inference.chat_format import load_chat_format
from tests.data.byte_level import save_byte_level
from tests.data.instructions.chat_templates import CHATML

MESSAGES = [{"role": "user", "content": "Why?"}]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("theirs") / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=save_byte_level(folder), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=260, **SHAPE, eos_token_id=[257, 259], bos_token_id=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [257, 259]
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A run from the folder, which is gone; moved, too."""
    folder = shutil.copytree(source, tmp_path / "hub")
    assert main(["convert", str(folder), str(tmp_path / "first")]) == 0
    shutil.rmtree(folder)
    return Path(shutil.move(tmp_path / "first", tmp_path / "run"))


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_it_answers_as_it_was_taught_after_its_folder_is_gone(
    run: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["generate", "--load", str(run), "--chat", "--prompt", "Why?", "--max-new-tokens", "4"]
    assert main([*words, "--output", str(output), "--device", "cpu"]) == 0
    written = theirs(source).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert json.loads(output.read_text())["prompt"] == "Why?"
    assert written in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["huggingface", "remote-code"])
def test_what_came_in_goes_out(run: Path, source: Path, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(run), str(out), "--convert-to", kind]) == 0
    text = "Why <|im_end|> ü?"
    assert theirs(out)(text)["input_ids"] == theirs(source)(text)["input_ids"]
    assert theirs(out).eos_token == "</s>"
    assert theirs(out).apply_chat_template(MESSAGES, tokenize=False) == theirs(source).apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 259]


@pytest.mark.parametrize("template", [None, INSTRUCT_RETRO])
def test_it_is_tuned_and_exported_with_one_template(
    run: Path, source: Path, template: str | None, tmp_path: Path
) -> None:
    data, tuned, out = tmp_path / "data.jsonl", tmp_path / "tuned", tmp_path / "out"
    data.write_text('{"prompt": "Why?", "completion": "So."}\n' * 2)
    words = ["finetune", "--load", str(run), "--save", str(tuned), "--instruction-data", str(data)]
    words += ["--train-iters", "1", "--global-batch-size", "2", "--seq-length", "512", "--eval-iters", "0"]
    words += ["--peft-method", "lora", "--lora-rank", "2"]
    assert main([*words, *([] if template is None else ["--instruction-template", template])]) == 0
    prompt, _ = load_chat_format(tuned).write([Turn("user", "Why?")])
    assert prompt.startswith("System: " if template == INSTRUCT_RETRO else "<|im_start|>system")
    for kind in ("huggingface --convert-merge", "peft"):
        assert main(["convert", str(tuned), str(out), "--convert-to", *kind.split()]) == 0
        assert theirs(out).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == prompt
        shutil.rmtree(out)


def test_it_is_written_in_the_numbers_that_are_asked_for(source: Path, tmp_path: Path) -> None:
    import megatron_retro as mr

    for dtype in ("float32", "bfloat16"):
        assert main(["convert", str(source), str(tmp_path / dtype), "--convert-dtype", dtype]) == 0
    whole, half = (mr.load(tmp_path / dtype, device="cpu", dtype="fp32") for dtype in ("float32", "bfloat16"))
    for ours, theirs in zip(half.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())
    sizes = [
        sum(one.stat().st_size for one in (tmp_path / dtype).rglob("*.safetensors"))
        for dtype in ("bfloat16", "float32")
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_folder_without_a_tokenizer_is_refused_unless_one_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (CONFIG, "model.safetensors"):
        shutil.copyfile(source / name, bare / name)
    assert main(["convert", str(bare), str(tmp_path / "run")]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(source)]
    assert main(["convert", str(bare), str(tmp_path / "run"), *words]) == 0
    assert (tmp_path / "run/tokenizer/tokenizer.json").is_file()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "again"), *words]) == 2
    assert "is read with a model of Hugging Face" in capsys.readouterr().err


def test_texts_begin_and_answers_end_as_the_model_says(run: Path, source: Path) -> None:
    from tokenizers import processors

    import megatron_retro as mr
    from megatron_retro.data.tokenizers import end_tokens

    model = mr.load(run, device="cpu")
    assert end_tokens(model.tokenizer) == {257, 259}
    assert model.generator.tokens_of("Why?")[0] < 256  # no rule, no token
    tokenizer = theirs(source)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.backend_tokenizer.save(str(run / "tokenizer/tokenizer.json"))
    generator = mr.load(run, device="cpu").generator
    for text in ("Why?", ""):
        assert list(generator.tokens_of(text)) == tokenizer(text)["input_ids"]
    assert generator.tokens_of("<s>Why?") == generator.tokens_of("Why?")
    generator.add_bos = False
    assert generator.tokens_of("Why?")[0] < 256
