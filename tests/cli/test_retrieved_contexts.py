"""Conversations get the passages of an index: of the document that their question is about; all else stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.cli.main import main
from megatron_retro.data.instructions.conversations import read_conversations
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.retrieval_projects import CHUNK, project_settings, write_corpus

TEXTS = [f"{name} was built in {year} by the people of {name} hill" for name, year in
         [("Arden", 1410), ("Bexley", 1555), ("Corvin", 1602), ("Dunmoor", 1733), ("Elster", 1801), ("Fenwick", 1899)]
         for _ in range(3)]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    corpus = write_corpus(folder / "corpus", [list(text.encode()) for text in TEXTS])
    build_retrieval(
        project_settings(
            folder / "project",
            [corpus],
            retro_tasks=["train", "encode", "merge", "query"],
            retro_query_num_neighbors_save=2,
        )
    )
    return folder / "project"


def records() -> list[dict[str, Any]]:
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "Dunmoor was buil"},
        {"role": "assistant", "content": "1733"},
    ]
    return [
        {"messages": messages, "id": 7},
        {"question": "Who built it? Corvin was buil", "answers": ["the people"], "source": "x"},
        {"prompt": "Arden was built", "completion": "1410", "contexts": [{"title": "t", "text": "given"}]},
    ]


def retrieved(project: Path, folder: Path, *flags: str) -> list[dict[str, Any]]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records()))
    assert main(["retrieve-contexts", str(source), str(target), "--retro-index", str(project), *flags]) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_passages_are_of_what_was_asked(project: Path, tmp_path: Path) -> None:
    found = retrieved(project, tmp_path, "--retrieved-contexts", "3")
    for record, before, name in zip(found, records(), ("Dunmoor", "Corvin", None), strict=True):
        assert {key: value for key, value in record.items() if key != "contexts"} == {
            key: value for key, value in before.items() if key != "contexts"
        }
        if name is not None:
            texts = [context["text"] for context in record["contexts"]]
            assert len(texts) == 3 and all(text == TEXTS_BY_NAME[name] for text in texts)
    assert found[2]["contexts"] == [{"title": "t", "text": "given"}]
    assert [len(one.passages) for one in read_conversations(tmp_path / "out.jsonl")] == [3, 3, 1]


TEXTS_BY_NAME = {text.split()[0]: text[: 2 * CHUNK].strip() for text in TEXTS}


def test_given_passages_are_replaced_when_asked(project: Path, tmp_path: Path) -> None:
    found = retrieved(project, tmp_path, "--replace-contexts", "--retrieved-context-chunks", "1")
    assert found[2]["contexts"][0] == {"text": "Arden was built"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["in.jsonl"], "takes two paths"),
        (["in.jsonl", "out.jsonl"], "where are the passages?"),
        (["in.jsonl", "out.jsonl", "--retro-index", "."], "no index that can be asked"),
    ],
)
def test_what_is_missing_is_named(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["retrieve-contexts", *words]) == 2
    assert named in capsys.readouterr().err


def test_bad_lines_are_named_and_nothing_is_written(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": 1}\n')
    words = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--retro-index", str(project)]
    assert main(["retrieve-contexts", *words]) == 2
    assert "line 2: " in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
