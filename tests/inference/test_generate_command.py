"""`megatron-retro generate` and `evaluate` from the command line: a checkpoint, an index, answers, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.cli.main import main


def test_answers_with_neighbors(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--load", str(room / "retro"), "--max-new-tokens", "30", "--device", "cpu"]
    live = ["--retro-index", str(room / "project")]
    prompt = "a prompt of forty bytes, or a little more"
    assert main([*common, *live, "--prompt", prompt, "--output", str(room / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    (record,) = [json.loads(line) for line in (room / "out.jsonl").read_text().splitlines()]
    assert printed.startswith(prompt) and "neighbour 1: chunk" in printed
    stops = [chunk["query_stop"] for chunk in record["chunks"]]
    assert stops[:2] == [16, 32] and all(chunk["neighbors"] for chunk in record["chunks"])
    assert all(neighbor["id"] >= 0 for chunk in record["chunks"] for neighbor in chunk["neighbors"])
    assert main([*common, "--prompt", prompt, "--no-show-neighbors"]) == 0
    assert "neighbour" not in capsys.readouterr().out
    (room / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    given = ["--prompt-file", str(room / "prompts.jsonl"), "--passages", "some text", "--temperature", "0.8"]
    assert main([*common, *given]) == 0
    both = capsys.readouterr().out
    assert "one" in both and "two" in both and "neighbour 1: given" in both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load", "retro"], "there is no prompt"),
        (["--prompt", "x"], "which model?"),
        (["--load", "retro", "--prompt", "x", "--prompt-file", "y"], "exclude each other"),
        (["--load", "retro", "--prompt-file", "missing.jsonl"], "cannot read"),
        (["--load", "retro", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--load", "retro", "--prompt", "x" * 3000], "too long"),
        (["--load", "retro", "--prompt", "x", "--retrieval", "random"], "needs an index"),
        (["--load", "retro", "--prompt", "x", "--retrieval-step", "17", "--retro-index", "project"], "retrieval step"),
        (["--load", "retro", "--prompt", "x", "--retrieval-step", "4"], "nothing is retrieved"),
        (["--load", "other", "--prompt", "x", "--retro-index", "project"], "chunk length does not match"),
        (["--load", "retro", "--prompt", "x", "--retro-index", "retro"], "no index that can be asked"),
        (["--load", "shut", "--prompt", "x", "--retro-index", "project"], "reads no neighbours"),
        (["--load", "shut", "--prompt", "x", "--passages", "y"], "reads no neighbours"),
        (["--load", "nowhere", "--prompt", "x"], "nowhere"),
        (["--load", "retro", "--prompt", "x", "--tensor-model-parallel-size", "2"], "does not fit the model"),
    ],
)
def test_bad_input(
    room: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room)
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "got"), [("", "no line"), ('{"prompt": 5}\n', "5"), ('{"prompt": "x"}\n{"prompt": null}\n', "None")]
)
def test_prompts_that_are_no_text(
    room: Path, tmp_path: Path, lines: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines)
    assert main(["generate", "--load", str(room / "retro"), "--prompt-file", str(tmp_path / "prompts.jsonl")]) == 2
    assert f"got:      {got}" in capsys.readouterr().err


def test_an_output_that_is_a_folder_is_refused_before_the_work(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--load", str(room / "retro"), "--prompt", "x", "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "is a folder" in printed.err and not printed.out


def test_index_of_another_tokenizer(room: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same index, said to be of GPT-2's tokenizer."""
    import shutil

    from megatron_retro.artifacts.manifest import write_sealed_json
    from megatron_retro.retrieval.layout import ProjectLayout

    project = tmp_path / "project"
    shutil.copytree(room / "project", project)
    (tmp_path / "corpus.bin").symlink_to(room / "corpus.bin")
    (tmp_path / "corpus.idx").symlink_to(room / "corpus.idx")
    (tmp_path / "corpus.manifest.json").symlink_to(room / "corpus.manifest.json")
    settings = ProjectLayout(project).live_settings
    stored = json.loads(settings.read_text())
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 256}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    stored["tokenizer"] |= {"tokenizer_type": "GPT2BPETokenizer", **files}
    del stored["seal"]
    settings.unlink()
    write_sealed_json(settings, stored)
    words = ["generate", "--load", str(room / "retro"), "--prompt", "x", "--retro-index", str(project)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "another tokenizer" in told and "GPT2BPETokenizer" in told and "ByteTokenizer" in told
    assert main([*words, "--allow-tokenizer-mismatch", "--max-new-tokens", "20"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"), [(["--eval-contexts", "bm25"], "there is no file"), ([], "given reads no --eval-passages")]
)
def test_passages_that_are_not_there_or_not_read_are_refused(
    room: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "nq", "--load", str(room / "retro"), "--eval-passages", "nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


def test_evaluate(
    room: Path, squad_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = squad_file, room / "evaluation"
    words: list[Any] = ["evaluate", "squad1", "--load", room / "retro", "--eval-data", data, "--eval-output", output]
    words = [str(word) for word in [*words, "--eval-max-new-tokens", 8, "--max-sequence-length", 512]]
    assert main([*words, "--shard", "0/2"]) == 0
    assert not (output / "results.json").exists()
    assert main([*words, "--shard", "1/2"]) == 0
    (result,) = json.loads((output / "results.json").read_text())
    assert result["examples"] == 5 and set(result["metrics"]) == {"f1", "em"}
    assert "squad1" in capsys.readouterr().out
    assert main([*words, "--no-eval-encoder"]) == 2
    assert "another model, set or protocol" in capsys.readouterr().err
    off = [*words, "--no-eval-encoder", "--eval-output", str(room / "off"), "--eval-contexts", "bm25"]
    assert main(off) == 0
    texts = [
        [json.loads(line)["prediction"] for line in (folder / "squad1.examples.jsonl").read_text().splitlines()]
        for folder in (output, room / "off")
    ]
    assert texts[0] != texts[1], "the encoder is read"
    assert main(["evaluate", "squad1", "nq", "--load", str(room / "retro"), "--eval-data", str(data)]) == 2
    assert main(["evaluate", "sqad1", "--load", str(room / "retro")]) == 2


@pytest.mark.parametrize(("place", "reads"), [("prompt", ()), ("encoder", ("one", "two")), ("split", ("two",))])
def test_a_tuned_model_is_talked_to_as_it_was_tuned(
    place: str, reads: tuple[str, ...], room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Template and place of passages come from the tuning run."""
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns, "contexts": [{"title": "", "text": "one"}]}))
    (tmp_path / "form.jinja").write_text(
        "{% for one in passages %}({{ one.text }}){% endfor %}"
        "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tuning = ["finetune", "--load", str(room / "retro"), "--save", str(tmp_path / "tuned"), "--train-iters", "1"]
    tuning += ["--instruction-data", str(tmp_path / "chat.jsonl"), "--context-place", place, "--eval-iters", "0"]
    tuning += ["--instruction-template", str(tmp_path / "form.jinja"), "--global-batch-size", "1"]
    assert main(tuning) == 0
    capsys.readouterr()
    asking = ["generate", "--load", str(tmp_path / "tuned"), "--chat", "--prompt", "what?", "--passages", "one", "two"]
    assert main([*asking, "--max-new-tokens", "2", "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]) == 0
    in_prompt = "".join(f"({text})" for text in ("one", "two") if text not in reads)
    assert capsys.readouterr().out.startswith(f"{in_prompt}<user>what?<assistant>")
    chunks = json.loads((tmp_path / "out.jsonl").read_text())["chunks"]
    assert all(tuple(one["text"] for one in chunk["neighbors"]) == reads for chunk in chunks)
