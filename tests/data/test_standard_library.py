"""Questions made from sources: their answers stand in their passages, and held-out files give none to train on."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_retro.cli.main import main
from megatron_retro.data.instructions.conversations import read_conversations
from megatron_retro.data.standard_library import Document, library_questions

SOURCE = '''
class Box:
    """Some place for things of every kind.  It has walls."""

    def put(self, thing):
        """Put a thing into the box.

        It stays there."""

    def _hidden(self):
        """Nobody asks for this one here."""

def short():
    """Too short."""

def code():
    """x = y and then some other words."""
'''


def test_questions_of_a_source() -> None:
    found = list(library_questions(Document("tools/box.py", SOURCE)))
    assert [(one["question"], one["answers"]) for one in found] == [
        ("What is tools.box.Box?", ["Some place for things of every kind."]),
        ("What does tools.box.Box.put do?", ["Put a thing into the box."]),
    ]
    assert found[1]["contexts"][0]["text"].startswith("    def put(self, thing):")


def test_no_source_gives_no_question() -> None:
    assert not list(library_questions(Document("topic loops", SOURCE)))
    assert not list(library_questions(Document("old.py", "print 'no longer Python'")))


def test_files_of_the_verb(tmp_path: Path) -> None:
    assert main(["collect-text", "--collect-output", str(tmp_path)]) == 0
    held_out = {json.loads(line)["id"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in held_out}
    for name, inside in (("train", False), ("held_out", True)):
        path = tmp_path / f"{name}_questions.jsonl"
        conversations = read_conversations(path)
        assert len(conversations) > 50
        assert {one.passages[0].title in modules for one in conversations} == {inside}
